// Kernels of the state fusion, and what structure_aware_ssm shares with them.
//
// A block of threads goes down its tile of columns with a ring buffer of rows
// in shared memory: it fills the next rows (one for each warp), fuses as many,
// and so on. Where rows come from and what becomes of the results are template
// parameters:
//
// A Source writes one row of the map into the ring, columns x0 - 5 to x1 + 4 of
// the tile, for this lane's channel:
//
//   void fill(const TilePlace& place, int64_t y, Acc* row) const;
//
// A Sink takes the states at the taps of each token. It has a struct Token that
// each thread constructs once, calls for each of its tokens, and finishes once,
// when the tile is done and the ring can be used as scratch memory:
//
//   Token(const Sink& sink, const Acc* taps, const TilePlace& place);
//   void operator()(const Sink& sink, const TilePlace& place, int64_t at,
//                   const Acc (&h)[kTaps]);  // `at`: the token's number
//   void finish(const Sink& sink, const TilePlace& place, Acc* ring);
//
// A Source or Sink itself is a kernel argument: pointers to tensors.
#pragma once

#include "../cuda/device.cuh"
#include "cuda.h"

namespace smd2 {
namespace cuda {

// The part of a map that a block of threads processes; neighbouring blocks have
// neighbouring channels of the same tokens.
struct TilePlace {
  const Tiles& map;
  int64_t channel_block, image, part;
  int64_t tile;            // number of the tile, from left to right
  int64_t x0, x1, y0, y1;  // columns x0 .. x1 - 1, rows y0 .. y1 - 1
  int64_t channel;         // channel of this lane
  bool valid;              // whether there is such a channel

