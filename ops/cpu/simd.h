// Vectors over channels, in plain C++ with the vector extensions of GCC and
// Clang. Every function here is inlined into kernels that are compiled once for
// each instruction set (see multiversion.h), so no intrinsics are needed.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../accumulate.h"

#define SMD2_INLINE static inline __attribute__((always_inline))
#define SMD2_LAMBDA __attribute__((always_inline))

namespace smd2 {

// N values of type T, one per channel.
template <typename T, int N>
struct VectorOf {
  typedef T type
      __attribute__((vector_size(N * sizeof(T)), aligned(sizeof(T))));
};
template <typename T, int N>
using vec = typename VectorOf<T, N>::type;

template <typename T, int N>
SMD2_INLINE vec<T, N> splat(T x) {
  vec<T, N> v;
  for (int i = 0; i < N; i++) {
    v[i] = x;
  }
  return v;
}

// Contiguous scratch memory holds full vectors.
template <typename T, int N>
SMD2_INLINE vec<T, N> read(const T* p) {
  vec<T, N> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <typename T, int N>
SMD2_INLINE void write(T* p, vec<T, N> v) {
  std::memcpy(p, &v, sizeof(v));
}

// Tensors may end within a vector: only the first n of N channels are accessed;
// the others read as 0.
template <typename T, int N>
SMD2_INLINE vec<acc_t<T>, N> load(const T* p, int n) {
  vec<T, N> v{};
  std::memcpy(&v, p, n == N ? sizeof(v) : n * sizeof(T));
  return v;
}
template <typename T, int N>
SMD2_INLINE void store(T* p, vec<acc_t<T>, N> v, int n) {
  std::memcpy(p, &v, n == N ? sizeof(v) : n * sizeof(T));
}

// A bfloat16 is the upper half of a float. One shuffle converts a vector; GCC
// before 12 has no __builtin_shufflevector.
#if defined(__clang__) || __GNUC__ >= 12
template <int N, size_t... I>
SMD2_INLINE vec<uint16_t, 2 * N> zeros_between(
    vec<uint16_t, N> x,
    std::index_sequence<I...>) {
  return __builtin_shufflevector(x, vec<uint16_t, N>{}, (I % 2 ? I / 2 : N)...);
}
template <int N>
SMD2_INLINE vec<uint16_t, 2 * N> widen(vec<uint16_t, N> x) {
  return zeros_between<N>(x, std::make_index_sequence<2 * N>());
}
template <int N, size_t... I>
SMD2_INLINE vec<uint16_t, N> every_other(
    vec<uint16_t, 2 * N> x,
    std::index_sequence<I...>) {
  return __builtin_shufflevector(x, x, (2 * I + 1)...);
}
template <int N>
SMD2_INLINE vec<uint16_t, N> upper_halves(vec<uint32_t, N> x) {
  vec<uint16_t, 2 * N> halves;
  std::memcpy(&halves, &x, sizeof(halves));
  return every_other<N>(halves, std::make_index_sequence<N>());
}
#else
template <int N>
SMD2_INLINE vec<uint32_t, N> widen(vec<uint16_t, N> x) {
  return __builtin_convertvector(x, vec<uint32_t, N>) << 16;
}
template <int N>
SMD2_INLINE vec<uint16_t, N> upper_halves(vec<uint32_t, N> x) {
  return __builtin_convertvector(x >> 16, vec<uint16_t, N>);
}
#endif

template <int N>
SMD2_INLINE vec<float, N> load(const c10::BFloat16* p, int n) {
  vec<uint16_t, N> bits{};
  std::memcpy(&bits, p, n == N ? sizeof(bits) : n * sizeof(uint16_t));
  const auto wide = widen<N>(bits);
  vec<float, N> v;
  std::memcpy(&v, &wide, sizeof(v));
  return v;
}
template <int N>
SMD2_INLINE void store(c10::BFloat16* p, vec<float, N> v, int n) {
  vec<uint32_t, N> bits;
  std::memcpy(&bits, &v, sizeof(bits));
  const vec<uint32_t, N> rounded = bits + 0x7fff + (bits >> 16 & 1);  // to even
  const auto narrow = upper_halves<N>(v == v ? rounded : bits | 0x400000);
  std::memcpy(p, &narrow, n == N ? sizeof(narrow) : n * sizeof(uint16_t));
}
template <typename T, int N>
SMD2_INLINE vec<acc_t<T>, N> load_channels(const T* p, int n) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return load<N>(p, n);
  } else {
    return load<T, N>(p, n);
  }
}
template <typename T, int N>
SMD2_INLINE void store_channels(T* p, vec<acc_t<T>, N> v, int n) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    store<N>(p, v, n);
  } else {
    store<T, N>(p, v, n);
  }
}

