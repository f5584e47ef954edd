// What the glue of all CUDA operators shares: registration, dtypes, the stream.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include "../arguments.h"
#include "types.h"

#if defined(SMD2_EMULATED)
// Tests run the same launchers on CPU tensors, in a namespace of their own.
#define SMD2_CUDA_IMPL(M) TORCH_LIBRARY_IMPL(spatial_mamba_emulated, CPU, M)
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define SMD2_CUDA_IMPL(M) TORCH_LIBRARY_IMPL(spatial_mamba, CUDA, M)
#endif

// Runs the code with `scalar_t` set to the C++ type of TYPE, one of the dtypes
// of SMD2_FOR_EACH_DTYPE.
#define SMD2_CUDA_DISPATCH(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(          \
      at::kHalf, at::kBFloat16, TYPE, NAME, __VA_ARGS__)

namespace smd2 {
namespace cuda {

// Makes the tensor's device the current one for its lifetime, and gives access
// to the device's current stream.
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
  // The dispatcher calls a CUDA kernel if any argument is on a CUDA device.
  static c10::Device checked(const at::Tensor& x) {
    TORCH_CHECK_VALUE(
        x.is_cuda(),
        "spatial_mamba: all arguments must be on one CUDA device, got one on ",
        x.device());
    return x.device();
  }
};
#endif

}  // namespace cuda
}  // namespace smd2
