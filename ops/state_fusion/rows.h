// State fusion of single rows of a padded map, one block of channels.
// Torch-free.
#pragma once

#include "../cpu/simd.h"

namespace smd2 {

constexpr int kRadius = 5;
constexpr int kTaps = 25;

// (dy, dx) of each tap, in the order of taps.py.
constexpr int kOffsets[kTaps][2] = {
    {-1, -1}, {-1, 0}, {-1, 1},  {0, -1},  {0, 0},  {0, 1},  {1, -1},
    {1, 0},   {1, 1},  {-3, -3}, {-3, 0},  {-3, 3}, {0, -3}, {0, 3},
    {3, -3},  {3, 0},  {3, 3},   {-5, -5}, {-5, 0}, {-5, 5}, {0, -5},
    {0, 5},   {5, -5}, {5, 0},   {5, 5}};

// Repeats the first and the last of `width` tokens kRadius times on either
// side; `row` points to the first one, N values a token.
template <typename T, int N>
SMD2_INLINE void replicate_row(T* row, int64_t width) {
  const auto first = read<T, N>(row), last = read<T, N>(row + (width - 1) * N);
  for (int k = 1; k <= kRadius; k++) {
    write<T, N>(row - k * N, first);
    write<T, N>(row + (width - 1 + k) * N, last);
  }
}

// Rows y + dy for dy = -5 .. 5, each pointing to its token 0. They must be
// readable kRadius tokens beyond either end.
template <typename T>
struct Window {
  const T* rows[2 * kRadius + 1];
};

// The window around row y of H rows of W + 2 kRadius tokens, of which memory
// has the last `kept`, each in place of the one `kept` rows above.
template <typename T, int N>
SMD2_INLINE Window<T> window_around(
    const T* memory,
    int64_t kept,
    int64_t y,
    int64_t height,
    int64_t width) {
  Window<T> window;
  for (int dy = -kRadius; dy <= kRadius; dy++) {
    int64_t source = y + dy;
    source = source < 0 ? 0 : source;
    source = source < height ? source : height - 1;
    window.rows[dy + kRadius] =
        memory + (source % kept * (width + 2 * kRadius) + kRadius) * N;
  }
  return window;
}

constexpr int kFusedTogether = 8;  // tokens

// The weighted sums over the taps at S tokens from x on.
template <typename T, int N, int S>
SMD2_INLINE void fuse(
    const Window<T>& window,
    const vec<T, N>* taps,
    int64_t x,
    vec<T, N>* out) {
  each<S>([&](int s) SMD2_LAMBDA { out[s] = vec<T, N>{}; });
#pragma GCC unroll 25
  for (int k = 0; k < kTaps; k++) {
    const T* row =
        window.rows[kOffsets[k][0] + kRadius] + (x + kOffsets[k][1]) * N;
    each<S>([&](int s)
                SMD2_LAMBDA { out[s] += taps[k] * read<T, N>(row + s * N); });
  }
}

// Calls body(x, fused) for every token of a row of `width`.
template <typename T, int N, typename Body>
SMD2_INLINE void fuse_row(
    const Window<T>& window,
    const vec<T, N>* taps,
    int64_t width,
    const Body& body) {
  int64_t x = 0;
  vec<T, N> fused[kFusedTogether];
  for (; x + kFusedTogether <= width; x += kFusedTogether) {
    fuse<T, N, kFusedTogether>(window, taps, x, fused);
    each<kFusedTogether>([&](int s) SMD2_LAMBDA { body(x + s, fused[s]); });
  }
  for (; x < width; x++) {
    fuse<T, N, 1>(window, taps, x, fused);
    body(x, fused[0]);
  }
}

// Gradients of the fused map with margins: kMargin zero tokens on either side.
constexpr int kMargin = 2 * kRadius;

// Gradient with respect to the H x W map, row y, from the gradients of the
// fused map. `grads` holds H rows of W + 2 kMargin tokens, `zeros` one row of
// zeros like them; `scratch` has room for W + 2 kRadius tokens and `out` for W.
//
// It is the transposed fusion onto the padded map, whose border rows and
// columns are copies of the outermost ones and so add their gradients to them.
template <typename T, int N>
SMD2_INLINE void fuse_row_grad_input(
    const T* grads,
    const T* zeros,
    const vec<T, N>* taps,
    int64_t y,
    int64_t height,
    int64_t width,
    T* scratch,
    T* out) {
  const int64_t row_size = (width + 2 * kMargin) * N;
  const int64_t padded = width + 2 * kRadius;
  for (int64_t i = 0; i < width * N; i++) {
    out[i] = 0;
  }
  const int64_t top = y == 0 ? -kRadius : y;
  const int64_t bottom = y == height - 1 ? height - 1 + kRadius : y;
  for (int64_t p = top; p <= bottom; p++) {
    const T* rows[2 * kRadius + 1];
    for (int dy = -kRadius; dy <= kRadius; dy++) {
      const int64_t source = p - dy;
      const bool inside = source >= 0 && source < height;
      rows[dy + kRadius] = inside ? grads + source * row_size : zeros;
    }
    for (int64_t x = 0; x < padded; x++) {
      vec<T, N> even{}, odd{};
#pragma GCC unroll 25
      for (int k = 0; k < kTaps; k++) {
        const auto g = read<T, N>(
            rows[kOffsets[k][0] + kRadius] +
            (x + kRadius - kOffsets[k][1]) * N);
        if (k % 2) {
          odd += taps[k] * g;
        } else {
          even += taps[k] * g;
        }
      }
      write<T, N>(scratch + x * N, even + odd);
    }
    T* first = scratch + kRadius * N;
    T* last = first + (width - 1) * N;
    for (int k = 1; k <= kRadius; k++) {
      write<T, N>(first, read<T, N>(first) + read<T, N>(first - k * N));
      write<T, N>(last, read<T, N>(last) + read<T, N>(last + k * N));
    }
    for (int64_t i = 0; i < width * N; i++) {
      out[i] += first[i];
    }
  }
}

// Adds grad * h at each tap to `grad_taps`, for a row of gradients.
template <typename T, int N>
SMD2_INLINE void fuse_row_grad_taps(
    const Window<T>& window,
    const T* grad,
    int64_t width,
    vec<T, N>* grad_taps) {
#pragma GCC unroll 25
  for (int k = 0; k < kTaps; k++) {
    const T* row = window.rows[kOffsets[k][0] + kRadius] + kOffsets[k][1] * N;
    vec<T, N> even{}, odd{};
    int64_t x = 0;
    for (; x + 1 < width; x += 2) {
      even += read<T, N>(grad + x * N) * read<T, N>(row + x * N);
      odd += read<T, N>(grad + (x + 1) * N) * read<T, N>(row + (x + 1) * N);
    }
    if (x < width) {
      even += read<T, N>(grad + x * N) * read<T, N>(row + x * N);
    }
    grad_taps[k] += even + odd;
  }
}

}  // namespace smd2
