// Tables of what every frame sees and is seen by, made once per call from FrameMask and lengths.
#pragma once

#include <vector>

#include "common/frame_runs.h"

namespace vdcore {

struct VisibleTables {
  std::vector<int32_t> begin, end, low_begin, low_end;              // (samples, queries)
  std::vector<int32_t> seen_begin, seen_end, also_begin, also_end;  // (samples, keys); the last two with `twice`
  bool per_sample = false, dense = false;
  bool twice = false;  // some key frame is seen by two runs of query frames

  // `lengths`: valid frames of each of `batch` samples, or null.
  VisibleTables(const FrameMask& mask, int64_t queries, int64_t keys, int64_t start, const int64_t* lengths,
                int64_t batch);
};

}  // namespace vdcore
