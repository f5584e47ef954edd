// What CUDA kernels, their launchers and the glue agree on. Torch-free.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "../accumulate.h"
#include "simt.h"

// Runs a macro for each dtype that CUDA kernels are compiled for.
#define SMD2_FOR_EACH_DTYPE(MACRO) \
  MACRO(double);                   \
  MACRO(float);                    \
  MACRO(c10::Half);                \
  MACRO(c10::BFloat16)

namespace smd2 {
namespace cuda {

// Channels that a warp processes, one for each of its threads.
constexpr int kLanes = 32;

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