// Adds v to n sums.
template <typename Acc, int N>
SMD2_INLINE void add_channels(Acc* sums, vec<Acc, N> v, int n) {
  store_channels<Acc, N>(sums, load_channels<Acc, N>(sums, n) + v, n);
}

// Sum over the channels: the upper half is added to the lower half until one
// value is left.
template <typename T, int N>
SMD2_INLINE T sum(vec<T, N> v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    vec<T, N / 2> low, high;
    std::memcpy(&low, &v, sizeof(low));
    const char* bytes = reinterpret_cast<const char*>(&v);
    std::memcpy(&high, bytes + sizeof(low), sizeof(high));
    return sum<T, N / 2>(low + high);
  }
}

template <typename T, int N>
SMD2_INLINE vec<T, N> magnitude(vec<T, N> x) {
  using Int = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  vec<Int, N> bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits &= ~Int(0) >> 1;
  std::memcpy(&x, &bits, sizeof(bits));
  return x;
}

// Calls body(s) for s = 0 .. S - 1, unrolled. Functions of S vectors use it for
// instruction-level parallelism: they do each operation for all S vectors
// before the next operation. The operations on one vector form a chain, each
// waiting for the latency of the one before, and the reorder buffer holds only
// about three such chains; interleaved, S independent chains hide the latency.
template <int S, typename Body>
SMD2_INLINE void each(const Body& body) {
#pragma GCC unroll 8
  for (int s = 0; s < S; s++) {
    body(s);
  }
}

// The base of exp_of_products: it computes exp(x * rate / kExpUnit). In float
// that is exp2(x * rate), so callers multiply the rate by log2(e) beforehand,
// once for many tokens; in double it is exp(x * rate). |x * rate| must not
// exceed kExpLimit.
template <typename T>
constexpr T kExpUnit = 1;
template <>
inline constexpr float kExpUnit<float> = 1.44269504f;  // log2 e
template <typename T>
constexpr T kExpLimit = 700;
template <>
inline constexpr float kExpLimit<float> = 126;

// x[s] = exp2(x[s] * rate), to 1 ulp; that the rate was multiplied by a rounded
// log2(e) adds the rounding error of that product. With x * rate = n + f, n an
// integer and |f| <= 1/2, it is 2^n times a polynomial in f, which was fitted
// for the smallest relative error.
template <int N, int S>
SMD2_INLINE void exp_of_products(vec<float, N>* x, vec<float, N> rate) {
  using V = vec<float, N>;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to integers
  V shifted[S], n[S], p[S];
  each<S>([&](int s) SMD2_LAMBDA { shifted[s] = x[s] * rate + magic; });
  each<S>([&](int s) SMD2_LAMBDA { n[s] = shifted[s] - magic; });
  each<S>([&](int s) SMD2_LAMBDA { x[s] = x[s] * rate - n[s]; });
  each<S>([&](int s)
              SMD2_LAMBDA { p[s] = x[s] * 1.53458124e-4f + 1.33999309e-3f; });
  each<S>([&](int s) SMD2_LAMBDA { p[s] = p[s] * x[s] + 9.61848907e-3f; });
  each<S>([&](int s) SMD2_LAMBDA { p[s] = p[s] * x[s] + 5.55032864e-2f; });
  each<S>([&](int s) SMD2_LAMBDA { p[s] = p[s] * x[s] + 2.40226462e-1f; });
  each<S>([&](int s) SMD2_LAMBDA { p[s] = p[s] * x[s] + 6.93147182e-1f; });
  each<S>([&](int s) SMD2_LAMBDA { p[s] = p[s] * x[s] + 1.0f; });
  each<S>([&](int s) SMD2_LAMBDA {
    vec<int32_t, N> bits, exponent;
    std::memcpy(&bits, &p[s], sizeof(bits));
    std::memcpy(&exponent, &shifted[s], sizeof(exponent));
    bits += exponent << 23;  // the low bits of `shifted` are n
    std::memcpy(&x[s], &bits, sizeof(bits));
  });
}

