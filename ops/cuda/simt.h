// The one gate to CUDA of kernels and launchers: the real one under nvcc, the
// emulator of tests/cuda_emulator where SMD2_EMULATED is defined. The glue,
// compiled by neither, sees types only. Torch-free.
//
// Kernels may use threadIdx, blockIdx, blockDim, __syncthreads, shuffles with
// full masks outside divergent branches, and dynamic shared memory. No atomics:
// results are the same run to run.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define SMD2_DEVICE __device__ __forceinline__
#define SMD2_HOST_DEVICE __host__ __device__ __forceinline__
// The block's shared memory: all of it is dynamic, and sized by the launcher.
#define SMD2_SHARED(TYPE, NAME)                              \
  extern __shared__ __align__(16) unsigned char smd2_raw_[]; \
  TYPE* NAME = reinterpret_cast<TYPE*>(smd2_raw_)

namespace smd2 {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(
        std::string("spatial_mamba: ") + what + ": " +
        cudaGetErrorString(error));
  }
}

// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "no current device");
  check_cuda(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
      "cannot ask the device for its multiprocessors");
  return count;
}

// Starts `blocks` blocks of 32 x `warps` threads; nothing waits for them.
template <typename Args>
void launch(
    const char* name,
    void (*kernel)(Args),
    int64_t blocks,
    int warps,
    size_t shared_bytes,
    cudaStream_t stream,
    const Args& args) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;
  if (blocks < 1 || blocks > kMaxBlocks) {
    throw std::runtime_error(
        std::string("spatial_mamba: ") + name + ": between 1 and 2^31 - 1 " +
        "blocks can be launched, got " + std::to_string(blocks));
  }
  if (shared_bytes > kWithoutAsking) {
    check_cuda(
        cudaFuncSetAttribute(
            reinterpret_cast<const void*>(kernel),
            cudaFuncAttributeMaxDynamicSharedMemorySize,
            static_cast<int>(shared_bytes)),
        name);
  }
  kernel<<<
      dim3(static_cast<unsigned>(blocks)),
      dim3(32, static_cast<unsigned>(warps)),
      shared_bytes,
      stream>>>(args);
  check_cuda(cudaGetLastError(), name);
}

}  // namespace smd2

#elif defined(SMD2_EMULATED)

#include "simt_emulator.h"

#else

#include <cuda_runtime_api.h>

#define SMD2_HOST_DEVICE inline

#endif
