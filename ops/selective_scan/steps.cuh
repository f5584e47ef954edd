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
  static constexpr int kTokens = 1;  // that `together` computes
  const T* delta;
  int stride;

  SMD2_DEVICE StoredSteps(const Args& a, int64_t first, int channel, bool)
      : delta(a.delta + first * a.dim + channel),
        stride(static_cast<int>(a.dim)) {}
  SMD2_DEVICE acc_t<T> operator()(int t, bool valid) const {
    return load_constant(delta + t * stride, valid);
  }
  SMD2_DEVICE void together(
      const int (&tokens)[kTokens],
      bool valid,
      acc_t<T> (&steps)[kTokens]) const {
    steps[0] = (*this)(tokens[0], valid);
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
  static constexpr int kTokens = 4;  // that share what is read of the weight
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
    read_weights(0, valid, held);
  }
  SMD2_DEVICE Acc operator()(int t, bool valid) const {
    const int tokens[1] = {t};
    Acc steps[1];
    together(tokens, valid, steps);
    return steps[0];
  }
  template <int count>
  SMD2_DEVICE void
  together(const int (&tokens)[count], bool valid, Acc (&steps)[count]) const {
#pragma unroll
    for (int j = 0; j < count; j++) {
      steps[j] = product(tokens[j], 0, held);
    }
#pragma unroll 1
    for (int first = kHeld; first < rank; first += kHeld) {
      Acc weights[kHeld];
      read_weights(first, valid, weights);
#pragma unroll
      for (int j = 0; j < count; j++) {
        steps[j] += product(tokens[j], first, weights);
      }
    }
  }

 private:
  SMD2_DEVICE void read_weights(int first, bool valid, Acc (&weights)[kHeld])
      const {
#pragma unroll
    for (int r = 0; r < kHeld; r++) {
      weights[r] = load(weight + (first + r) * dim, valid);
    }
  }
  SMD2_DEVICE Acc product(int t, int first, const Acc (&weights)[kHeld]) const {
    const Channels<kHeld, true> factors(0, 1, kHeld);
    Acc values[kHeld], sum = 0;
    factors.load(dt + t * rank + first, true, values);
#pragma unroll
    for (int r = 0; r < kHeld; r++) {
      sum += weights[r] * values[r];
    }
    return sum;
  }
};

}  // namespace cuda
}  // namespace smd2
