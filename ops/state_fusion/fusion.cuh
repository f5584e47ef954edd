// Kernels of the state fusion, and what the fused operator shares with them.
//
// A block of threads goes down its tile of columns with a ring of rows in
// shared memory: it fills the next rows (a warp each), fuses as many, and so
// on. Where the rows come from and what becomes of the results are parameters:
// see `fuse_tiles` and `grad_input_tiles`.
#pragma once

#include "../cuda/device.cuh"
#include "cuda.h"

namespace smd2 {
namespace cuda {

// (dy, dx) of a tap, in the order of taps.py: the 3x3 kernel of dilation 1 row
// by row, then those of dilation 3 and 5 without their centres.
struct Offset {
  int dy, dx;
};
SMD2_HOST_DEVICE constexpr Offset tap_offset(int tap) {
  const int dilation = tap < 9 ? 1 : (tap < 17 ? 3 : 5);
  const int ring = tap < 17 ? tap - 9 : tap - 17;
  const int i = tap < 9 ? tap : (ring < 4 ? ring : ring + 1);
  return {dilation * (i / 3 - 1), dilation * (i % 3 - 1)};
}

// The part of a map that a block of threads treats; neighbouring blocks have
// neighbouring channels of the same tokens.
struct TilePlace {
  int64_t channel_block, image, part;
  int64_t tile;            // column of tiles
  int64_t x0, x1, y0, y1;  // first and after the last
  int64_t channel;         // of this lane
  bool valid;              // whether there is such a channel

  explicit SMD2_DEVICE TilePlace(const Tiles& t) {
    const int64_t block = blockIdx.x;
    channel_block = block % t.channel_blocks();
    part = block / t.channel_blocks();
    tile = part % t.tiles;
    const int64_t band = part / t.tiles % t.bands;
    image = part / t.tiles / t.bands;
    x0 = tile * t.tile_width;
    x1 = smaller(x0 + t.tile_width, t.width);
    y0 = band * t.band_height;
    y1 = smaller(y0 + t.band_height, t.height);
    channel = channel_block * kLanes + threadIdx.x;
    valid = channel < t.dim;
  }
};

template <typename Acc>
SMD2_DEVICE int ring_row(int64_t y) {
  return static_cast<int>(y % Ring<Acc>::kRows) * Ring<Acc>::kRowSize;
}

template <typename Acc>
SMD2_DEVICE void load_taps(
    const Acc* taps,
    const Tiles& tiles,
    const TilePlace& place,
    Acc (&out)[kTaps]) {
#pragma unroll
  for (int k = 0; k < kTaps; k++) {
    out[k] = load(taps + k * tiles.dim + place.channel, place.valid);
  }
}

// Goes down a band: `fill(y, row)` writes row y of the map, columns x0 - 5 to
// x1 + 5, for this lane's channel; `use(y)` may read rows y - 5 to y + 5, as
// far as the map has them.
template <typename Acc, typename Fill, typename Use>
SMD2_DEVICE void sweep(
    const TilePlace& place,
    int64_t height,
    Acc* ring,
    const Fill& fill,
    const Use& use) {
  constexpr int kRows = TileShape<Acc>::kRows;
  const int warp = threadIdx.y;
  int64_t filled = larger(place.y0 - kRadius, 0);
  for (int64_t y = place.y0; y < place.y1; y += kRows) {
    const int64_t until =
        smaller(smaller(y + kRows, place.y1) + kRadius, height);
    for (int64_t row = filled + warp; row < until; row += kRows) {
      fill(row, ring + ring_row<Acc>(row));
    }
    filled = until;
    __syncthreads();
    if (y + warp < place.y1) {
      use(y + warp);
    }
    __syncthreads();
  }
}

// Rows of a map in memory, the outermost columns replicated.
template <typename T>
struct LoadRows {
  const T* h;

  SMD2_DEVICE void fill(
      const Tiles& tiles,
      const TilePlace& place,
      int64_t y,
      acc_t<T>* row) const {
    const T* from = h +
                    (place.image * tiles.height + y) * tiles.width * tiles.dim +
                    place.channel;
#pragma unroll 4
    for (int64_t x = place.x0 - kRadius; x < place.x1 + kRadius; x++) {
      const int64_t inside = smaller(larger(x, 0), tiles.width - 1);
      row[(x - place.x0 + kRadius) * kLanes] =
          load(from + inside * tiles.dim, place.valid);
    }
  }
};

// Rows of a gradient, zero outside the map.
template <typename T>
struct LoadGradient {
  const T* grad;
  const acc_t<T>* scale;  // of each token, or null

