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

// What the gradient of a layer norm's input needs of all channels of a token:
// sums of the gradient of the normalized values, and of its product with them.
// Channels after the last one count as 0, because their gradients are.
template <typename T, int N>
struct NormGradient {
  using Acc = acc_t<T>;
  using V = vec<Acc, N>;
  V total{}, product{};
  Acc mean = 0, slope = 0;

  // Adds channels of which `grad` is the gradient of the norm's output, also to
  // the gradients of weight and bias.
  SMD2_INLINE void add(
      NormGradient* self,
      V grad,
      V normal,
      V weight,
      Acc* grad_weight,
      Acc* grad_bias,
      int n) {
    add_channels<Acc, N>(grad_weight, grad * normal, n);
    add_channels<Acc, N>(grad_bias, grad, n);
    self->total += grad * weight;
    self->product += grad * weight * normal;
  }

  // After the last channel.
  SMD2_INLINE void finish(NormGradient* self, int64_t dim) {
    self->mean = sum<Acc, N>(self->total) / dim;
    self->slope = sum<Acc, N>(self->product) / dim;
  }

  // Gradient of the input's channels, given that of the normalized values.
  SMD2_INLINE V
  of_input(const NormGradient& self, V grad, V normal, const Moments<T>& m) {
    return m.scale * (grad - self.mean - normal * self.slope);
  }
};

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
