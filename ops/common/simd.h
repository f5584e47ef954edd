// Vectors over channels, in plain C++ with the vector extensions of GCC and
// Clang. Every function here is inlined into kernels that are compiled once per
// instruction set (see multiversion.h), so nothing needs intrinsics.
#pragma once

#include <c10/util/BFloat16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define SMD2_INLINE static inline __attribute__((always_inline))
#define SMD2_LAMBDA __attribute__((always_inline))

namespace smd2 {

// The type that sums and states have: float, but double for double.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulate<T>::type;

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
  return x - vec<T, N>{};
}

// Contiguous scratch memory, always whole vectors.
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

// Tensors: the first n of N channels; the others read as 0 and stay unwritten.
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

// bfloat16 is the upper half of a float: a zero comes in front of each.
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
#else
template <int N>
SMD2_INLINE vec<uint32_t, N> widen(vec<uint16_t, N> x) {
  return __builtin_convertvector(x, vec<uint32_t, N>) << 16;
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
  auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
  auto narrow = __builtin_convertvector(
      v == v ? rounded : bits >> 16 | 0x40, vec<uint16_t, N>);
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

// Halves are added until one value is left.
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

// exp of x <= 88, to 1 ulp or so: 2^n times a polynomial in the rest
// (coefficients as in Cephes' expf). Least result: the least normal number.
template <int N>
SMD2_INLINE vec<float, N> exp_of_small(vec<float, N> x) {
  const auto low = splat<float, N>(-87.3f);
  x = x < low ? low : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to integers
  vec<float, N> shifted = x * 1.44269504f + magic;
  vec<float, N> n = shifted - magic;
  vec<float, N> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec<float, N> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  vec<int32_t, N> bits, exponent;
  std::memcpy(&bits, &p, sizeof(bits));
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  bits += exponent << 23;  // the low bits of `shifted` are n
  std::memcpy(&p, &bits, sizeof(p));
  return p;
}
template <int N>
SMD2_INLINE vec<float, N> exp(vec<float, N> x) {
  const auto high = splat<float, N>(88.3f);
  return exp_of_small<N>(x > high ? high : x);
}

// log(1 + e) for e in [0, 1], to 2e-7 of itself: the second-order term times a
// polynomial, fitted to the smallest relative error.
template <int N>
SMD2_INLINE vec<float, N> log1p(vec<float, N> e) {
  vec<float, N> p = e * 5.364803625e-3f - 3.006571362e-2f;
  p = p * e + 7.920441462e-2f;
  p = p * e - 1.375379271e-1f;
  p = p * e + 1.915365073e-1f;
  p = p * e - 2.485716268e-1f;
  p = p * e + 3.332132251e-1f;
  p = p * e - 4.999964796e-1f;
  return e * e * p + e;
}

template <int N>
SMD2_INLINE vec<double, N> exp(vec<double, N> x) {
  for (int i = 0; i < N; i++) {
    x[i] = std::exp(x[i]);
  }
  return x;
}
template <int N>
SMD2_INLINE vec<double, N> exp_of_small(vec<double, N> x) {
  return exp<N>(x);
}
template <int N>
SMD2_INLINE vec<double, N> log1p(vec<double, N> x) {
  for (int i = 0; i < N; i++) {
    x[i] = std::log1p(x[i]);
  }
  return x;
}

template <typename T, int N>
SMD2_INLINE vec<T, N> sigmoid(vec<T, N> x) {
  return 1 / (1 + exp<N>(-x));
}

template <typename T, int N>
SMD2_INLINE vec<T, N> silu(vec<T, N> x) {
  return x / (1 + exp<N>(-x));
}

// Calls body(c, n) for blocks of N channels; n is less in the last one.
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

}  // namespace smd2
