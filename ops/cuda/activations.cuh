// SiLU, as kernels compute it.
#pragma once

#include "device.cuh"

namespace smd2 {
namespace cuda {

template <typename Acc>
SMD2_DEVICE Acc sigmoid(Acc x) {
  return Acc(1) / (Acc(1) + exp_(-x));
}

template <typename Acc>
SMD2_DEVICE Acc silu(Acc x) {
  return x * sigmoid(x);
}

template <typename Acc>
SMD2_DEVICE Acc silu_slope(Acc x) {
  const Acc s = sigmoid(x);
  return s * (Acc(1) + x * (Acc(1) - s));
}

}  // namespace cuda
}  // namespace smd2
