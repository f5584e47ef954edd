// Step sizes of the scan's kernels.
#pragma once

#include "../cuda/channels.cuh"
#include "cuda.h"

namespace smd2 {
namespace cuda {

// Where the step sizes come from: memory, [images, tokens, dim] ... `first` is
// the number of token 0 among those of all images.
template <typename T>
struct StoredSteps {
  using Args = ScanArgs<T>;
  const T* delta;
  int stride;

  SMD2_DEVICE StoredSteps(const Args& a, int64_t first, int channel, bool)
      : delta(a.delta + first * a.dim + channel),
        stride(static_cast<int>(a.dim)) {}
  SMD2_DEVICE acc_t<T> operator()(int t, bool valid) const {
    return load_constant(delta + t * stride, valid);
  }
};

// ... or a product of low rank, in whose place `delta` is the first factor,
// [images, tokens, rank]. The rank is a multiple of 4.
template <typename T>
struct LowRankArgs : ScanArgs<T> {
  const acc_t<T>* dt_weight;  // [rank, dim]
  int64_t rank;
};

template <typename T>
struct LowRankSteps {
  using Args = LowRankArgs<T>;
  using Acc = acc_t<T>;
  static constexpr int kHeld = 4;  // weights in registers, all of a narrow map
  const T* dt;
  const Acc* weight;
  Acc held[kHeld];
  int dim;
  int rank;

  SMD2_DEVICE
  LowRankSteps(const Args& a, int64_t first, int channel, bool valid)
      : dt(a.delta + first * a.rank),
        weight(a.dt_weight + channel),
        dim(static_cast<int>(a.dim)),
        rank(static_cast<int>(a.rank)) {
#pragma unroll
    for (int r = 0; r < kHeld; r++) {
      held[r] = load(weight + r * dim, valid);
    }
  }
  SMD2_DEVICE Acc operator()(int t, bool valid) const {
    const Channels<kHeld, true> factors(0, 1, kHeld);
    const T* token = dt + t * rank;
    Acc values[kHeld], step = 0;
    factors.load(token, true, values);
#pragma unroll
    for (int r = 0; r < kHeld; r++) {
      step += held[r] * values[r];
    }
#pragma unroll 1
    for (int first = kHeld; first < rank; first += kHeld) {
      factors.load(token + first, true, values);
#pragma unroll
      for (int r = 0; r < kHeld; r++) {
        step += load(weight + (first + r) * dim, valid) * values[r];
      }
    }
    return step;
  }
};

}  // namespace cuda
}  // namespace smd2
