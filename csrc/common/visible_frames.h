// Tables of what every frame sees and is seen by, made once per call from FrameMask and lengths.
#pragma once

#include <vector>

#include "common/frame_runs.h"

namespace vdcore {

struct VisibleTables {
  std::vector<int32_t> begin, end, sink;      // (samples, queries)
  std::vector<int32_t> seen_begin, seen_end;  // (samples, keys)
  bool per_sample = false, dense = false;

  // `lengths`: valid frames of each of `batch` samples, or null.
  VisibleTables(const FrameMask& mask, int64_t queries, int64_t keys, int64_t start, const int64_t* lengths,
                int64_t batch);
};

}  // namespace vdcore
