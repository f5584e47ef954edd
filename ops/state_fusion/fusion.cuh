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
//   void fill(const TilePlace& place, int y, Acc* row) const;
//
// A Sink takes the states at the taps of each token. It has a type Walk, which
// says how, and a struct Token that each thread constructs once, calls for each
// of its tokens, and finishes once, when the tile is done and the ring can be
// used as scratch memory:
//
//   Token(const Sink& sink, const Acc* taps, const TilePlace& place);
//   void operator()(const Sink& sink, const TilePlace& place, int64_t first,
//                   int i, const Acc (&h)[kTaps]);  // token first + i
//   void finish(const Sink& sink, const TilePlace& place, Acc* ring);
//
// A Source or Sink itself is a kernel argument: pointers to tensors.
#pragma once

#include "../cuda/device.cuh"
#include "cuda.h"

namespace smd2 {
namespace cuda {

// How a thread walks along a row: which rows it holds (see TapWindow), and how
// often the loop is unrolled, which saves moves from register to register. With
// kHeld = 3, a token takes 11 loads from shared memory in place of 25; with 5
// it would take 7, and the moves and the registers cost more than that saves.
template <int held, int unroll>
struct Walk {
  static constexpr int kHeld = held, kUnroll = unroll;
};
using FusionWalk = Walk<3, 3>;

// The part of a map that a block of threads processes; neighbouring blocks have
// neighbouring channels of the same tokens.
//
// Numbers of tokens and values take 64 bits. Where a loop goes along a row, it
// adds offsets of 32 bits, within a tile and its halo, to a number of 64: the
// launch code refuses maps whose sides are too long for that.
struct TilePlace {
  int height, width, dim;
  int row_size;  // of the ring buffer of rows in shared memory, halo included
  int channel_block, image, part;
  int tile;            // number of the tile, from left to right
  int x0, x1, y0, y1;  // columns x0 .. x1 - 1, rows y0 .. y1 - 1
  int channel;         // channel of this lane
  bool valid;          // whether there is such a channel