// e[s] = log(1 + e[s]) for e in [0, 1], with a relative error of at most 2e-7:
// e + e^2 times a polynomial, which was fitted for the smallest relative error.
template <int N, int S>
SMD2_INLINE void log1p(vec<float, N>* e) {
  vec<float, N> p[S];
  each<S>([&](int s)
              SMD2_LAMBDA { p[s] = e[s] * 5.364803625e-3f - 3.006571362e-2f; });
  each<S>([&](int s) SMD2_LAMBDA { p[s] = p[s] * e[s] + 7.920441462e-2f; });
  each<S>([&](int s) SMD2_LAMBDA { p[s] = p[s] * e[s] - 1.375379271e-1f; });
  each<S>([&](int s) SMD2_LAMBDA { p[s] = p[s] * e[s] + 1.915365073e-1f; });
  each<S>([&](int s) SMD2_LAMBDA { p[s] = p[s] * e[s] - 2.485716268e-1f; });
  each<S>([&](int s) SMD2_LAMBDA { p[s] = p[s] * e[s] + 3.332132251e-1f; });
  each<S>([&](int s) SMD2_LAMBDA { p[s] = p[s] * e[s] - 4.999964796e-1f; });
  each<S>([&](int s) SMD2_LAMBDA { e[s] = e[s] * e[s] * p[s] + e[s]; });
}

template <int N, int S>
SMD2_INLINE void exp_of_products(vec<double, N>* x, vec<double, N> rate) {
  for (int s = 0; s < S; s++) {
    for (int i = 0; i < N; i++) {
      x[s][i] = std::exp(x[s][i] * rate[i]);
    }
  }
}
template <int N, int S>
SMD2_INLINE void log1p(vec<double, N>* e) {
  for (int s = 0; s < S; s++) {
    for (int i = 0; i < N; i++) {
      e[s][i] = std::log1p(e[s][i]);
    }
  }
}

template <typename T, int N>
SMD2_INLINE vec<T, N> at_most(vec<T, N> x, vec<T, N> limit) {
  return limit < x ? limit : x;
}
template <typename T, int N>
SMD2_INLINE vec<T, N> at_least(vec<T, N> x, vec<T, N> limit) {
  return x < limit ? limit : x;
}

// The largest x that exp(x) is computed for. The value is hidden from the
// compiler: a clamp to a constant compiles to a comparison and a blend, one to
// an unknown value to a single min or max.
template <typename T, int N>
SMD2_INLINE vec<T, N> exp_limit() {
  T limit = kExpLimit<T> / kExpUnit<T>;
  asm("" : "+r"(limit));
  return splat<T, N>(limit);
}

// x[s] = 1 / (1 + exp(-x[s]))
template <typename T, int N, int S>
SMD2_INLINE void sigmoid(vec<T, N>* x) {
  const auto limit = exp_limit<T, N>();
  each<S>([&](int s) SMD2_LAMBDA {
    x[s] = at_most<T, N>(at_least<T, N>(x[s], -limit), limit);
  });
  exp_of_products<N, S>(x, splat<T, N>(-kExpUnit<T>));
  each<S>([&](int s) SMD2_LAMBDA { x[s] = 1 / (1 + x[s]); });
}

// x[s] *= sigmoid(x[s])
template <typename T, int N, int S>
SMD2_INLINE void silu(vec<T, N>* x) {
  const auto limit = exp_limit<T, N>();
  vec<T, N> e[S];
  each<S>([&](int s) SMD2_LAMBDA { x[s] = at_least<T, N>(x[s], -limit); });
  each<S>([&](int s) SMD2_LAMBDA { e[s] = at_most<T, N>(x[s], limit); });
  exp_of_products<N, S>(e, splat<T, N>(-kExpUnit<T>));
  each<S>([&](int s) SMD2_LAMBDA { x[s] = x[s] / (1 + e[s]); });
}

// Calls body(c, n) for each block of channels: its first channel, and their
// number, which is N except in the last block.
template <int N, typename Body>
SMD2_INLINE void for_channels(int64_t dim, const Body& body) {
  int64_t c = 0;
  for (; c + N <= dim; c += N) {
    body(c, N);
  }
  if (c < dim) {
    body(c, static_cast<int>(dim - c));
  }
}

// The same with body(S, c, n), where S, a type, is a number of blocks that
// follow each other from channel c on: `count` as long as there are so many.
template <int N, int count, typename Body>
SMD2_INLINE void for_channels(int64_t dim, const Body& body) {
  const int64_t in_groups = dim - dim % (count * N);
  for (int64_t c = 0; c < in_groups; c += count * N) {
    body(std::integral_constant<int, count>{}, c, N);
  }
  for_channels<N>(dim - in_groups, [&](int64_t c, int n) SMD2_LAMBDA {
    body(std::integral_constant<int, 1>{}, in_groups + c, n);
  });
}

}  // namespace smd2
