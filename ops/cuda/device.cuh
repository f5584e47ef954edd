// Arithmetic and memory access that all kernels share. In the scan and the
// fusion, a warp processes 32 channels of one token, one in each lane. Lanes
// exit early only in kernels without barriers and shuffles.
#pragma once

#include "types.h"

namespace smd2 {
namespace cuda {

// The minimum of resident blocks per multiprocessor that __launch_bounds__ asks
// for: it limits the registers of a thread. More blocks hide more latency,
// until registers spill; tests/profiling/test_kernel_resources.py reads the
// compiler's report and allows no spills. The values were not tuned on a GPU.
template <typename Acc>
constexpr int min_blocks(int of_float, int of_double) {
  return sizeof(Acc) == sizeof(float) ? of_float : of_double;
}

SMD2_DEVICE float exp_(float x) {
  return expf(x);
}
SMD2_DEVICE double exp_(double x) {
  return exp(x);
}
SMD2_DEVICE float log1p_(float x) {
  return log1pf(x);
}
SMD2_DEVICE double log1p_(double x) {
  return log1p(x);
}
SMD2_DEVICE float erf_(float x) {
  return erff(x);
}
SMD2_DEVICE double erf_(double x) {
  return erf(x);
}
SMD2_DEVICE float sqrt_(float x) {
  return sqrtf(x);
}
SMD2_DEVICE double sqrt_(double x) {
  return sqrt(x);
}

// softplus(x), the identity above 20.
template <typename Acc>
SMD2_DEVICE Acc softplus(Acc x) {
  const Acc y = log1p_(exp_(x > Acc(20) ? Acc(20) : x));
  return x > Acc(20) ? x : y;
}

// The same, with its derivative.
template <typename Acc>
SMD2_DEVICE Acc softplus(Acc x, Acc* slope) {
  const Acc e = exp_(x > Acc(20) ? Acc(20) : x);
  const Acc y = log1p_(e);
  *slope = x > Acc(20) ? Acc(1) : e / (e + Acc(1));
  return x > Acc(20) ? x : y;
}

// Lanes beyond the last channel, which are not valid, read 0 and write nothing.
template <typename T>
SMD2_DEVICE acc_t<T> load(const T* p, bool valid) {
  return valid ? static_cast<acc_t<T>>(*p) : acc_t<T>(0);
}
// The same of what no thread writes while the kernel runs.
template <typename T>
SMD2_DEVICE acc_t<T> load_constant(const T* p, bool valid) {
  return valid ? static_cast<acc_t<T>>(read(p)) : acc_t<T>(0);
}
template <typename T>
SMD2_DEVICE void store(T* p, acc_t<T> value, bool valid) {
  if (valid) {
    *p = static_cast<T>(value);
  }
}

// The sum over the lanes of a warp, returned in every lane.
template <typename Acc>
SMD2_DEVICE Acc warp_sum(Acc value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

// Sums `count` values of each lane over the warps of a block; warp 0 gets the
// sums. `scratch` has warps x count x 32 values, and can be used for something
// else after the next __syncthreads.
template <int count, typename Acc>
SMD2_DEVICE void block_sum(Acc (&values)[count], Acc* scratch) {
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
#pragma unroll
  for (int k = 0; k < count; k++) {
    scratch[(warp * count + k) * kLanes + lane] = values[k];
  }
  __syncthreads();
  if (warp == 0) {
#pragma unroll
    for (int k = 0; k < count; k++) {
      for (int other = 1; other < warps; other++) {
        values[k] += scratch[(other * count + k) * kLanes + lane];
      }
    }
  }
}

}  // namespace cuda
}  // namespace smd2
