#include "emulator/clocks.h"

#include <utility>

namespace vdcore::cuda::emulator {

Past joined(const Past& a, const Past& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  // The lanes of a warp ask for the same, one after another.
  thread_local Past last_a, last_b, last;
  if (last_a == a && last_b == b) return last;
  std::vector<uint32_t> times(std::max(a->size(), b->size()));
  bool is_a = a->size() == times.size(), is_b = b->size() == times.size();
  for (size_t i = 0; i < times.size(); ++i) {
    const uint32_t of_a = i < a->size() ? (*a)[i] : 0, of_b = i < b->size() ? (*b)[i] : 0;
    times[i] = std::max(of_a, of_b);
    is_a &= of_a >= of_b;
    is_b &= of_b >= of_a;
  }
  last_a = a, last_b = b;
  last = is_a ? a : is_b ? b : std::make_shared<const std::vector<uint32_t>>(std::move(times));
  return last;
}

void Gathered::add(const Past& past) {
  if (!past || past == last_) return;
  last_ = past;
  if (times_.size() < past->size()) times_.resize(past->size());
  for (size_t i = 0; i < past->size(); ++i) times_[i] = std::max(times_[i], (*past)[i]);
}

void Gathered::add(uint32_t agent, uint32_t time) {
  if (times_.size() <= agent) times_.resize(agent + 1);
  times_[agent] = std::max(times_[agent], time);
}

Past Gathered::take() {
  last_.reset();
  return std::make_shared<const std::vector<uint32_t>>(std::exchange(times_, {}));
}

void Clocks::begin(uint32_t cluster, uint32_t blocks, uint32_t threads) {
  cluster_ = cluster, threads_ = blocks * threads, block_ = threads;
  met_.reset();
  times_.assign(threads_, 1);
  pasts_.assign(threads_, nullptr);
  fences_.assign(threads_, {});
  units_.clear();
}

uint32_t Clocks::add_unit(const std::string& name) {
  units_.push_back(name);
  times_.push_back(1);
  return static_cast<uint32_t>(times_.size()) - 1;
}

void Clocks::release(uint32_t thread, Gathered& to) {
  to.add(pasts_[thread]);
  to.add(thread, times_[thread]++);
}

Past Clocks::past_of(uint32_t thread) {
  Gathered all;
  release(thread, all);
  return all.take();
}

void Clocks::meet(uint32_t first, uint32_t count) {
  Gathered all;
  for (uint32_t i = first; i < first + count; ++i) release(i, all);
  const Past past = all.take();
  for (uint32_t i = first; i < first + count; ++i) pasts_[i] = past;
}

}  // namespace vdcore::cuda::emulator
