#include "common/visible_frames.h"

namespace vdcore {

VisibleTables::VisibleTables(const FrameMask& mask, int64_t queries, int64_t keys, int64_t start,
                             const int64_t* lengths, int64_t batch)
    : per_sample(lengths != nullptr), dense(mask.full() && !mask.clean && !lengths), twice(mask.clean > 0) {
  if (dense) return;
  const int64_t samples = per_sample ? batch : 1;
  for (std::vector<int32_t>* table : {&begin, &end, &low_begin, &low_end}) table->resize(samples * queries);
  for (std::vector<int32_t>* table : {&seen_begin, &seen_end, &also_begin, &also_end}) table->resize(samples * keys);
  for (int64_t b = 0; b < samples; ++b) {
    const int64_t valid = lengths ? smaller(larger(lengths[b], 0), keys) : keys;
    const int64_t alive = lengths ? smaller(larger(lengths[b] - start, 0), queries) : queries;
    for (int64_t t = 0; t < queries; ++t) {
      Run low, window;
      if (t < alive) mask.visible(start + t, valid, low, window);
      const int64_t i = b * queries + t;
      begin[i] = static_cast<int32_t>(window.begin);
      end[i] = static_cast<int32_t>(window.end);
      low_begin[i] = static_cast<int32_t>(low.begin);
      low_end[i] = static_cast<int32_t>(low.end);
    }
    for (int64_t k = 0; k < keys; ++k) {
      const Run seen = k < valid ? intersect(mask.seen_by(k, start, queries), {0, alive}) : Run{};
      const Run also = k < valid ? intersect(mask.also_seen_by(k, start, queries), {0, alive}) : Run{};
      const int64_t i = b * keys + k;
      seen_begin[i] = static_cast<int32_t>(seen.begin);
      seen_end[i] = static_cast<int32_t>(larger(seen.begin, seen.end));
      also_begin[i] = static_cast<int32_t>(also.begin);
      also_end[i] = static_cast<int32_t>(larger(also.begin, also.end));
    }
  }
}

}  // namespace vdcore
