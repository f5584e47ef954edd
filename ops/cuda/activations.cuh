// SiLU and ReLU, as kernels compute them.
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

// Not a number stays so.
template <typename Acc>
SMD2_DEVICE Acc relu(Acc x) {
  return x < Acc(0) ? Acc(0) : x;
}

}  // namespace cuda
}  // namespace smd2
