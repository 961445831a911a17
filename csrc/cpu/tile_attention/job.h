// Boxes of queries, one after another, on threads.
#pragma once

#include "common/threads.h"
#include "cpu/tile_attention/boxes.h"

namespace vdcore::cpu::VDCORE_ISA {

// Calls a Walk for every box of queries: Walk(arguments, arena).run(box, its shape or null).
template <typename Walk>
struct QueryBoxesJob {
  const TileAttention& a;
  Boxes boxes;

  void run(int64_t i) const {
    const Box box = boxes.at(i);
    Arena count(nullptr);
    Walk(a, count);
    Arena arena(scratch(count.used()));
    Walk(a, arena).run(box, box.group ? &boxes.shape(box) : nullptr);
  }

  static void run_all(const TileAttention& a) {
    Shape* shapes = new Shape[larger(a.plan->group_count, 1)];
    QueryBoxesJob job{a, {*a.plan, kQueries, a.segment[0].q.size[3], 1, shapes}};
    parallel_for(
        job.boxes.items(), a.threads, [](void* p, int64_t i) { static_cast<const QueryBoxesJob*>(p)->run(i); }, &job);
    delete[] shapes;
  }
};

}  // namespace vdcore::cpu::VDCORE_ISA
