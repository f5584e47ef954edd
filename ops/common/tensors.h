// Checks and layouts that the glue of all operators shares.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "multiversion.h"

namespace smd2 {

inline at::ScalarType accumulate_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Small tensors (weights, B, C): contiguous, in the accumulation type of
// `like`.
inline at::Tensor small(const at::Tensor& x, const at::Tensor& like) {
  return x.to(accumulate_type(like)).contiguous();
}

// The dtype that kernels are compiled for which holds both tensors' values.
inline at::ScalarType kernel_type(const at::Tensor& x, const at::Tensor& y) {
  const auto type = at::promote_types(x.scalar_type(), y.scalar_type());
  return type == at::kHalf ? at::kFloat : type;
}

inline void check_shape(
    const char* op,
    const char* name,
    const at::Tensor& x,
    at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(
      x.sizes() == shape,
      op,
      ": ",
      name,
      " must be ",
      shape,
      ", got ",
      x.sizes());
}

// Runs Kernel for every image and block of channels, in parallel. `shared` has
// what all of them have in common; `scratch_size` values belong to a thread.
template <typename Kernel, typename Acc, typename Args>
void run_blocks(const Args& shared, int64_t images, int64_t scratch_size) {
  const int64_t blocks = (shared.dim + lanes() - 1) / lanes();
  at::parallel_for(0, images * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> scratch(scratch_size);
    Args args = shared;
    args.scratch = scratch.data();
    for (int64_t i = begin; i < end; i++) {
      args.image = i / blocks;
      args.block = i % blocks;
      run<Kernel>(args);
    }
  });
}

}  // namespace smd2

// Runs the code with `scalar_t` set to a dtype that kernels are compiled for.
#define SMD2_DISPATCH(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, TYPE, NAME, __VA_ARGS__)
