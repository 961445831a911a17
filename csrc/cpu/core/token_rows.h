// Rows of channels, one after another, for operators that read and write every token once.
#pragma once

#include "cpu/core/arguments.h"
#include "cpu/core/vec.h"

namespace vdcore::cpu::VDCORE_ISA {

constexpr int64_t kRowsOfOneSum = 64;  // then on to the part's sum: shorter chains of additions

// A row as float32 in whole vectors, 0 past its end: where it lies, if it is that already, else converted into buffer.
template <DType T>
VDCORE_INLINE const float* row_floats(const char* row, int64_t n, float* buffer) {
  if (T == DType::f32 && n % W == 0) return reinterpret_cast<const float*>(row);
  read_row<T>(row, n, buffer);
  return buffer;
}

// W channels of a row from c on, 0 past its end, for rows that are read once.
template <DType T>
VDCORE_INLINE vf row_vector(const char* row, int64_t n, int64_t c) {
  const auto* p = reinterpret_cast<const typename Element<T>::type*>(row) + c;
  return n - c >= W ? Element<T>::load(p) : load_partial<T>(p, n - c);
}

// Writes value(c) for the channels c, c + W, ... ; two vectors at a time, which two bytes an element pack into one.
template <DType T, typename Value>
VDCORE_INLINE void write_values(char* row, int64_t n, bool stream, const Value& value) {
  auto* p = reinterpret_cast<typename Element<T>::type*>(row);
  int64_t c = 0;
  if (stream) {
    if (reinterpret_cast<uintptr_t>(p) % (2 * W * size_of(T)) == 0)
      for (; c + 2 * W <= n; c += 2 * W) Element<T>::stream(p + c, value(c), value(c + W));
    for (; c < n; c += W) Element<T>::stream(p + c, value(c));
    return;
  }
  for (; c + 2 * W <= n; c += 2 * W) Element<T>::store(p + c, value(c), value(c + W));
  for (; c + W <= n; c += W) Element<T>::store(p + c, value(c));
  if (c < n) store_partial<T>(p + c, value(c), n - c);
}

// Sum of term(c) over whole vectors; four chains hide the latency of additions.
template <typename Term>
VDCORE_INLINE vf sum_terms(int64_t n, const Term& term) {
  vf total[4] = {};
  int64_t c = 0;
  for (; c + 4 * W <= n; c += 4 * W)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) total[i] += term(c + i * W);
  for (; c < n; c += W) total[0] += term(c);
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// A row per sample, frame or token, as padded float32: converted again only where it is another one.
class SharedRow {
 public:
  SharedRow(const TensorView& x, float* buffer) : x_(x), buffer_(buffer) {}

  // True where the row is not the last one.
  VDCORE_INLINE bool move(int64_t b, int64_t t, int64_t s) {
    const char* at = x_.at(b, t, s);
    if (at == at_) return false;
    at_ = at;
    with_dtype(x_.dtype, [&](auto type) { read_row<decltype(type)::value>(at, x_.size[3], buffer_); });
    return true;
  }
  VDCORE_INLINE vf operator[](int64_t c) const { return load(buffer_ + c); }

 private:
  const TensorView& x_;
  float* buffer_;
  const char* at_ = nullptr;
};

// Sums over the rows of one part of a group.
class PartSum {
 public:
  PartSum(float* out, int64_t item, int64_t channels, float* buffer)
      : out_(out ? out + item * channels : nullptr), channels_(channels), buffer_(out ? buffer : nullptr) {
    if (!out) return;
    memset(out_, 0, channels * sizeof(float));
    memset(buffer_, 0, round_up(channels) * sizeof(float));
  }
  VDCORE_INLINE explicit operator bool() const { return buffer_ != nullptr; }
  // Adds a row: value(c) for the channels c, c + W, ...
  template <typename Value>
  VDCORE_INLINE void add(const Value& value) const {
    float* const buffer = buffer_;
    if (!buffer) return;
    for (int64_t c = 0; c < channels_; c += W) store(buffer + c, load(buffer + c) + value(c));
  }
  void flush() const {
    if (!buffer_) return;
    for (int64_t c = 0; c < channels_; ++c) out_[c] += buffer_[c];
    memset(buffer_, 0, round_up(channels_) * sizeof(float));
  }

 private:
  float* out_;
  int64_t channels_;
  float* buffer_;
};

// Work cut into parts of groups: item = group * parts + part.
struct Parts {
  int64_t T, S, parts;
  bool per_frame;
  int64_t groups, rows;  // rows of a group

  Parts(const TensorView& x, const GroupSums& sums)
      : T(x.size[1]),
        S(x.size[2]),
        parts(sums.parts),
        per_frame(sums.per_frame),
        groups(x.size[0] * (per_frame ? T : 1)),
        rows(per_frame ? S : T * S) {}

  int64_t items() const { return groups * parts; }

  // Calls body(b, t, s) for every token of an item, and flush() now and then and at the end.
  template <typename Body, typename Flush>
  VDCORE_INLINE void for_rows(int64_t item, const Body& body, const Flush& flush) const {
    const int64_t group = item / parts, part = item % parts;
    const int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
    int64_t b = per_frame ? group / T : group, t = per_frame ? group % T : first / S, s = per_frame ? first : first % S;
    for (int64_t i = first; i < last; ++i) {
      body(b, t, s);
      if ((i - first) % kRowsOfOneSum == kRowsOfOneSum - 1) flush();
      if (++s == S) {
        s = 0;
        ++t;
      }
    }
    flush();
  }
};

}  // namespace vdcore::cpu::VDCORE_ISA
