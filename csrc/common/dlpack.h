// The parts of the DLPack 0.x C structures (github.com/dmlc/dlpack) that a consumer needs. They are a stable exchange
// format between array libraries, so the native module is built against no version of torch.
#pragma once

#include <cstdint>

namespace vdcore::dlpack {

struct Device {
  int32_t type;  // 1 CPU, 2 CUDA, 3 pinned host
  int32_t id;
};
struct DataType {
  uint8_t code;  // 0 int, 1 uint, 2 float, 4 bfloat
  uint8_t bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // null: contiguous
  uint64_t byte_offset;
};
struct ManagedTensor {
  Tensor tensor;
  void* manager;
  void (*deleter)(ManagedTensor*);
};

}  // namespace vdcore::dlpack
