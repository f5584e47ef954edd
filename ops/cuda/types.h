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

SMD2_DEVICE int64_t smaller(int64_t x, int64_t y) {
  return x < y ? x : y;
}
SMD2_DEVICE int64_t larger(int64_t x, int64_t y) {
  return x > y ? x : y;
}
SMD2_DEVICE int64_t blocks_of(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

}  // namespace cuda
}  // namespace smd2
