// What CUDA kernels, their launchers and the glue agree on. Torch-free.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "simt.h"

namespace smd2 {
namespace cuda {

// Channels of a warp.
constexpr int kLanes = 32;

// The type that sums and states have: float, but double for double.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulate<T>::type;

SMD2_HOST_DEVICE int64_t smaller(int64_t x, int64_t y) {
  return x < y ? x : y;
}
SMD2_HOST_DEVICE int64_t larger(int64_t x, int64_t y) {
  return x > y ? x : y;
}
SMD2_HOST_DEVICE int64_t blocks_of(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

}  // namespace cuda
}  // namespace smd2
