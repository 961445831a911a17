// Patches on the CPU, in Python.
#include "cpu/core/bindings.h"

#include <array>

#include "cpu/core/bindings_call.h"
#include "cpu/core/bindings_named.h"

namespace vdcore::cpu {
namespace {

using Patch = std::array<int64_t, 3>;

struct PatchSizes {
  int64_t K, E;  // numbers of a patch, channels of a token
};

// Sets video and tokens of a call, and returns what its weights are measured by.
PatchSizes set_patches(Patches& patches, TensorView& tokens, py::handle video, const Patch& patch, bool channels_last,
                       py::handle given_tokens) {
  const TensorView& v = patches.video = strided_cpu_view(video, 5);
  for (int axis = 0; axis < 3; ++axis) {
    require(patch[axis] > 0 && v.size[2 + axis] > 0 && v.size[2 + axis] % patch[axis] == 0,
            "the video must consist of whole patches");
    patches.patch[axis] = patch[axis];
    patches.grid[axis] = v.size[2 + axis] / patch[axis];
  }
  patches.channels_last = channels_last;
  const int64_t E = cpu_view(given_tokens, 4).size[3];
  tokens = sized_view("tokens", given_tokens, {v.size[0], patches.grid[0], patches.grid[1] * patches.grid[2], E});
  require(v.size[0] > 0 && v.size[1] > 0 && E > 0, "video and tokens must not be empty");
  require(tokens.dtype == v.dtype, "tokens must have the dtype of the video");
  return {v.size[1] * patch[0] * patch[1] * patch[2], E};
}

// weight: float32 (K, E), any strides.
void patch_product(bool to_tokens, py::handle video, const Patch& patch, bool channels_last, py::handle tokens,
                   py::handle weight, py::handle bias, py::handle packed, int threads) {
  PatchProduct args;
  const auto [K, E] = set_patches(args.patches, args.tokens, video, patch, channels_last, tokens);
  const TensorView w = strided_cpu_view(weight, 2);
  require(w && w.dtype == DType::f32 && w.size[0] == K && w.size[1] == E, "weight must be float32 (K, E)");
  args.weight = {reinterpret_cast<const float*>(w.data), w.stride[0], w.stride[1]};
  args.bias = floats("bias", bias, {to_tokens ? E : K});
  args.packed = floats("packed", packed, {(E + 64) * (K + 64)});
  require(args.packed, "packed must be given");
  args.threads = worthwhile_threads(threads, 4. * elements(args.tokens));
  py::gil_scoped_release unlocked;
  if (to_tokens)
    kernels().tokens_from_patches(args);
  else
    kernels().patches_from_tokens(args);
}

void patch_weight_gradient(py::handle video, const Patch& patch, bool channels_last, py::handle tokens, int64_t parts,
                           py::handle dweight, py::handle sum_tokens, py::handle sum_patches, int threads) {
  PatchWeightGradient args;
  const auto [K, E] = set_patches(args.patches, args.tokens, video, patch, channels_last, tokens);
  require(parts > 0, "there must be a part");
  args.parts = parts;
  args.dweight = floats("dweight", dweight, {parts, K, E});
  require(args.dweight, "dweight must be given");
  args.sum_tokens = floats("sum_tokens", sum_tokens, {parts, E});
  args.sum_patches = floats("sum_patches", sum_patches, {parts, K});
  args.threads = worthwhile_threads(threads, 4. * elements(args.tokens));
  py::gil_scoped_release unlocked;
  kernels().patch_weight_gradient(args);
}

}  // namespace

void define_patchify(py::module_& m) {
  define_named(m, "patch_product", patch_product, "to_tokens", "video", "patch", "channels_last", "tokens", "weight",
               "bias", "packed", "threads");
  define_named(m, "patch_weight_gradient", patch_weight_gradient, "video", "patch", "channels_last", "tokens", "parts",
               "dweight", "sum_tokens", "sum_patches", "threads");
}

}  // namespace vdcore::cpu
