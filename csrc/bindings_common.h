// Tensors as the native modules take them: DLPack capsules.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "common/dlpack.h"
#include "common/frame_runs.h"

namespace vdcore {

namespace py = pybind11;

inline const dlpack::Tensor& tensor_of(py::handle capsule) {
  auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (!managed) throw py::error_already_set();
  return managed->tensor;
}

// Strides as they are; an empty view for None.
inline TensorView strided_view(py::handle capsule, int rank) {
  TensorView v;
  if (capsule.is_none()) return v;
  const dlpack::Tensor& t = tensor_of(capsule);
  if (t.ndim != rank) throw py::value_error("a tensor of " + std::to_string(rank) + " dimensions was expected");
  if (t.dtype.code == 2 && t.dtype.bits == 32)
    v.dtype = DType::f32;
  else if (t.dtype.code == 2 && t.dtype.bits == 16)
    v.dtype = DType::f16;
  else if (t.dtype.code == 4 && t.dtype.bits == 16)
    v.dtype = DType::bf16;
  else
    throw py::type_error("float32, float16 or bfloat16 was expected");
  v.data = static_cast<char*>(t.data) + t.byte_offset;
  v.ndim = rank;
  int64_t dense = 1;
  for (int axis = rank - 1; axis >= 0; --axis) {
    v.size[axis] = t.shape[axis];
    v.stride[axis] = t.strides ? t.strides[axis] : dense;
    dense *= t.shape[axis];
  }
  return v;
}

// (past, future, chunk, sink, clean, *shots). The mask looks at these numbers: they must outlive it.
inline FrameMask mask_of(const std::vector<int64_t>& numbers) {
  FrameMask mask{{numbers[0], numbers[1], numbers[2], numbers[3]}, numbers[4]};
  mask.shots = numbers.data() + 5;
  mask.shot_count = static_cast<int64_t>(numbers.size()) - 5;
  return mask;
}

}  // namespace vdcore
