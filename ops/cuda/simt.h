// The only place where kernels and launchers touch CUDA: the real one under
// nvcc, the emulator of tests/cuda_emulator if SMD2_EMULATED is defined. The
// glue is compiled by a plain C++ compiler and sees types only. Torch-free.
//
// Kernels may use threadIdx, blockIdx, blockDim, __syncthreads, shuffles with
// full masks outside divergent branches, and dynamic shared memory. Atomics are
// excluded because results must be the same in every run.
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
// The block's shared memory, all of it dynamic; the launcher chooses its size.
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

// Number of multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "no current device");
  check_cuda(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
      "cannot query the device's number of multiprocessors");
  return count;
}

// Starts `blocks` blocks of 32 x `warps` threads, asynchronously. `name` is for
// error messages.
template <typename Args>
void launch(
    const char* name,
    void (*kernel)(Args),
    int64_t blocks,
    int warps,
    size_t shared_bytes,
    cudaStream_t stream,
    const Args& args) {
  constexpr size_t kWithoutOptIn = 48 * 1024;  // shared bytes of any launch
  constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;
  if (blocks < 1 || blocks > kMaxBlocks) {
    throw std::runtime_error(
        std::string("spatial_mamba: ") + name +
        ": the number of blocks must be 1 to 2^31 - 1, got " +
        std::to_string(blocks));
  }
  if (shared_bytes > kWithoutOptIn) {
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
