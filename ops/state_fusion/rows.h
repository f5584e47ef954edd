// State fusion of single rows of a padded map, one block of channels.
// Torch-free.
#pragma once

#include <algorithm>

#include "../cpu/simd.h"
#include "taps.h"

namespace smd2 {

constexpr int kWindow = 2 * kRadius + 1;  // rows that a row's taps reach

// Offsets of all taps as a table, for loops over taps.
struct TapOffsets {
  Offset of[kTaps]{};
  constexpr TapOffsets() {
    for (int k = 0; k < kTaps; k++) {
      of[k] = tap_offset(k);
    }
  }
};
constexpr TapOffsets kOffsets{};

// The taps [25, dim] of n channels from c on.
template <typename T, int N>
SMD2_INLINE void
load_taps(const T* taps, int64_t dim, int64_t c, int n, vec<T, N>* out) {
  for (int k = 0; k < kTaps; k++) {
    out[k] = load_channels<T, N>(taps + k * dim + c, n);
  }
}
template <typename T, int N>
SMD2_INLINE void
store_taps(const vec<T, N>* taps, int64_t dim, int64_t c, int n, T* out) {
  for (int k = 0; k < kTaps; k++) {
    store_channels<T, N>(out + k * dim + c, taps[k], n);
  }
}

// Replicate padding of a row: writes kRadius copies of its first token in front
// of it and of its last token behind it. `row` points to the first of `width`
// tokens of N values.
template <typename T, int N>
SMD2_INLINE void replicate_row(T* row, int64_t width) {
  const auto first = read<T, N>(row), last = read<T, N>(row + (width - 1) * N);
  for (int k = 1; k <= kRadius; k++) {
    write<T, N>(row - k * N, first);
    write<T, N>(row + (width - 1 + k) * N, last);
  }
}

// Padded rows in memory, W + 2 kRadius tokens of N values each: a ring buffer
// of the last `kept` rows of the map. Row y is in slot y % kept, so with
// `kept` = height it is the map itself.
template <typename T, int N>
struct PaddedRows {
  T* memory;
  int64_t kept, width;

  // The row's first token inside the map.
  __attribute__((always_inline)) T* row(int64_t y) const {
    return memory + (y % kept * (width + 2 * kRadius) + kRadius) * N;
  }
};

// Rows y + dy for dy = -5 .. 5, each pointing to its token 0. They are readable
// kRadius tokens beyond either end.
template <typename T>
struct Window {
  const T* rows[kWindow];
};

// The window around row y of a map of `height` rows. Above the first row and
// below the last one are their replicas.
template <typename T, int N>
SMD2_INLINE Window<T>
window_around(const PaddedRows<T, N>& rows, int64_t y, int64_t height) {
  Window<T> window;
  for (int dy = -kRadius; dy <= kRadius; dy++) {
    int64_t source = y + dy;
    source = source < 0 ? 0 : source;
    source = source < height ? source : height - 1;
    window.rows[dy + kRadius] = rows.row(source);
  }
  return window;
}

// Goes down a map of which memory holds kWindow rows: produce(y, row) writes a
// row, use(y, window) is called for each row once its window is complete.
template <typename T, int N, typename Produce, typename Use>
SMD2_INLINE void sweep_rows(
    T* memory,
    int64_t height,
    int64_t width,
    const Produce& produce,
    const Use& use) {
  const PaddedRows<T, N> ring{memory, kWindow, width};
  for (int64_t r = 0; r < height + kRadius; r++) {
    if (r < height) {
      T* row = ring.row(r);
      produce(r, row);
      replicate_row<T, N>(row, width);
    }
    const int64_t y = r - kRadius;
    if (y >= 0) {
      use(y, window_around<T, N>(ring, y, height));
    }
  }
}

// Values of the accumulation type that sweep_rows needs for a block.
inline int64_t sweep_size(int64_t width, int lanes) {
  return kWindow * (width + 2 * kRadius) * lanes;
}

// Tokens that are fused together: a tap is loaded once for all of them, and
// their sums are independent chains of additions. More of them would spill
// vector registers. Tuned on two cores of an AMD EPYC (AVX-512).
constexpr int kFusedTogether = 8;

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
        window.rows[kOffsets.of[k].dy + kRadius] + (x + kOffsets.of[k].dx) * N;
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

// Gradients of the fused map have margins of zeros, so that the transposed
// fusion onto the padded map can read kRadius tokens beyond the padding.
constexpr int kMargin = 2 * kRadius;

// What the backward pass keeps of one block of a map, in scratch memory.
template <typename T, int N>
struct FusionTape {
  int64_t height, width;
  PaddedRows<T, N> map;  // all rows
  T* grads;              // gradients of the fused map, rows with margins
  T* zeros;              // one row like them
  T* padded;             // one padded row
  T* out;                // one row

