// Kernels of structure_aware_ssm: those of the fusion, with states from the
// scan.
//
// Each block of threads computes the states of its tile and halo from the state
// at the tile's left edge, which the scan's first two launches leave in the
// workspace. So h is never written to memory, forward or backward.
#pragma once

#include "../selective_scan/scan.cuh"
#include "../state_fusion/fusion.cuh"

namespace smd2 {
namespace cuda {

// Source: rows of states, the outermost columns replicated. The loop over
// tokens is unrolled kUnroll times; more loads in flight take more registers.
template <typename T, int kUnroll, typename Steps = StoredSteps<T>>
struct ScanRows {
  typename Steps::Args scan;

  SMD2_DEVICE void fill(const TilePlace& place, int64_t y, acc_t<T>* row)
      const {
    using Acc = acc_t<T>;
    const Channel<T, Steps> channel(
        scan, place.image, place.channel, place.valid);
    const Carries<Acc> carries(
        scan.workspace, scan.segments, scan.images, scan.dim);
    Acc state = state_before(
        scan, carries, place.image, y, place.tile, place.channel, place.valid);
    const int64_t begin = larger(place.x0 - kRadius, 0);
    const int64_t end = smaller(place.x1 + kRadius, place.map.width);
    Acc* out = row + (begin - place.x0 + kRadius) * kLanes;
    const int64_t at = y * place.map.width;
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

// Sink: writes the observation y = C h' + D u.
template <typename T>
struct Observe {
  using Acc = acc_t<T>;
  const T* u;
  const Acc* C;
  const Acc* D;
  T* y;

  struct Token {
    WeightedSum<Acc> fused;
    Acc D;

    SMD2_DEVICE
    Token(const Observe& sink, const Acc* weights, const TilePlace& place)
        : fused(weights, place), D(load(sink.D + place.channel, place.valid)) {}
    SMD2_DEVICE void operator()(
        const Observe& sink,
        const TilePlace& place,
        int64_t at,
        const Acc (&h)[kTaps]) {
      const Acc state = fused(h);
      const int64_t i = place.value(at);
      const Acc u = load_constant(sink.u + i, place.valid);
      store(sink.y + i, read(sink.C + at) * state + D * u, place.valid);
    }
    SMD2_DEVICE void finish(const Observe&, const TilePlace&, Acc*) {}
  };
};

// Sink: the gradients that need the states around a token, those of taps and C.
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

    SMD2_DEVICE
    Token(const GradObserved&, const Acc* weights, const TilePlace& place) {
      load_taps(weights, place, taps);
    }
    SMD2_DEVICE void operator()(
        const GradObserved& sink,
        const TilePlace& place,
        int64_t at,
        const Acc (&h)[kTaps]) {
      const Acc grad_y =
          load_constant(sink.grad_y + place.value(at), place.valid);
      sums.add(grad_y * read(sink.C + at), h);
      Acc fused = 0;
#pragma unroll
      for (int k = 0; k < kTaps; k++) {
        fused += taps[k] * h[k];
      }
      const Acc grad_C = warp_sum(grad_y * fused);
      if (threadIdx.x == 0) {
        const Tiles& map = place.map;
        const int64_t tokens = map.images * map.height * map.width;
        sink.grad_C[place.channel_block * tokens + at] = grad_C;
      }
    }
    SMD2_DEVICE void
    finish(const GradObserved& sink, const TilePlace& place, Acc* ring) {
      sums.finish(sink.grad_taps, place, ring);
    }
  };
};

}  // namespace cuda
}  // namespace smd2
