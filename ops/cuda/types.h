// What all CUDA kernels agree on. An argument of a kernel is one struct whose
// members take 8 bytes each: pointers, int64_t and double; the launch code
// in cuda.py passes the same list of members.
#pragma once

#include "../accumulate.h"
#include "simt.h"

namespace smd2 {
namespace cuda {

// Threads of a warp; in the scan and the fusion, also the channels that it
// processes.
constexpr int kLanes = 32;

template <typename Integer>
SMD2_DEVICE Integer smaller(Integer x, Integer y) {
  return x < y ? x : y;
}
template <typename Integer>
SMD2_DEVICE Integer larger(Integer x, Integer y) {
  return x > y ? x : y;
}
// The number of blocks of `size` that hold `count`.
template <typename Integer>
SMD2_DEVICE Integer blocks_of(Integer count, Integer size) {
  return (count + size - 1) / size;
}

}  // namespace cuda
}  // namespace smd2
