// Kernels of the selective scan, forward and adjoint.
//
// The recursion h_t = decay_t h_{t-1} + drive_t is a chain of affine maps, and
// so is its adjoint m_t = decay_t (grad_h_t + m_{t+1}), from the last token to
// the first. Each of them runs in three launches (for segments and rows see
// cuda.h):
//
//   reduce                composes the maps of each segment; then, for each
//                         segment, those of the segments before it in its row,
//                         and those of the row
//   carry                 passes the state from row to row
//   apply, apply_adjoint  run the recursion in all segments at once
#pragma once

#include "../cuda/channels.cuh"
#include "cuda.h"

namespace smd2 {
namespace cuda {

// Warps of a block. `reduce`, `apply` and `apply_adjoint` have a block for each
// row and 32 channels, whose warps take turns at the row's segments; the
// adjoint also has 4 KiB of states per warp in shared memory. `carry` has a
// block for each image, whose warps divide the rows. More warps shorten these
// loops; the limits are registers, shared memory and the 1024 threads of a
// block. Not tuned on a GPU.
constexpr int kScanWarps = 8;
constexpr int kAdjointWarps = 4;
constexpr int kCarryWarps = 32;

// The affine map h -> decay * h + state.
template <typename Acc>
struct Affine {
  Acc decay, state;
};

// The composition: `first`, then `second`.
template <typename Acc>
SMD2_DEVICE Affine<Acc> then(Affine<Acc> first, Affine<Acc> second) {
  return {
      first.decay * second.decay, second.decay * first.state + second.state};
}

// The workspace of one pass: what is known of the tokens before a segment. For
// segment 2 of row 1 that is
//
//   row 0  | - - - - - - - - - - - - - - - - |  row_state[1]: state after row 0
//   row 1  | - - before[1, 2] - | segment 2  |  before[1, 2]: map of the tokens
//                                               before the segment in its row
//
//   and the state before the segment is before[1, 2] applied to row_state[1].
//
// "Before" and "after" are in the order of the recursion; the adjoint runs from
// the last row to the first and from right to left.
template <typename Acc>
struct Carries {
  // [images, rows, per_row, dim]: map of the segments before this one in its
  // row.
  Affine<Acc>* before;
  Affine<Acc>* rows;  // [images, rows, dim]: map of all segments of the row
  Acc* row_state;     // [images, rows, dim]: state before the row

  SMD2_DEVICE Carries(
      Acc* workspace,
      const Segments& segments,
      int64_t images,
      int64_t dim) {
    const int64_t rows_size = images * segments.rows() * dim;
    before = reinterpret_cast<Affine<Acc>*>(workspace);
    rows = before + rows_size * segments.per_row;
    row_state = reinterpret_cast<Acc*>(rows + rows_size);
  }
};

// The part of a tensor that a block of threads processes: 32 channels of a row
// of an image. Neighbouring blocks have neighbouring channels of the same
// tokens.
struct RowPlace {
  int64_t channel_block, row, image;
  int64_t channel;  // of this lane
  bool valid;       // whether there is such a channel

  SMD2_DEVICE RowPlace(int64_t channel_blocks, int64_t rows, int64_t dim) {
    const int64_t block = blockIdx.x;
    channel_block = block % channel_blocks;
    row = block / channel_blocks % rows;
    image = block / channel_blocks / rows;
    channel = channel_block * kLanes + threadIdx.x;
    valid = channel < dim;
  }
};

// Where the step sizes come from: memory, [images, tokens, dim] ...
template <typename T>
struct StoredSteps {
  using Args = ScanArgs<T>;
  const T* delta;
  int64_t stride;

  SMD2_DEVICE StoredSteps(const Args& a, int64_t image, int64_t channel, bool)
      : delta(a.delta + image * a.segments.tokens * a.dim + channel),
        stride(a.dim) {}
  SMD2_DEVICE acc_t<T> operator()(int64_t t, bool valid) const {
    return load_constant(delta + t * stride, valid);
  }
};

// ... or a product of low rank, in whose place `delta` is the first factor,
// [images, tokens, rank]. The rank is a multiple of 4.
template <typename T>
struct LowRankArgs : ScanArgs<T> {
  const acc_t<T>* dt_weight;  // [rank, dim]
  int64_t rank;
};

template <typename T>
struct LowRankSteps {
  using Args = LowRankArgs<T>;
  using Acc = acc_t<T>;
  static constexpr int kHeld = 4;  // weights in registers, all of a narrow map
  const T* dt;
  const Acc* weight;
  Acc held[kHeld];
  int64_t dim;
  int rank;

