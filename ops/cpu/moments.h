// Mean and standard deviation over channels, and the normalization with them.
// Torch-free.
#pragma once

#include "simd.h"

namespace smd2 {

// Tokens that are processed together. A token's sums are chains of dependent
// additions; several tokens hide their latency, and more than fit into the
// vector registers would spill. Tuned on two cores of an AMD EPYC (AVX-512).
constexpr int kTokens = 4;

// Moments of the channels of one token.
template <typename T>
struct Moments {
  acc_t<T> mean, scale;  // scale: 1 / standard deviation
};

// Moments of S tokens that are `dim` elements apart.
template <typename T, int N, int S>
SMD2_INLINE void
moments_of(const T* y, int64_t dim, acc_t<T> eps, Moments<T>* out) {
  using Acc = acc_t<T>;
  vec<Acc, N> totals[S]{}, squares[S]{};
  for_channels<N>(dim, [&](int64_t c, int n) SMD2_LAMBDA {
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) {
      totals[s] += load_channels<T, N>(y + s * dim + c, n);
    }
  });
#pragma GCC unroll 8
  for (int s = 0; s < S; s++) {
    out[s].mean = sum<Acc, N>(totals[s]) / dim;
  }
  for_channels<N>(dim, [&](int64_t c, int n) SMD2_LAMBDA {
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) {
      auto centred = load_channels<T, N>(y + s * dim + c, n) - out[s].mean;
      for (int i = n; i < N; i++) {
        centred[i] = 0;
      }
      squares[s] += centred * centred;
    }
  });
#pragma GCC unroll 8
  for (int s = 0; s < S; s++) {
    out[s].scale = 1 / std::sqrt(sum<Acc, N>(squares[s]) / dim + eps);
  }
}

// Calls body(S, t, c, n, normal) for each group of S of the tokens first ..
// last - 1 of y, and for each block of n channels from c on, with the
// normalized values of tokens t .. t + S - 1.
template <typename T, int N, typename Body>
SMD2_INLINE void normalize(
    const T* y,
    int64_t dim,
    const acc_t<T>* weight,
    const acc_t<T>* bias,
    acc_t<T> eps,
    int64_t first,
    int64_t last,
    const Body& body) {
  using Acc = acc_t<T>;
  const auto tokens = [&](auto count, int64_t t) SMD2_LAMBDA {
    constexpr int S = decltype(count)::value;
    Moments<T> m[S];
    moments_of<T, N, S>(y + t * dim, dim, eps, m);
    for_channels<N>(dim, [&](int64_t c, int n) SMD2_LAMBDA {
      const auto w = load_channels<Acc, N>(weight + c, n);
      const auto b = load_channels<Acc, N>(bias + c, n);
      vec<Acc, N> normal[S];
      each<S>([&](int s) SMD2_LAMBDA {
        const auto value = load_channels<T, N>(y + (t + s) * dim + c, n);
        normal[s] = (value - m[s].mean) * m[s].scale * w + b;
      });
      body(count, t, c, n, normal);
    });
  };
  int64_t t = first;
  for (; t + kTokens <= last; t += kTokens) {
    tokens(std::integral_constant<int, kTokens>{}, t);
  }
  for (; t < last; t++) {
    tokens(std::integral_constant<int, 1>{}, t);
  }
}

}  // namespace smd2
