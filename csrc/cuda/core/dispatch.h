// From what is known when a kernel is called to what is known when it is compiled.
#pragma once

#include <type_traits>

#include "cuda/core/launch.h"
#include "cuda/core/ptx.h"

namespace vdcore::cuda {

template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;

// f(E{}) for the dtype's element E.
template <typename F>
void with_element(const Where& where, DType dtype, F f) {
  if (dtype == DType::bf16) return f(bf16{});
  if (dtype == DType::f16) return f(f16{});
  launch_error(where, "float16 or bfloat16 was expected");
}

// f(C), an integral_constant: the first of these numbers of chunks of 32 channels that hold D channels.
template <int C, int... kMore, typename F>
void with_chunks(const Where& where, int D, F f) {
  if (D <= 32 * C) return f(std::integral_constant<int, C>{});
  if constexpr (sizeof...(kMore) > 0) return with_chunks<kMore...>(where, D, f);
  launch_error(where, "at most " + std::to_string(32 * C) + " channels a head were expected");
}

}  // namespace vdcore::cuda