  SMD2_DEVICE
  LowRankSteps(const Args& a, int64_t image, int64_t channel, bool valid)
      : dt(a.delta + image * a.segments.tokens * a.rank),
        weight(a.dt_weight + channel),
        dim(a.dim),
        rank(static_cast<int>(a.rank)) {
#pragma unroll
    for (int r = 0; r < kHeld; r++) {
      held[r] = load(weight + r * dim, valid);
    }
  }
  SMD2_DEVICE Acc operator()(int64_t t, bool valid) const {
    const Channels<kHeld, true> factors(0, 1, kHeld);
    const T* token = dt + t * rank;
    Acc values[kHeld], step = 0;
    factors.load(token, true, values);
#pragma unroll
    for (int r = 0; r < kHeld; r++) {
      step += held[r] * values[r];
    }
#pragma unroll 1
    for (int first = kHeld; first < rank; first += kHeld) {
      factors.load(token + first, true, values);
#pragma unroll
      for (int r = 0; r < kHeld; r++) {
        step += load(weight + (first + r) * dim, valid) * values[r];
      }
    }
    return step;
  }
};

// One channel of one image, as the recursion sees it.
template <typename T, typename Steps = StoredSteps<T>>
struct Channel {
  using Acc = acc_t<T>;
  const T* u;
  Steps steps;
  const Acc* B;
  int64_t stride;  // from token to token
  Acc A, bias;
  bool valid;

  SMD2_DEVICE Channel(
      const typename Steps::Args& a,
      int64_t image,
      int64_t channel,
      bool valid_)
      : steps(a, image, channel, valid_) {
    const int64_t tokens = a.segments.tokens;
    u = a.u + image * tokens * a.dim + channel;
    B = a.B + image * tokens;
    stride = a.dim;
    valid = valid_;
    A = load(a.A + channel, valid);
    bias = load(a.bias + channel, valid);
  }

  SMD2_DEVICE Acc biased(int64_t t) const {
    return steps(t, valid) + bias;
  }
  SMD2_DEVICE Acc input(int64_t t) const {
    return load_constant(u + t * stride, valid);
  }
  SMD2_DEVICE Affine<Acc> map(int64_t t) const {
    const Acc step = softplus(biased(t));
    return {exp_(step * A), step * input(t) * read(B + t)};
  }
};

// The state before segment s of a row: see Carries.
template <typename T>
SMD2_DEVICE acc_t<T> state_before(
    const ScanArgs<T>& a,
    const Carries<acc_t<T>>& carries,
    int64_t image,
    int64_t row,
    int64_t s,
    int64_t channel,
    bool valid) {
  if (!valid) {
    return 0;
  }
  const int64_t at = image * a.segments.rows() + row;
  const auto before =
      carries.before[(at * a.segments.per_row + s) * a.dim + channel];
  return before.decay * carries.row_state[at * a.dim + channel] + before.state;
}

// The maps that `reduce` composes: those of the recursion ...
template <typename T, typename Steps = StoredSteps<T>>
struct ForwardPass : Steps::Args {
  static constexpr bool kReverse = false;

  struct Maps {
    Channel<T, Steps> channel;
    SMD2_DEVICE Maps(const ForwardPass& a, const RowPlace& place)
        : channel(a, place.image, place.channel, place.valid) {}
    SMD2_DEVICE Affine<acc_t<T>> operator()(int64_t t) const {
      return channel.map(t);
    }
  };
};

// ... or those of its adjoint.
template <typename T>
struct AdjointPass : ScanArgs<T> {
  static constexpr bool kReverse = true;
  const acc_t<T>* grad_h;