  SMD2_DEVICE void fill(
      const Tiles& tiles,
      const TilePlace& place,
      int64_t y,
      acc_t<T>* row) const {
    const int64_t first = (place.image * tiles.height + y) * tiles.width;
#pragma unroll 4
    for (int64_t x = place.x0 - kRadius; x < place.x1 + kRadius; x++) {
      const bool inside = x >= 0 && x < tiles.width;
      acc_t<T> value = load(
          grad + (first + x) * tiles.dim + place.channel,
          inside && place.valid);
      if (scale) {
        value *= load(scale + first + x, inside);
      }
      row[(x - place.x0 + kRadius) * kLanes] = value;
    }
  }
};

// What becomes of a fused token: it is written.
template <typename T>
struct StoreFused {
  using Acc = acc_t<T>;
  static constexpr int kSums = 0;
  Acc* out;

  struct Token {
    Acc taps[kTaps];

    SMD2_DEVICE Token(
        const StoreFused&,
        const Acc* weights,
        const Tiles& tiles,
        const TilePlace& place) {
      load_taps(weights, tiles, place, taps);
    }
    // `h` are the states at the taps of token `at`.
    SMD2_DEVICE void operator()(
        const StoreFused& sink,
        const Tiles& tiles,
        const TilePlace& place,
        int64_t at,
        const Acc (&h)[kTaps]) {
      Acc even = 0, odd = 0;
#pragma unroll
      for (int k = 0; k < kTaps; k++) {
        (k % 2 ? odd : even) += taps[k] * h[k];
      }
      store(sink.out + at * tiles.dim + place.channel, even + odd, place.valid);
    }
    SMD2_DEVICE void
    finish(const StoreFused&, const Tiles&, const TilePlace&, Acc*) {}
  };
};

// Adds `grad` times the states at the taps to sums that `finish` writes.
template <typename Acc>
struct TapSums {
  Acc sums[kTaps];

  SMD2_DEVICE TapSums() {
#pragma unroll
    for (int k = 0; k < kTaps; k++) {
      sums[k] = 0;
    }
  }
  SMD2_DEVICE void add(Acc grad, const Acc (&h)[kTaps]) {
#pragma unroll
    for (int k = 0; k < kTaps; k++) {
      sums[k] += grad * h[k];
    }
  }
  // Into grad_taps [parts, 25, dim]; `ring` is scratch.
  SMD2_DEVICE void finish(
      Acc* grad_taps,
      const Tiles& tiles,
      const TilePlace& place,
      Acc* ring) {
    block_sum(sums, ring);
    if (threadIdx.y == 0) {
#pragma unroll
      for (int k = 0; k < kTaps; k++) {
        const int64_t row = place.part * kTaps + k;
        store(
            grad_taps + row * tiles.dim + place.channel, sums[k], place.valid);
      }
    }
  }
};

// What becomes of the states at a token's taps: the gradient of the taps.
template <typename T>
struct GradTaps {
  using Acc = acc_t<T>;
  const Acc* grad_out;
  Acc* grad_taps;

  struct Token {
    TapSums<Acc> sums;

    SMD2_DEVICE
    Token(const GradTaps&, const Acc*, const Tiles&, const TilePlace&) {}
    SMD2_DEVICE void operator()(
        const GradTaps& sink,
        const Tiles& tiles,
        const TilePlace& place,
        int64_t at,
        const Acc (&h)[kTaps]) {
      const Acc* grad = sink.grad_out + at * tiles.dim + place.channel;
      sums.add(load(grad, place.valid), h);
    }
    SMD2_DEVICE void finish(
        const GradTaps& sink,
        const Tiles& tiles,
        const TilePlace& place,
        Acc* ring) {
      sums.finish(sink.grad_taps, tiles, place, ring);
    }
  };
};

template <typename Acc, typename Source, typename Sink>
struct FuseArgs {
  Tiles tiles;
  const Acc* taps;
  Source source;
  Sink sink;
};

// Hands the states at the taps of every token to the sink.
template <typename Acc, typename Source, typename Sink>
__global__ void __launch_bounds__(
    TileShape<Acc>::kRows* kLanes,
    min_blocks<Acc>(2, 1)) fuse_tiles(FuseArgs<Acc, Source, Sink> a) {
  SMD2_SHARED(Acc, shared);
  Acc* ring = shared + threadIdx.x;
  const TilePlace place(a.tiles);
  typename Sink::Token token(a.sink, a.taps, a.tiles, place);
  const auto fill = [&](int64_t y, Acc* row) {
    a.source.fill(a.tiles, place, y, row);
  };
  const auto use = [&](int64_t y) {
    int rows[2 * kRadius + 1];
#pragma unroll
    for (int dy = -kRadius; dy <= kRadius; dy++) {
      const int64_t inside =
          smaller(larger(y + dy, 0), a.tiles.height - 1);  // replicated
      rows[dy + kRadius] = ring_row<Acc>(inside) + kRadius * kLanes;
    }
    const int64_t at = (place.image * a.tiles.height + y) * a.tiles.width;
    for (int64_t x = place.x0; x < place.x1; x++) {
      const Acc* column = ring + (x - place.x0) * kLanes;
      Acc h[kTaps];
#pragma unroll
      for (int k = 0; k < kTaps; k++) {
        const Offset offset = tap_offset(k);
        h[k] = column[rows[offset.dy + kRadius] + offset.dx * kLanes];
      }
      token(a.sink, a.tiles, place, at + x, h);
    }
  };
  sweep<Acc>(place, a.tiles.height, ring, fill, use);
  token.finish(a.sink, a.tiles, place, shared);
}

// Positions of fused tokens, along one axis, whose tap at `offset` reads
// position `at`. The border's replicas belong to it as well.
struct Readers {
  int64_t first, last;

