// What happens before what in a running cluster. Each agent counts its own time; where threads meet, they tell what
// they know of the times of others (vector clocks: Mattern 1989; for races: FastTrack, Flanagan and Freund 2009).
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace vdcore::cuda::emulator {

// Something that an agent does: a thread by its number in the cluster, or a unit that works on its own. Time 0:
// nothing.
struct Event {
  uint32_t cluster = 0, agent = 0, time = 0;
};

// For every agent, until when what it did is past. All who know the same share one.
using Past = std::shared_ptr<const std::vector<uint32_t>>;
Past joined(const Past& a, const Past& b);
inline bool in_past(const Past& past, uint32_t agent, uint32_t time) {
  return past && agent < past->size() && (*past)[agent] >= time;
}

// What those who have arrived somewhere know together.
class Gathered {
 public:
  void add(const Past& past);
  void add(uint32_t agent, uint32_t time);
  Past take();  // and begins anew

 private:
  std::vector<uint32_t> times_;
  Past last_;
};

class Clocks {
 public:
  void begin(uint32_t cluster, uint32_t blocks, uint32_t threads);  // of each block

  // A unit that works on its own; its name is for errors.
  uint32_t add_unit(const std::string& name);
  Event next_of_unit(uint32_t agent) { return {cluster_, agent, times_[agent]++}; }
  bool is_thread(uint32_t agent) const { return agent < threads_; }
  const std::string& unit_name(uint32_t agent) const { return units_[agent - threads_]; }

  Event now(uint32_t thread) const { return {cluster_, thread, times_[thread]}; }
  // What a thread has done and knows is known to those who take it from there.
  void release(uint32_t thread, Gathered& to);
  void acquire(uint32_t thread, const Past& past) { pasts_[thread] = joined(pasts_[thread], past); }
  // The same, once; what the thread does next is later.
  Past past_of(uint32_t thread);
  // Threads [first, first + count) meet, and nobody else.
  void meet(uint32_t first, uint32_t count);

  // fence.proxy.async.
  void fence(uint32_t thread) { fences_[thread].push_back(times_[thread]++); }
  // Time of the thread's first fence since, 0: none.
  uint32_t fence_since(const Event& e) const {
    const auto& all = fences_[e.agent];
    const auto found = std::lower_bound(all.begin(), all.end(), e.time);
    return found == all.end() ? 0 : *found;
  }

  bool knows(uint32_t thread, const Event& e) const {
    return e.cluster == cluster_ && (e.agent == thread || in_past(pasts_[thread], e.agent, e.time));
  }
  // The same of what is in global memory, where mbarriers order no blocks: the cluster's barriers do.
  bool knows_of_global(uint32_t thread, const Event& e) const {
    if (e.agent / block_ == thread / block_) return knows(thread, e);
    return e.cluster == cluster_ && in_past(met_, e.agent, e.time);
  }
  void meet_cluster(const Past& past) { met_ = past; }
  uint32_t cluster() const { return cluster_; }

 private:
  uint32_t cluster_ = 0, threads_ = 0, block_ = 1;  // threads: of all blocks, and of one
  Past met_;                                        // what the last barrier of the cluster has made known
  std::vector<uint32_t> times_;                     // of each agent
  std::vector<Past> pasts_;                         // of each thread
  std::vector<std::vector<uint32_t>> fences_;
  std::vector<std::string> units_;
};

// Those who do something together must all know what was before: threads [first, first + count), or who had a past.
struct Knowing {
  const Clocks* clocks;
  uint32_t first = 0, count = 1;
  Past past;
  bool global = false;  // of global memory

  bool of(const Event& e) const {
    if (past) return e.cluster == clocks->cluster() && in_past(past, e.agent, e.time);
    for (uint32_t i = first; i < first + count; ++i)
      if (!(global ? clocks->knows_of_global(i, e) : clocks->knows(i, e))) return false;
    return true;
  }
};

}  // namespace vdcore::cuda::emulator