  struct Maps {
    Channel<T> channel;
    const acc_t<T>* grad_h;
    SMD2_DEVICE Maps(const AdjointPass& a, const RowPlace& place)
        : channel(a, place.image, place.channel, place.valid),
          grad_h(
              a.grad_h + place.image * a.segments.tokens * a.dim +
              place.channel) {}
    SMD2_DEVICE Affine<acc_t<T>> operator()(int64_t t) const {
      const auto decay = exp_(softplus(channel.biased(t)) * channel.A);
      const auto grad =
          load_constant(grad_h + t * channel.stride, channel.valid);
      return {decay, decay * grad};
    }
  };
};

// One block per row and 32 channels; in each step of the loop, its warps
// compose `warps` segments, and pass the results on through shared memory.
template <typename T, typename Pass>
__global__ void __launch_bounds__(
    kScanWarps* kLanes,
    min_blocks<acc_t<T>>(2, 2)) reduce(Pass a) {
  using Acc = acc_t<T>;
  SMD2_SHARED(Affine<Acc>, of_warps);  // [warps][32]
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  const Segments& segments = a.segments;
  const int64_t per_row = segments.per_row;
  const RowPlace place(a.channel_blocks(), segments.rows(), a.dim);
  const typename Pass::Maps map(a, place);
  const Carries<Acc> carries(a.workspace, segments, a.images, a.dim);
  const int64_t at = place.image * segments.rows() + place.row;

  Affine<Acc> total{1, 0};
  for (int64_t first = 0; first < per_row; first += warps) {
    const int64_t i = first + warp;
    const int64_t s = Pass::kReverse ? per_row - 1 - i : i;
    Affine<Acc> own{1, 0};
    if (i < per_row) {
      const int64_t begin = segments.begin(place.row, s);
      const int64_t count = segments.end(place.row, s) - begin;
#pragma unroll 4
      for (int64_t k = 0; k < count; k++) {
        own = then(own, map(begin + (Pass::kReverse ? count - 1 - k : k)));
      }
    }
    of_warps[warp * kLanes + lane] = own;
    __syncthreads();
    Affine<Acc> before = total;
    for (int other = 0; other < warps; other++) {
      if (other == warp) {
        before = total;
      }
      total = then(total, of_warps[other * kLanes + lane]);
    }
    if (i < per_row && place.valid) {
      carries.before[(at * per_row + s) * a.dim + place.channel] = before;
    }
    __syncthreads();
  }
  if (warp == 0 && place.valid) {
    carries.rows[at * a.dim + place.channel] = total;
  }
}

template <typename Acc>
struct CarryArgs {
  Acc* workspace;
  Segments segments;
  int64_t images, dim;
  int64_t reverse;  // 0 or 1
};

// One block per image and 32 channels. Each warp composes the maps of its share
// of the rows, gets the state before them from those of the warps before it,
// and passes it through its rows.
template <typename Acc>
__global__ void __launch_bounds__(kCarryWarps* kLanes, 1)
    carry(CarryArgs<Acc> a) {
  SMD2_SHARED(Affine<Acc>, of_warps);  // [warps][32]
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  const int64_t rows = a.segments.rows();
  const RowPlace place(blocks_of(a.dim, kLanes), 1, a.dim);
  const Carries<Acc> carries(a.workspace, a.segments, a.images, a.dim);
  const int64_t base = place.image * rows * a.dim + place.channel;
  const int64_t begin = warp * rows / warps, end = (warp + 1) * rows / warps;

  Affine<Acc> own{1, 0};
  if (place.valid) {
#pragma unroll 8
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = a.reverse ? rows - 1 - i : i;
      own = then(own, carries.rows[base + row * a.dim]);
    }
  }
  of_warps[warp * kLanes + lane] = own;
  __syncthreads();
  Acc state = 0;
  for (int other = 0; other < warp; other++) {
    const auto map = of_warps[other * kLanes + lane];
    state = map.decay * state + map.state;
  }
  if (place.valid) {
#pragma unroll 8
    for (int64_t i = begin; i < end; i++) {
      const int64_t at = base + (a.reverse ? rows - 1 - i : i) * a.dim;
      const auto map = carries.rows[at];
      carries.row_state[at] = state;
      state = map.decay * state + map.state;
    }
  }
}

// One block per row and 32 channels; warp w processes segments w, w + warps,
// ...
template <typename T>
__global__ void __launch_bounds__(
    kScanWarps* kLanes,
    min_blocks<acc_t<T>>(3, 2)) apply(ScanForwardArgs<T> a) {
  using Acc = acc_t<T>;
  const Segments& segments = a.segments;
  const RowPlace place(a.channel_blocks(), segments.rows(), a.dim);
  const Channel<T> channel(a, place.image, place.channel, place.valid);
  const Carries<Acc> carries(a.workspace, segments, a.images, a.dim);
  Acc* h = a.h + place.image * segments.tokens * a.dim + place.channel;
  for (int64_t s = threadIdx.y; s < segments.per_row; s += blockDim.y) {
    Acc state = state_before(
        a, carries, place.image, place.row, s, place.channel, place.valid);
    const int64_t end = segments.end(place.row, s);
#pragma unroll 4
    for (int64_t t = segments.begin(place.row, s); t < end; t++) {
      const auto map = channel.map(t);
      state = map.decay * state + map.state;
      store(h + t * a.dim, state, place.valid);
    }
  }
}

// What apply_adjoint reads of a token.
template <typename Acc>
struct AdjointToken {
  Acc u, biased, B, grad_h, grad_y;