  SMD2_DEVICE Readers(int64_t at, int offset, int64_t size) {
    first = at == 0 ? 0 : larger(at - offset, 0);
    last = at == size - 1 ? size - 1 : smaller(at - offset, size - 1);
  }
};

template <typename Acc, typename Source, typename Out>
struct GradInputArgs {
  Tiles tiles;
  const Acc* taps;
  Source source;  // of the gradient of the fused map
  Out* grad_h;
};

// The transposed fusion.
template <typename Acc, typename Source, typename Out>
__global__ void __launch_bounds__(
    TileShape<Acc>::kRows* kLanes,
    min_blocks<Acc>(2, 1)) grad_input_tiles(GradInputArgs<Acc, Source, Out> a) {
  SMD2_SHARED(Acc, shared);
  Acc* ring = shared + threadIdx.x;
  const TilePlace place(a.tiles);
  const int64_t height = a.tiles.height, width = a.tiles.width;
  Acc taps[kTaps];
  load_taps(a.taps, a.tiles, place, taps);
  const auto fill = [&](int64_t y, Acc* row) {
    a.source.fill(a.tiles, place, y, row);
  };
  const auto use = [&](int64_t y) {
    int rows[2 * kRadius + 1];  // negative: outside, where the gradient is 0
#pragma unroll
    for (int dy = -kRadius; dy <= kRadius; dy++) {
      const bool inside = y - dy >= 0 && y - dy < height;
      rows[dy + kRadius] =
          inside ? ring_row<Acc>(y - dy) + kRadius * kLanes : -1;
    }
    for (int64_t x = place.x0; x < place.x1; x++) {
      Acc sum = 0;
      if (y > 0 && y < height - 1 && x > 0 && x < width - 1) {
        const Acc* column = ring + (x - place.x0) * kLanes;
        Acc odd = 0;
#pragma unroll
        for (int k = 0; k < kTaps; k++) {
          const Offset offset = tap_offset(k);
          const int row = rows[offset.dy + kRadius];
          const Acc grad = row < 0 ? Acc(0) : column[row - offset.dx * kLanes];
          (k % 2 ? odd : sum) += taps[k] * grad;
        }
        sum += odd;
      } else {
#pragma unroll 1
        for (int k = 0; k < kTaps; k++) {
          const Offset offset = tap_offset(k);
          const Readers ys(y, offset.dy, height), xs(x, offset.dx, width);
          Acc grads = 0;
          for (int64_t ry = ys.first; ry <= ys.last; ry++) {
            const Acc* row = ring + ring_row<Acc>(ry);
            for (int64_t rx = xs.first; rx <= xs.last; rx++) {
              grads += row[(rx - place.x0 + kRadius) * kLanes];
            }
          }
          const Acc* tap = a.taps + k * a.tiles.dim + place.channel;
          sum += load(tap, place.valid) * grads;
        }
      }
      const int64_t at = (place.image * height + y) * width + x;
      store(a.grad_h + at * a.tiles.dim + place.channel, sum, place.valid);
    }
  };
  sweep<Acc>(place, height, ring, fill, use);
}

template <typename Acc, typename Args>
void launch_tiles(
    const char* name,
    void (*kernel)(Args),
    const Args& args,
    cudaStream_t stream) {
  launch(
      name,
      kernel,
      args.tiles.blocks(),
      TileShape<Acc>::kRows,
      Ring<Acc>::kBytes,
      stream,
      args);
}

template <typename Acc, typename Source, typename Sink>
void launch_fuse(
    const char* name,
    const FuseArgs<Acc, Source, Sink>& args,
    cudaStream_t stream) {
  launch_tiles<Acc>(name, fuse_tiles<Acc, Source, Sink>, args, stream);
}

template <typename Acc, typename Source, typename Out>
void launch_grad_input(
    const GradInputArgs<Acc, Source, Out>& args,
    cudaStream_t stream) {
  launch_tiles<Acc>(
      "grad_input_tiles", grad_input_tiles<Acc, Source, Out>, args, stream);
}

}  // namespace cuda
}  // namespace smd2