  explicit SMD2_DEVICE TilePlace(const Tiles& t) : map(t) {
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
  // Number of the token (x, y) of this image among those of all images.
  SMD2_DEVICE int64_t token(int64_t y, int64_t x) const {
    return (image * map.height + y) * map.width + x;
  }
  // The value of token `at` in a tensor [tokens of all images, dim].
  SMD2_DEVICE int64_t value(int64_t at) const {
    return at * map.dim + channel;
  }
};

template <typename Acc>
SMD2_DEVICE int ring_row(int64_t y) {
  return static_cast<int>(y % Ring<Acc>::kRows) * Ring<Acc>::kRowSize;
}

template <typename Acc>
SMD2_DEVICE void
load_taps(const Acc* taps, const TilePlace& place, Acc (&out)[kTaps]) {
#pragma unroll
  for (int k = 0; k < kTaps; k++) {
    out[k] = load(taps + place.value(k), place.valid);
  }
}

// Goes down a band: fill(y, row) writes row y of the map for this lane's
// channel; use(y) may read rows y - 5 to y + 5, as far as the map has them.
template <typename Acc, typename Fill, typename Use>
SMD2_DEVICE void
sweep(const TilePlace& place, Acc* ring, const Fill& fill, const Use& use) {
  constexpr int kRows = TileShape<Acc>::kRows;
  const int warp = threadIdx.y;
  int64_t filled = larger(place.y0 - kRadius, 0);
  for (int64_t y = place.y0; y < place.y1; y += kRows) {
    const int64_t until =
        smaller(smaller(y + kRows, place.y1) + kRadius, place.map.height);
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

// Source: rows of a map in memory, the outermost columns replicated.
template <typename T>
struct LoadRows {
  const T* h;

  SMD2_DEVICE void fill(const TilePlace& place, int64_t y, acc_t<T>* row)
      const {
    const T* from = h + place.value(place.token(y, 0));
#pragma unroll 4
    for (int64_t x = place.x0 - kRadius; x < place.x1 + kRadius; x++) {
      const int64_t inside = smaller(larger(x, 0), place.map.width - 1);
      row[(x - place.x0 + kRadius) * kLanes] =
          load_constant(from + inside * place.map.dim, place.valid);
    }
  }
};

// Source: rows of a gradient, zero outside the map.
template <typename T>
struct LoadGradient {
  const T* grad;
  const acc_t<T>* scale;  // factor of each token, or null

  SMD2_DEVICE void fill(const TilePlace& place, int64_t y, acc_t<T>* row)
      const {
    const int64_t first = place.token(y, 0);
#pragma unroll 4
    for (int64_t x = place.x0 - kRadius; x < place.x1 + kRadius; x++) {
      const bool inside = x >= 0 && x < place.map.width;
      acc_t<T> value =
          load_constant(grad + place.value(first + x), inside && place.valid);
      if (scale) {
        value *= load_constant(scale + first + x, inside);
      }
      row[(x - place.x0 + kRadius) * kLanes] = value;
    }
  }
};

// The taps of this lane's channel, and the weighted sum of states at them. Two
// sums of every other tap halve the chain of dependent additions.
template <typename Acc>
struct WeightedSum {
  Acc taps[kTaps];

  SMD2_DEVICE WeightedSum(const Acc* weights, const TilePlace& place) {
    load_taps(weights, place, taps);
  }
  SMD2_DEVICE Acc operator()(const Acc (&h)[kTaps]) const {
    Acc even = 0, odd = 0;
#pragma unroll
    for (int k = 0; k < kTaps; k++) {
      (k % 2 ? odd : even) += taps[k] * h[k];
    }
    return even + odd;
  }
};

// Sink: writes the fused states.
template <typename T>
struct StoreFused {
  using Acc = acc_t<T>;
  Acc* out;

  struct Token {
    WeightedSum<Acc> fused;

    SMD2_DEVICE
    Token(const StoreFused&, const Acc* weights, const TilePlace& place)
        : fused(weights, place) {}
    SMD2_DEVICE void operator()(
        const StoreFused& sink,
        const TilePlace& place,
        int64_t at,
        const Acc (&h)[kTaps]) {
      store(sink.out + place.value(at), fused(h), place.valid);
    }
    SMD2_DEVICE void finish(const StoreFused&, const TilePlace&, Acc*) {}
  };
};

// Sums of grad * h at each tap, over the tokens of a thread.
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
  // Writes the sums over the block's threads to grad_taps, [parts, 25, dim].
  SMD2_DEVICE void finish(Acc* grad_taps, const TilePlace& place, Acc* ring) {
    block_sum(sums, ring);
    if (threadIdx.y == 0) {
#pragma unroll
      for (int k = 0; k < kTaps; k++) {
        const int64_t row = place.part * kTaps + k;
        store(grad_taps + place.value(row), sums[k], place.valid);
      }
    }
  }
};

// Sink: sums the gradient of the taps.
template <typename T>
struct GradTaps {
  using Acc = acc_t<T>;
  const Acc* grad_out;
  Acc* grad_taps;

  struct Token {
    TapSums<Acc> sums;

    SMD2_DEVICE Token(const GradTaps&, const Acc*, const TilePlace&) {}
    SMD2_DEVICE void operator()(
        const GradTaps& sink,
        const TilePlace& place,
        int64_t at,
        const Acc (&h)[kTaps]) {
      sums.add(load(sink.grad_out + place.value(at), place.valid), h);
    }
    SMD2_DEVICE void
    finish(const GradTaps& sink, const TilePlace& place, Acc* ring) {
      sums.finish(sink.grad_taps, place, ring);
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

// Passes the states at the taps of every token to the sink.
template <typename Acc, typename Source, typename Sink>
__global__ void __launch_bounds__(
    TileShape<Acc>::kRows* kLanes,
    min_blocks<Acc>(2, 1)) fuse_tiles(FuseArgs<Acc, Source, Sink> a) {
  SMD2_SHARED(Acc, shared);
  Acc* ring = shared + threadIdx.x;
  const TilePlace place(a.tiles);
  typename Sink::Token token(a.sink, a.taps, place);
  const auto fill = [&](int64_t y, Acc* row) { a.source.fill(place, y, row); };
  const auto use = [&](int64_t y) {
    int rows[2 * kRadius + 1];
#pragma unroll
    for (int dy = -kRadius; dy <= kRadius; dy++) {
      const int64_t inside =
          smaller(larger(y + dy, 0), a.tiles.height - 1);  // replicated
      rows[dy + kRadius] = ring_row<Acc>(inside) + kRadius * kLanes;
    }
    const int64_t first = place.token(y, 0);
    for (int64_t x = place.x0; x < place.x1; x++) {
      const Acc* column = ring + (x - place.x0) * kLanes;
      Acc h[kTaps];
#pragma unroll
      for (int k = 0; k < kTaps; k++) {
        const Offset offset = tap_offset(k);
        h[k] = column[rows[offset.dy + kRadius] + offset.dx * kLanes];
      }
      token(a.sink, place, first + x, h);
    }
  };
  sweep<Acc>(place, ring, fill, use);
  token.finish(a.sink, place, shared);
}

// Positions first .. last of the fused tokens, along one axis, whose tap at
// `offset` reads position `at` of the map. The outermost positions are also
// read through their replicas in the border.
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
  Source source;  // rows of the gradient of the fused map
  Out* grad_h;
};

// The gradient of the map, by the transposed fusion: grad_h[y, x] is the sum
// over taps of tap * gradient[y - dy, x - dx]. At the border of the map, a tap
// may read a token several times, by replicas: see Readers.
template <typename Acc, typename Source, typename Out>
__global__ void __launch_bounds__(
    TileShape<Acc>::kRows* kLanes,
    min_blocks<Acc>(2, 1)) grad_input_tiles(GradInputArgs<Acc, Source, Out> a) {
  SMD2_SHARED(Acc, shared);
  Acc* ring = shared + threadIdx.x;
  const TilePlace place(a.tiles);
  const int64_t height = a.tiles.height, width = a.tiles.width;
  Acc taps[kTaps];
  load_taps(a.taps, place, taps);
  const auto fill = [&](int64_t y, Acc* row) { a.source.fill(place, y, row); };
  const auto use = [&](int64_t y) {
    int rows[2 * kRadius + 1];  // -1: outside the map, where gradients are 0
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
          sum += load(a.taps + place.value(k), place.valid) * grads;
        }
      }
      const int64_t at = place.token(y, x);
      store(a.grad_h + place.value(at), sum, place.valid);
    }
  };
  sweep<Acc>(place, ring, fill, use);
}

}  // namespace cuda
}  // namespace smd2
