// What the glue of all CUDA operators shares: checks, conversions, the stream.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <vector>

#include "types.h"

#if defined(SMD2_EMULATED)
// Tests run the same launchers over CPU tensors, under a name of their own.
#define SMD2_CUDA_IMPL(M) TORCH_LIBRARY_IMPL(spatial_mamba_emulated, CPU, M)
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define SMD2_CUDA_IMPL(M) TORCH_LIBRARY_IMPL(spatial_mamba, CUDA, M)
#endif

// Runs the code with `scalar_t` set to a dtype that kernels are compiled for.
#define SMD2_CUDA_DISPATCH(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(          \
      at::kHalf, at::kBFloat16, TYPE, NAME, __VA_ARGS__)

namespace smd2 {
namespace cuda {

// Makes the tensor's device the current one, and knows its current stream.
#if defined(SMD2_EMULATED)
struct OnDeviceOf {
  explicit OnDeviceOf(const at::Tensor&) {}
  cudaStream_t stream() const {
    return nullptr;
  }
};
#else
struct OnDeviceOf {
  c10::cuda::CUDAGuard guard;

  explicit OnDeviceOf(const at::Tensor& x) : guard(checked(x)) {}
  cudaStream_t stream() const {
    return c10::cuda::getCurrentCUDAStream();
  }
  // The dispatcher comes here if any argument is on a CUDA device.
  static c10::Device checked(const at::Tensor& x) {
    TORCH_CHECK_VALUE(
        x.is_cuda(),
        "spatial_mamba: all arguments must be on one CUDA device, got one on ",
        x.device());
    return x.device();
  }
};
#endif

struct Argument {
  const char* name;
  const at::Tensor& value;
  at::IntArrayRef shape;
};

inline void check_arguments(
    const char* op,
    const at::Tensor& like,
    const std::vector<Argument>& arguments) {
  for (const auto& [name, value, shape] : arguments) {
    TORCH_CHECK_VALUE(
        value.sizes() == shape,
        op,
        ": ",
        name,
        " must be ",
        shape,
        ", got ",
        value.sizes());
    TORCH_CHECK_VALUE(
        value.device() == like.device(),
        op,
        ": ",
        name,
        " must be on ",
        like.device(),
        ", got ",
        value.device());
  }
}

inline at::ScalarType accumulate_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

inline at::Tensor as(const at::Tensor& x, at::ScalarType type) {
  return x.to(type).contiguous();
}

}  // namespace cuda
}  // namespace smd2
