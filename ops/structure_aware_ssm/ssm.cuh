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

  SMD2_DEVICE void fill(const TilePlace& place, int y, acc_t<T>* row) const {
    using Acc = acc_t<T>;
    const int begin = place.left();
    const int end = smaller(place.x1 + kRadius, place.width);
    const int64_t at = static_cast<int64_t>(y) * place.width + begin;
    const Channel<T, Steps> channel(
        scan, place.image, at, place.channel, place.valid);
    Acc state = state_before(
        scan,
        Carries<Acc>(scan),
        place.image,
        y,
        place.tile,
        place.channel,
        place.valid);
    Acc* out = row + (begin - place.x0 + kRadius) * kLanes;
    channel.template for_each<kUnroll, false>(
        end - begin, [&](int i, Acc biased) {
          const auto map = channel.map(i, biased);
          state = map.decay * state + map.state;
          *out = state;
          out += kLanes;
        });
    for (int x = end; x < place.x1 + kRadius; x++) {
      *out = state;
      out += kLanes;
    }
    const int outside = begin - (place.x0 - kRadius);
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
  using Walk = FusionWalk;
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
        int64_t first,
        int i,
        const Acc (&h)[kTaps]) {
      const Acc state = fused(h);
      const int64_t row = place.value(first);
      const int at = i * place.dim;
      const Acc u = load_constant(sink.u + row + at, place.valid);
      const Acc C = read(sink.C + first + i);
      store(sink.y + row + at, C * state + D * u, place.valid);
    }
    SMD2_DEVICE void finish(const Observe&, const TilePlace&, Acc*) {}
  };
};

// Sink: the gradients that need the states around a token, those of taps and C.
template <typename T>
struct GradObserved {
  using Acc = acc_t<T>;
  using Walk = cuda::Walk<1, 1>;  // its sums and taps take the registers
  const T* grad_y;
  const Acc* C;
  Acc* grad_C;
  Acc* grad_taps;
  int64_t tokens;  // of all images

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
        int64_t first,
        int i,
        const Acc (&h)[kTaps]) {
      const T* row = sink.grad_y + place.value(first);
      const Acc grad_y = load_constant(row + i * place.dim, place.valid);
      sums.add(grad_y * read(sink.C + first + i), h);
      Acc fused = 0;
#pragma unroll
      for (int k = 0; k < kTaps; k++) {
        fused += taps[k] * h[k];
      }
      const Acc grad_C = warp_sum(grad_y * fused);
      if (threadIdx.x == 0) {
        const int64_t row = place.channel_block * sink.tokens + first;
        sink.grad_C[row + i] = grad_C;
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
