// Mean and deviation over channels. Torch-free.
#pragma once

#include "simd.h"

namespace smd2 {

// Of the channels of one token, as layer norms use them.
template <typename T>
struct Moments {
  acc_t<T> mean, scale;  // scale: 1 / deviation

  template <int N>
  SMD2_INLINE Moments of(const T* y, int64_t dim, acc_t<T> eps) {
    using Acc = acc_t<T>;
    vec<Acc, N> total{}, squares{};
    for_channels<N>(dim, [&](int64_t c, int n) SMD2_LAMBDA {
      total += load_channels<T, N>(y + c, n);
    });
    const Acc mean = sum<Acc, N>(total) / dim;
    for_channels<N>(dim, [&](int64_t c, int n) SMD2_LAMBDA {
      auto centred = load_channels<T, N>(y + c, n) - mean;
      for (int i = n; i < N; i++) {
        centred[i] = 0;
      }
      squares += centred * centred;
    });
    return {mean, 1 / std::sqrt(sum<Acc, N>(squares) / dim + eps)};
  }
};

// Channels c to c + n of a token, normalised.
template <typename T, int N>
SMD2_INLINE vec<acc_t<T>, N> normalized(
    const T* y,
    const Moments<T>& m,
    const acc_t<T>* weight,
    const acc_t<T>* bias,
    int64_t c,
    int n) {
  using Acc = acc_t<T>;
  const auto normal = (load_channels<T, N>(y + c, n) - m.mean) * m.scale;
  return normal * load_channels<Acc, N>(weight + c, n) +
         load_channels<Acc, N>(bias + c, n);
}

}  // namespace smd2