  explicit SMD2_DEVICE TilePlace(const Tiles& t)
      : height(static_cast<int>(t.height)),
        width(static_cast<int>(t.width)),
        dim(static_cast<int>(t.dim)),
        row_size((static_cast<int>(t.tile_width) + 2 * kRadius) * kLanes) {
    const unsigned block = blockIdx.x;
    const unsigned channel_blocks = (dim + kLanes - 1) / kLanes;
    const unsigned tiles = static_cast<unsigned>(t.tiles);
    const unsigned bands = static_cast<unsigned>(t.bands);
    part = static_cast<int>(block / channel_blocks);
    channel_block = static_cast<int>(block % channel_blocks);
    const unsigned row_of_tiles = part / tiles;
    tile = static_cast<int>(part % tiles);
    image = static_cast<int>(row_of_tiles / bands);
    x0 = tile * static_cast<int>(t.tile_width);
    x1 = smaller(x0 + static_cast<int>(t.tile_width), width);
    y0 = static_cast<int>(row_of_tiles % bands) *
         static_cast<int>(t.band_height);
    y1 = smaller(y0 + static_cast<int>(t.band_height), height);
    channel = channel_block * kLanes + static_cast<int>(threadIdx.x);
    valid = channel < dim;
  }
  // Number of the token (x, y) of this image among those of all images.
  SMD2_DEVICE int64_t token(int y, int x) const {
    return (static_cast<int64_t>(image) * height + y) * width + x;
  }
  // The value of token `at` in a tensor [tokens of all images, dim].
  SMD2_DEVICE int64_t value(int64_t at) const {
    return at * dim + channel;
  }
  // The first column of the halo inside the map.
  SMD2_DEVICE int left() const {
    return larger(x0 - kRadius, 0);
  }
};

// Where row y of the map is in the ring buffer of rows.
template <typename Acc>
SMD2_DEVICE int ring_row(const TilePlace& place, int y) {
  return y % (TileShape<Acc>::kRows + 2 * kRadius) * place.row_size;
}

template <typename Acc>
SMD2_DEVICE void
load_taps(const Acc* taps, const TilePlace& place, Acc (&out)[kTaps]) {
#pragma unroll
  for (int k = 0; k < kTaps; k++) {
    out[k] = load(taps + place.channel + k * place.dim, place.valid);
  }
}

// Goes down a band: fill(y, row) writes row y of the map for this lane's
// channel; use(y) may read rows y - 5 to y + 5, as far as the map has them.
template <typename Acc, typename Fill, typename Use>
SMD2_DEVICE void
sweep(const TilePlace& place, Acc* ring, const Fill& fill, const Use& use) {
  constexpr int kRows = TileShape<Acc>::kRows;
  const int warp = threadIdx.y;
  int filled = larger(place.y0 - kRadius, 0);
  for (int y = place.y0; y < place.y1; y += kRows) {
    const int until =
        smaller(smaller(y + kRows, place.y1) + kRadius, place.height);
    for (int row = filled + warp; row < until; row += kRows) {
      fill(row, ring + ring_row<Acc>(place, row));
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

  SMD2_DEVICE void fill(const TilePlace& place, int y, acc_t<T>* row) const {
    const int left = place.left();
    const T* from = h + place.value(place.token(y, left));
#pragma unroll 4
    for (int x = place.x0 - kRadius; x < place.x1 + kRadius; x++) {
      const int inside = smaller(larger(x, 0), place.width - 1);
      *row = load_constant(from + (inside - left) * place.dim, place.valid);
      row += kLanes;
    }
  }
};

// Source: rows of a gradient, zero outside the map.
template <typename T>
struct LoadGradient {
  const T* grad;
  const acc_t<T>* scale;  // factor of each token, or null

  SMD2_DEVICE void fill(const TilePlace& place, int y, acc_t<T>* row) const {
    const int left = place.left();
    const int64_t first = place.token(y, left);
    const T* from = grad + place.value(first);
    const acc_t<T>* scales = scale + (scale ? first : 0);
#pragma unroll 4
    for (int x = place.x0 - kRadius; x < place.x1 + kRadius; x++) {
      const bool inside = x >= 0 && x < place.width;
      const int i = x - left;
      acc_t<T> value =
          load_constant(from + i * place.dim, inside && place.valid);
      if (scale) {
        value *= load_constant(scales + i, inside);
      }
      *row = value;
      row += kLanes;
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
  using Walk = FusionWalk;
  Acc* out;

  struct Token {
    WeightedSum<Acc> fused;

    SMD2_DEVICE
    Token(const StoreFused&, const Acc* weights, const TilePlace& place)
        : fused(weights, place) {}
    SMD2_DEVICE void operator()(
        const StoreFused& sink,
        const TilePlace& place,
        int64_t first,
        int i,
        const Acc (&h)[kTaps]) {
      store(
          sink.out + place.value(first) + i * place.dim, fused(h), place.valid);
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
      Acc* out =
          grad_taps + place.value(static_cast<int64_t>(place.part) * kTaps);
#pragma unroll
      for (int k = 0; k < kTaps; k++) {
        store(out + k * place.dim, sums[k], place.valid);
      }
    }
  }
};

// Sink: sums the gradient of the taps.
template <typename T>
struct GradTaps {
  using Acc = acc_t<T>;
  using Walk = FusionWalk;
  const Acc* grad_out;
  Acc* grad_taps;

  struct Token {
    TapSums<Acc> sums;

    SMD2_DEVICE Token(const GradTaps&, const Acc*, const TilePlace&) {}
    SMD2_DEVICE void operator()(
        const GradTaps& sink,
        const TilePlace& place,
        int64_t first,
        int i,
        const Acc (&h)[kTaps]) {
      const Acc* grad = sink.grad_out + place.value(first);
      sums.add(load_constant(grad + i * place.dim, place.valid), h);
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

// The values that a thread reads of the rows around its token. As the token
// moves along x, most of them are read again, as another tap's: of each row
// whose taps reach at most kHeld columns to either side, the thread holds all
// columns in between, and reads one more for each token. Row 0 is held always.
template <typename Acc, int kHeld>
struct TapWindow {
  static constexpr int kSize = 2 * kRadius + 1;
  Acc values[kSize][kSize];  // only those that are used take a register

  // Columns that the taps of a row reach to either side; -1: no taps.
  static constexpr SMD2_DEVICE int reach(int dy) {
    return dy == 0 ? kRadius : dy % 2 == 0 ? -1 : dy < 0 ? -dy : dy;
  }
  static constexpr SMD2_DEVICE bool held(int dy) {
    return dy == 0 || reach(dy) <= kHeld;
  }
  SMD2_DEVICE Acc at(int dy, int dx) const {
    return values[dy + kRadius][dx + kRadius];
  }
  // Before the first token; read(dy, dx) returns a value relative to it.
  template <typename Read>
  SMD2_DEVICE void start(const Read& read) {
#pragma unroll
    for (int dy = -kRadius; dy <= kRadius; dy++) {
#pragma unroll
      for (int dx = -kRadius; dx < kRadius; dx++) {
        if (held(dy) && dx >= -reach(dy) && dx < reach(dy)) {
          values[dy + kRadius][dx + 1 + kRadius] = read(dy, dx);
        }
      }
    }
  }
  // To the next token; read(dy, dx) returns a value relative to that.
  template <typename Read>
  SMD2_DEVICE void advance(const Read& read) {
#pragma unroll
    for (int dy = -kRadius; dy <= kRadius; dy++) {
      Acc* row = values[dy + kRadius] + kRadius;
#pragma unroll
      for (int dx = -kRadius; dx <= kRadius; dx++) {
        if (held(dy) && dx >= -reach(dy) && dx < reach(dy)) {
          row[dx] = row[dx + 1];
        } else if (
            held(dy) ? dx == reach(dy) : reach(dy) > 0 && dx % reach(dy) == 0) {
          row[dx] = read(dy, dx);
        }
      }
    }
  }
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
  const auto fill = [&](int y, Acc* row) { a.source.fill(place, y, row); };
  const auto use = [&](int y) {
    int rows[2 * kRadius + 1];
#pragma unroll
    for (int dy = -kRadius; dy <= kRadius; dy++) {
      const int inside =
          smaller(larger(y + dy, 0), place.height - 1);  // replicated
      rows[dy + kRadius] = ring_row<Acc>(place, inside) + kRadius * kLanes;
    }
    const int64_t first = place.token(y, place.x0);
    const Acc* column = ring;
    const auto read = [&](int dy, int dx) {
      return column[rows[dy + kRadius] + dx * kLanes];
    };
    TapWindow<Acc, Sink::Walk::kHeld> window;
    window.start(read);
#pragma unroll Sink::Walk::kUnroll
    for (int i = 0; i < place.x1 - place.x0; i++) {
      window.advance(read);
      column += kLanes;
      Acc h[kTaps];
#pragma unroll
      for (int k = 0; k < kTaps; k++) {
        const Offset offset = tap_offset(k);
        h[k] = window.at(offset.dy, offset.dx);
      }
      token(a.sink, place, first, i, h);
    }
  };
  sweep<Acc>(place, ring, fill, use);
  token.finish(a.sink, place, shared);
}

// Positions first .. last of the fused tokens, along one axis, whose tap at
// `offset` reads position `at` of the map. The outermost positions are also
// read through their replicas in the border.
struct Readers {
  int first, last;

  SMD2_DEVICE Readers(int at, int offset, int size) {
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
  const int height = place.height, width = place.width;
  Acc taps[kTaps];
  load_taps(a.taps, place, taps);
  const auto fill = [&](int y, Acc* row) { a.source.fill(place, y, row); };
  const auto use = [&](int y) {
    int rows[2 * kRadius + 1];  // -1: outside the map, where gradients are 0
#pragma unroll
    for (int dy = -kRadius; dy <= kRadius; dy++) {
      const bool inside = y + dy >= 0 && y + dy < height;
      rows[dy + kRadius] =
          inside ? ring_row<Acc>(place, y + dy) + kRadius * kLanes : -1;
    }
    const Acc* column = ring;
    const auto read = [&](int dy, int dx) {
      const int row = rows[dy + kRadius];
      return row < 0 ? Acc(0) : column[row + dx * kLanes];
    };
    Out* out = a.grad_h + place.value(place.token(y, place.x0));
    // The tokens between the map's borders, of which there may be none.
    const bool inner = y > 0 && y < height - 1;
    const int begin = inner ? larger(place.x0, 1) : place.x1;
    const int end = inner ? smaller(place.x1, width - 1) : place.x1;
    if (inner) {
      column += (begin - place.x0) * kLanes;
      TapWindow<Acc, FusionWalk::kHeld> window;
      window.start(read);
#pragma unroll 2
      for (int x = begin; x < end; x++) {
        window.advance(read);
        column += kLanes;
        Acc even = 0, odd = 0;
#pragma unroll
        for (int k = 0; k < kTaps; k++) {
          const Offset offset = tap_offset(k);
          (k % 2 ? odd : even) += taps[k] * window.at(-offset.dy, -offset.dx);
        }
        store(out + (x - place.x0) * place.dim, even + odd, place.valid);
      }
    }
    for (int x = place.x0; x < place.x1; x++) {
      if (x >= begin && x < end) {
        continue;
      }
      Acc sum = 0;
#pragma unroll 1
      for (int k = 0; k < kTaps; k++) {
        const Offset offset = tap_offset(k);
        const Readers ys(y, offset.dy, height), xs(x, offset.dx, width);
        Acc grads = 0;
        for (int ry = ys.first; ry <= ys.last; ry++) {
          const Acc* row = ring + ring_row<Acc>(place, ry);
          for (int rx = xs.first; rx <= xs.last; rx++) {
            grads += row[(rx - place.x0 + kRadius) * kLanes];
          }
        }
        const Acc* tap = a.taps + place.channel + k * place.dim;
        sum += load(tap, place.valid) * grads;
      }
      store(out + (x - place.x0) * place.dim, sum, place.valid);
    }
  };
  sweep<Acc>(place, ring, fill, use);
}

}  // namespace cuda
}  // namespace smd2
