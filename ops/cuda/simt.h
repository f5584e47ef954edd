// The only place where kernels touch CUDA: NVRTC's, which has no headers, or
// the emulator of tests/cuda_emulator.
//
// Kernels may use threadIdx, blockIdx, blockDim, __syncthreads, shuffles with
// full masks outside divergent branches, and dynamic shared memory. Atomics are
// excluded because results must be the same in every run.
#pragma once

#if defined(__CUDACC_RTC__)

#define SMD2_DEVICE __device__ __forceinline__
// The block's shared memory, all of it dynamic; the launch chooses its size.
#define SMD2_SHARED(TYPE, NAME)                              \
  extern __shared__ __align__(16) unsigned char smd2_raw_[]; \
  TYPE* NAME = reinterpret_cast<TYPE*>(smd2_raw_)

using int64_t = long long;
using size_t = decltype(sizeof(0));

namespace c10 {

// PyTorch's types of 16 bits, as far as kernels need them.
struct Half {
  unsigned short bits;
  Half() = default;
  explicit SMD2_DEVICE Half(float x) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  }
  SMD2_DEVICE operator float() const {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
};

struct BFloat16 {
  unsigned short bits;
  BFloat16() = default;
  explicit SMD2_DEVICE BFloat16(float x) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#else
    const unsigned word = __float_as_uint(x);
    bits = x != x ? 0x7fc0 : (word + 0x7fff + (word >> 16 & 1)) >> 16;
#endif
  }
  SMD2_DEVICE operator float() const {
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
  }
};

}  // namespace c10

namespace smd2 {
namespace cuda {

// Reads what no thread writes while the kernel runs: such a read may pass the
// stores before it.
template <typename T>
SMD2_DEVICE T read(const T* p) {
  if constexpr (sizeof(T) == 2) {
    T value;
    value.bits = __ldg(&p->bits);
    return value;
  } else {
    return __ldg(p);
  }
}

}  // namespace cuda
}  // namespace smd2

#else

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <simt_emulator.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace smd2 {
namespace cuda {

template <typename T>
SMD2_DEVICE T read(const T* p) {
  return *p;
}

}  // namespace cuda
}  // namespace smd2

#endif