  __attribute__((always_inline))
  FusionTape(T* memory, int64_t height_, int64_t width_)
      : height(height_), width(width_), map{memory, height_, width_} {
    grads = memory + height * padded_size();
    zeros = grads + height * margins_size();
    padded = zeros + margins_size();
    out = padded + padded_size();
    std::fill(grads, padded, T(0));
  }
  int64_t padded_size() const {
    return (width + 2 * kRadius) * N;
  }
  int64_t margins_size() const {
    return (width + 2 * kMargin) * N;
  }
  // Its first token inside the map.
  __attribute__((always_inline)) T* grad_row(int64_t y) const {
    return grads + y * margins_size() + kMargin * N;
  }
};

// Values of the accumulation type that FusionTape needs for a block.
inline int64_t tape_size(int64_t height, int64_t width, int lanes) {
  return lanes * ((height + 2) * (width + 2 * kRadius) +
                  (height + 1) * (width + 2 * kMargin));
}

// Writes row y of the gradient of the map to tape.out, given the gradients of
// the fused map.
//
// Fusion reads the padded map p at p[y + dy, x + dx] for every tap, so the
// gradient of p is the transposed fusion, grad_p[y, x] = sum over taps of
// tap * grad[y - dy, x - dx], with gradients of 0 outside of the map. Replicate
// padding copied the outermost rows and columns of the map to the border of p;
// so the gradients of the border are added to those of the outermost rows and
// columns. An inner row has one row of p, the first and the last one have
// kRadius more (a map of one row has both).
template <typename T, int N>
SMD2_INLINE void fuse_row_grad_input(
    const FusionTape<T, N>& tape,
    const vec<T, N>* taps,
    int64_t y) {
  const int64_t height = tape.height, width = tape.width;
  T* out = tape.out;
  for (int64_t i = 0; i < width * N; i++) {
    out[i] = 0;
  }
  const int64_t top = y == 0 ? -kRadius : y;
  const int64_t bottom = y == height - 1 ? height - 1 + kRadius : y;
  for (int64_t p = top; p <= bottom; p++) {
    const T* rows[kWindow];
    for (int dy = -kRadius; dy <= kRadius; dy++) {
      const int64_t source = p - dy;
      const bool inside = source >= 0 && source < height;
      rows[dy + kRadius] =
          inside ? tape.grads + source * tape.margins_size() : tape.zeros;
    }
    for (int64_t x = 0; x < width + 2 * kRadius; x++) {
      vec<T, N> even{}, odd{};
#pragma GCC unroll 25
      for (int k = 0; k < kTaps; k++) {
        const auto g = read<T, N>(
            rows[kOffsets.of[k].dy + kRadius] +
            (x + kRadius - kOffsets.of[k].dx) * N);
        if (k % 2) {
          odd += taps[k] * g;
        } else {
          even += taps[k] * g;
        }
      }
      write<T, N>(tape.padded + x * N, even + odd);
    }
    T* first = tape.padded + kRadius * N;
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
    const T* row =
        window.rows[kOffsets.of[k].dy + kRadius] + kOffsets.of[k].dx * N;
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
