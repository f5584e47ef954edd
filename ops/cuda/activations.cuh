// SiLU, ReLU and GELU, as kernels compute them.
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

// GELU by the error function, with its derivative.
template <typename Acc>
SMD2_DEVICE Acc gelu(Acc x, Acc* slope) {
  const Acc root_half = Acc(0.70710678118654752440);
  const Acc height = Acc(0.39894228040143267794);  // 1 / sqrt(2 pi)
  const Acc below = Acc(0.5) * (Acc(1) + erf_(root_half * x));
  *slope = below + x * (height * exp_(Acc(-0.5) * x * x));
  return x * below;
}

}  // namespace cuda
}  // namespace smd2
