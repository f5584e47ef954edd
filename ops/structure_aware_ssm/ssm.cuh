// Kernels of the fused operator: the fusion's, fed by the scan.
//
// Each block of threads computes the states of its tile and halo from the
// state at the tile's left edge, which the scan's first two launches leave
// behind. So h never reaches memory, forward or backward.
#pragma once

#include "../selective_scan/scan.cuh"
#include "../state_fusion/fusion.cuh"
#include "cuda.h"

namespace smd2 {
namespace cuda {

// Rows of states, the outermost columns replicated. kUnroll tokens are in
// flight at once; each takes registers.
template <typename T, int kUnroll>
struct ScanRows {
  ScanArgs<T> scan;

  SMD2_DEVICE void fill(
      const Tiles& tiles,
      const TilePlace& place,
      int64_t y,
      acc_t<T>* row) const {
    using Acc = acc_t<T>;
    const Channel<T> channel(scan, place.image, place.channel, place.valid);
    const Carries<Acc> carries(
        scan.workspace, scan.segments, scan.images, scan.dim);
    Acc state = state_before(
        scan, carries, place.image, y, place.tile, place.channel, place.valid);
    const int64_t begin = larger(place.x0 - kRadius, 0);
    const int64_t end = smaller(place.x1 + kRadius, tiles.width);
    Acc* out = row + (begin - place.x0 + kRadius) * kLanes;
    const int64_t at = y * tiles.width;
#pragma unroll kUnroll
    for (int64_t x = begin; x < end; x++) {
      const auto map = channel.map(at + x);
      state = map.decay * state + map.state;
      *out = state;
      out += kLanes;
    }
    for (int64_t x = end; x < place.x1 + kRadius; x++) {
      *out = state;
      out += kLanes;
    }
    const int outside = static_cast<int>(begin - (place.x0 - kRadius));
    const Acc first = row[outside * kLanes];
    for (int i = 0; i < outside; i++) {
      row[i * kLanes] = first;
    }
  }
};

// What becomes of a fused token: y = C h' + D u.
template <typename T>
struct Observe {
  using Acc = acc_t<T>;
  const T* u;
  const Acc* C;
  const Acc* D;
  T* y;

  struct Token {
    Acc taps[kTaps], D;

    SMD2_DEVICE Token(
        const Observe& sink,
        const Acc* weights,
        const Tiles& tiles,
        const TilePlace& place) {
      load_taps(weights, tiles, place, taps);
      D = load(sink.D + place.channel, place.valid);
    }
    SMD2_DEVICE void operator()(
        const Observe& sink,
        const Tiles& tiles,
        const TilePlace& place,
        int64_t at,
        const Acc (&h)[kTaps]) {
      Acc even = 0, odd = 0;
#pragma unroll
      for (int k = 0; k < kTaps; k++) {
        (k % 2 ? odd : even) += taps[k] * h[k];
      }
      const int64_t i = at * tiles.dim + place.channel;
      const Acc u = load(sink.u + i, place.valid);
      store(sink.y + i, sink.C[at] * (even + odd) + D * u, place.valid);
    }
    SMD2_DEVICE void
    finish(const Observe&, const Tiles&, const TilePlace&, Acc*) {}
  };
};

// The gradients that need the states around a token: those of taps and C.
template <typename T>
struct GradObserved {
  using Acc = acc_t<T>;
  const T* grad_y;
  const Acc* C;
  Acc* grad_C;
  Acc* grad_taps;

  struct Token {
    TapSums<Acc> sums;
    Acc taps[kTaps];

    SMD2_DEVICE Token(
        const GradObserved&,
        const Acc* weights,
        const Tiles& tiles,
        const TilePlace& place) {
      load_taps(weights, tiles, place, taps);
    }
    SMD2_DEVICE void operator()(
        const GradObserved& sink,
        const Tiles& tiles,
        const TilePlace& place,
        int64_t at,
        const Acc (&h)[kTaps]) {
      const Acc grad_y =
          load(sink.grad_y + at * tiles.dim + place.channel, place.valid);
      sums.add(grad_y * sink.C[at], h);
      Acc fused = 0;
#pragma unroll
      for (int k = 0; k < kTaps; k++) {
        fused += taps[k] * h[k];
      }
      const Acc grad_C = warp_sum(grad_y * fused);
      if (threadIdx.x == 0) {
        const int64_t tokens = tiles.images * tiles.height * tiles.width;
        sink.grad_C[place.channel_block * tokens + at] = grad_C;
      }
    }
    SMD2_DEVICE void finish(
        const GradObserved& sink,
        const Tiles& tiles,
        const TilePlace& place,
        Acc* ring) {
      sums.finish(sink.grad_taps, tiles, place, ring);
    }
  };
};

}  // namespace cuda
}  // namespace smd2