  template <typename T>
  SMD2_DEVICE AdjointToken(
      const ScanBackwardArgs<T>& a,
      const Channel<T>& channel,
      int64_t t,
      int64_t at)
      : u(channel.input(t)),
        biased(channel.biased(t)),
        B(read(channel.B + t)),
        grad_h(load_constant(a.grad_h + at, channel.valid)),
        grad_y(
            a.grad_y ? load_constant(a.grad_y + at, channel.valid) : Acc(0)) {}
};

// The same for the adjoint. A warp recomputes the states of its segment and
// keeps them in shared memory.
template <typename T, bool kSkip>
__global__ void __launch_bounds__(
    kAdjointWarps* kLanes,
    min_blocks<acc_t<T>>(4, 3)) apply_adjoint(ScanBackwardArgs<T> a) {
  using Acc = acc_t<T>;
  SMD2_SHARED(Acc, shared);  // [warps][kMaxSegment][32]
  const int lane = threadIdx.x, warp = threadIdx.y;
  const Segments& segments = a.segments;
  const RowPlace place(a.channel_blocks(), segments.rows(), a.dim);
  const Channel<T> channel(a, place.image, place.channel, place.valid);
  const Carries<Acc> carries(a.workspace, segments, a.images, a.dim);
  const Carries<Acc> adjoint(a.adjoint_workspace, segments, a.images, a.dim);
  const int64_t base = place.image * segments.tokens * a.dim + place.channel;
  const Acc D = kSkip ? load(a.D + place.channel, place.valid) : Acc(0);
  Acc* states = shared + warp * kMaxSegment * kLanes + lane;
  Acc* grad_B = a.grad_B + (place.channel_block * a.images + place.image) *
                               segments.tokens;
  Acc sums[3] = {0, 0, 0};  // gradients of A, bias, D

  for (int64_t s = warp; s < segments.per_row; s += blockDim.y) {
    const int64_t begin = segments.begin(place.row, s);
    const int count = static_cast<int>(segments.end(place.row, s) - begin);
    if (count == 0) {
      continue;
    }
    const Acc before = state_before(
        a, carries, place.image, place.row, s, place.channel, place.valid);
    Acc state = before;
#pragma unroll 4
    for (int i = 0; i < count; i++) {
      const auto map = channel.map(begin + i);
      state = map.decay * state + map.state;
      states[i * kLanes] = state;
    }
    // decay * gradient of the state after the segment
    Acc next = state_before(
        a, adjoint, place.image, place.row, s, place.channel, place.valid);
    // The next token is read before the stores of this one.
    const int64_t last = begin + count - 1;
    AdjointToken<Acc> ahead(a, channel, last, base + last * a.dim);
#pragma unroll 2
    for (int i = count - 1; i >= 0; i--) {
      const int64_t t = begin + i, at = base + t * a.dim;
      const AdjointToken<Acc> token = ahead;
      const int step_back = i > 0 ? 1 : 0;
      ahead =
          AdjointToken<Acc>(a, channel, t - step_back, at - step_back * a.dim);
      const Acc u = token.u, B = token.B;
      Acc slope;
      const Acc step = softplus(token.biased, &slope);
      const Acc g = token.grad_h + next;
      const Acc previous = i > 0 ? states[(i - 1) * kLanes] : before;
      next = exp_(step * channel.A) * g;
      const Acc grad_exponent = next * previous;  // with respect to step * A
      sums[0] += grad_exponent * step;
      const Acc grad_delta = (g * u * B + grad_exponent * channel.A) * slope;
      sums[1] += grad_delta;
      Acc grad_u = g * step * B;
      if (kSkip) {
        grad_u += D * token.grad_y;
        sums[2] += token.grad_y * u;
      }
      store(a.grad_u + at, grad_u, place.valid);
      store(a.grad_delta + at, grad_delta, place.valid);
      const Acc of_B = warp_sum(g * step * u);
      if (lane == 0) {
        grad_B[t] = of_B;
      }
    }
  }

  __syncthreads();
  block_sum(sums, shared);
  if (warp == 0) {
    const int64_t at =
        (place.image * segments.rows() + place.row) * a.dim + place.channel;
    store(a.grad_A + at, sums[0], place.valid);
    store(a.grad_bias + at, sums[1], place.valid);
    if (kSkip) {
      store(a.grad_D + at, sums[2], place.valid);
    }
  }
}

}  // namespace cuda
}  // namespace smd2
