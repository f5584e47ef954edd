// Convolutions with 3x3 kernels by Winograd's algorithm F(4x4, 3x3): Lavin and
// Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308.
// A tile of 6x6 inputs becomes 4x4 outputs with 36 multiplications per pair of
// channels instead of 144.
//
// The points of interpolation are 0, +-sqrt(1/2), +-sqrt(2) and infinity; with
// them the rounding errors are those of a direct convolution, with the usual 0,
// +-1, +-2 and infinity five times as large.
#pragma once

#include "../cpu/simd.h"

namespace smd2 {

constexpr int kTile = 4;   // outputs along a side
constexpr int kPatch = 6;  // inputs along a side
constexpr int kProducts = kPatch * kPatch;

template <typename T>
constexpr T kNear = T(0.70710678118654752440);  // sqrt(1/2)
template <typename T>
constexpr T kFar = T(1.41421356237309504880);  // sqrt(2)

// From six inputs, `stride` vectors apart, to six factors.
template <typename T, int N>
SMD2_INLINE void
transform_inputs(const vec<T, N>* d, int stride, vec<T, N>* out) {
  using V = vec<T, N>;
  const V d0 = d[0], d1 = d[stride], d2 = d[2 * stride], d3 = d[3 * stride],
          d4 = d[4 * stride], d5 = d[5 * stride];
  const V near_even = d4 - T(2) * d2;
  const V near_odd = kNear<T> * (d3 - T(2) * d1);
  const V far_even = d4 - T(0.5) * d2;
  const V far_odd = kFar<T> * (d3 - T(0.5) * d1);
  out[0] = d0 - T(2.5) * d2 + d4;
  out[1] = near_even + near_odd;
  out[2] = near_even - near_odd;
  out[3] = far_even + far_odd;
  out[4] = far_even - far_odd;
  out[5] = d1 - T(2.5) * d3 + d5;
}

// From six sums of products, `stride` vectors apart, to four outputs.
template <typename T, int N>
SMD2_INLINE void
transform_products(const vec<T, N>* m, int stride, vec<T, N>* out) {
  using V = vec<T, N>;
  const V near_even = m[stride] + m[2 * stride];
  const V near_odd = kNear<T> * (m[stride] - m[2 * stride]);
  const V far_even = m[3 * stride] + m[4 * stride];
  const V far_odd = kFar<T> * (m[3 * stride] - m[4 * stride]);
  out[0] = m[0] + near_even + far_even;
  out[1] = near_odd + far_odd;
  out[2] = T(0.5) * near_even + T(2) * far_even;
  out[3] = T(0.5) * near_odd + T(2) * far_odd + m[5 * stride];
}

// Columns [0, 2 N) of `Rows` rows of a matrix product: out (+)= a b.
//   a  [Rows, depth], rows a_stride apart
//   b  two vectors of columns, each in a panel of kPanel columns
template <typename T, int N, int Rows>
SMD2_INLINE void multiply(
    const T* a,
    int64_t a_stride,
    const T* b0,
    const T* b1,
    int64_t b_stride,
    int64_t depth,
    T* out,
    int64_t out_stride,
    bool add) {
  using V = vec<T, N>;
  V left[Rows], right[Rows];
#pragma GCC unroll 6
  for (int r = 0; r < Rows; r++) {
    left[r] = add ? read<T, N>(out + r * out_stride) : V{};
    right[r] = add ? read<T, N>(out + r * out_stride + N) : V{};
  }
  for (int64_t k = 0; k < depth; k++) {
    const V w0 = read<T, N>(b0 + k * b_stride);
    const V w1 = read<T, N>(b1 + k * b_stride);
#pragma GCC unroll 6
    for (int r = 0; r < Rows; r++) {
      const T x = a[r * a_stride + k];
      left[r] += x * w0;
      right[r] += x * w1;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < Rows; r++) {
    write<T, N>(out + r * out_stride, left[r]);
    write<T, N>(out + r * out_stride + N, right[r]);
  }
}

}  // namespace smd2
