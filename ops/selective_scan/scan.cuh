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

#include "steps.cuh"

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

  // Of a kernel's arguments; in another workspace than its own.
  template <typename Args>
  explicit SMD2_DEVICE Carries(const Args& a) : Carries(a, a.workspace) {}
  template <typename Args>
  SMD2_DEVICE Carries(const Args& a, Acc* workspace) {
    const Segments& segments = a.segments;
    const int64_t rows_size = a.images * segments.rows * a.dim;
    before = reinterpret_cast<Affine<Acc>*>(workspace);
    rows = before + rows_size * segments.per_row;
    row_state = reinterpret_cast<Acc*>(rows + rows_size);
  }
};

// The part of a tensor that a block of threads processes: 32 channels of a row
// of an image. Neighbouring blocks have neighbouring channels of the same
// tokens.
struct RowPlace {
  int dim;
  int channel_block, row, image;
  int channel;  // of this lane
  bool valid;   // whether there is such a channel

  SMD2_DEVICE RowPlace(int64_t rows, int64_t dim_)
      : dim(static_cast<int>(dim_)) {
    const unsigned block = blockIdx.x;
    const unsigned channel_blocks = blocks_of(dim, kLanes);
    const unsigned of_all_images = block / channel_blocks;
    channel_block = static_cast<int>(block % channel_blocks);
    row = static_cast<int>(of_all_images % static_cast<unsigned>(rows));
    image = static_cast<int>(of_all_images / static_cast<unsigned>(rows));
    channel = channel_block * kLanes + static_cast<int>(threadIdx.x);
    valid = channel < dim;
  }
};

// One channel of one image, as the recursion sees it, from its token `begin`
// on: that is token 0.
template <typename T, typename Steps = StoredSteps<T>>
struct Channel {
  using Acc = acc_t<T>;
  const T* u;
  Steps steps;
  const Acc* B;
  int stride;  // from token to token
  Acc A, bias;
  bool valid;

  SMD2_DEVICE Channel(
      const typename Steps::Args& a,
      int image,
      int64_t begin,
      int channel,
      bool valid_)
      : Channel(a, image * a.segments.tokens + begin, channel, valid_) {}

  SMD2_DEVICE Acc biased(int t) const {
    return steps(t, valid) + bias;
  }
  SMD2_DEVICE Acc input(int t) const {
    return load_constant(u + t * stride, valid);
  }
  SMD2_DEVICE Affine<Acc> map(int t, Acc biased_step) const {
    const Acc step = softplus(biased_step);
    return {exp_(step * A), step * input(t) * read(B + t)};
  }
  // Calls visit(t, biased(t)) for each token before `count`, in the order of
  // the recursion or of its adjoint. The loop is unrolled to kUnroll tokens, or
  // to those whose steps are computed together.
  template <int kUnroll, bool kReverse, typename Visit>
  SMD2_DEVICE void for_each(int count, Visit visit) const {
    constexpr int kTokens = Steps::kTokens;
#pragma unroll(kUnroll > kTokens ? kUnroll / kTokens : 1)
    for (int k = 0; k < count; k += kTokens) {
      int tokens[kTokens];
      Acc of_tokens[kTokens];
#pragma unroll
      for (int j = 0; j < kTokens; j++) {
        const int i = j == 0 ? k : smaller(k + j, count - 1);
        tokens[j] = kReverse ? count - 1 - i : i;
      }
      steps.together(tokens, valid, of_tokens);
#pragma unroll
      for (int j = 0; j < kTokens; j++) {
        if (j == 0 || k + j < count) {
          visit(tokens[j], of_tokens[j] + bias);
        }
      }
    }
  }

 private:
  SMD2_DEVICE Channel(
      const typename Steps::Args& a,
      int64_t first,
      int channel,
      bool valid_)
      : u(a.u + first * a.dim + channel),
        steps(a, first, channel, valid_),
        B(a.B + first),
        stride(static_cast<int>(a.dim)),
        A(load(a.A + channel, valid_)),
        bias(load(a.bias + channel, valid_)),
        valid(valid_) {}
};

// The state before segment s of a row: see Carries.
template <typename T>
SMD2_DEVICE acc_t<T> state_before(
    const ScanArgs<T>& a,
    const Carries<acc_t<T>>& carries,
    int image,
    int row,
    int s,
    int channel,
    bool valid) {
  if (!valid) {
    return 0;
  }
  const int64_t at = image * a.segments.rows + row;
  const auto before =
      carries.before[(at * a.segments.per_row + s) * a.dim + channel];
  return before.decay * carries.row_state[at * a.dim + channel] + before.state;
}

// The maps that `reduce` composes, from a token of the image on: those of the
// recursion ...
template <typename T, typename Steps = StoredSteps<T>>
struct ForwardPass : Steps::Args {
  static constexpr bool kReverse = false;

  struct Maps {
    Channel<T, Steps> channel;
    SMD2_DEVICE
    Maps(const ForwardPass& a, const RowPlace& place, int64_t begin)
        : channel(a, place.image, begin, place.channel, place.valid) {}
    SMD2_DEVICE Affine<acc_t<T>> operator()(int t, acc_t<T> biased) const {
      return channel.map(t, biased);
    }
  };
};

// ... or those of its adjoint.
template <typename T, typename Steps = StoredSteps<T>>
struct AdjointPass : Steps::Args {
  static constexpr bool kReverse = true;
  const acc_t<T>* grad_h;

  struct Maps {
    Channel<T, Steps> channel;
    const acc_t<T>* grad_h;
    SMD2_DEVICE
    Maps(const AdjointPass& a, const RowPlace& place, int64_t begin)
        : channel(a, place.image, begin, place.channel, place.valid),
          grad_h(
              a.grad_h + (place.image * a.segments.tokens + begin) * a.dim +
              place.channel) {}
    SMD2_DEVICE Affine<acc_t<T>> operator()(int t, acc_t<T> biased) const {
      const auto decay = exp_(softplus(biased) * channel.A);
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
  const int per_row = static_cast<int>(segments.per_row);
  const RowPlace place(segments.rows, a.dim);
  const Carries<Acc> carries(a);
  const int64_t at = place.image * segments.rows + place.row;

  Affine<Acc> total{1, 0};
  for (int first = 0; first < per_row; first += warps) {
    const int i = first + warp;
    const int s = Pass::kReverse ? per_row - 1 - i : i;
    Affine<Acc> own{1, 0};
    if (i < per_row) {
      const int64_t begin = segments.begin(place.row, s);
      const int count = static_cast<int>(segments.end(place.row, s) - begin);
      const typename Pass::Maps map(a, place, begin);
      map.channel.template for_each<4, Pass::kReverse>(
          count, [&](int t, Acc biased) { own = then(own, map(t, biased)); });
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
  const unsigned rows = static_cast<unsigned>(a.segments.rows);
  const RowPlace place(1, a.dim);
  const Carries<Acc> carries(a);
  // The first rows % warps warps have a row more than the others.
  const int share = static_cast<int>(rows / warps);
  const int more = static_cast<int>(rows % warps);
  const int count = share + (warp < more ? 1 : 0);
  const int begin = warp * share + smaller(warp, more);  // in the pass's order
  const int64_t row = a.reverse ? a.segments.rows - 1 - begin : begin;
  const int64_t at =
      (place.image * a.segments.rows + row) * a.dim + place.channel;
  const int64_t step = a.reverse ? -a.dim : a.dim;  // to the next row

  Affine<Acc> own{1, 0};
  if (place.valid) {
    const Affine<Acc>* map = carries.rows + at;
#pragma unroll 8
    for (int i = 0; i < count; i++) {
      own = then(own, *map);
      map += step;
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
    const Affine<Acc>* map = carries.rows + at;
    Acc* before = carries.row_state + at;
#pragma unroll 8
    for (int i = 0; i < count; i++) {
      *before = state;
      state = map->decay * state + map->state;
      map += step;
      before += step;
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
  const RowPlace place(segments.rows, a.dim);
  const Carries<Acc> carries(a);
  const int per_row = static_cast<int>(segments.per_row);
  for (int s = threadIdx.y; s < per_row; s += static_cast<int>(blockDim.y)) {
    const int64_t begin = segments.begin(place.row, s);
    const int count = static_cast<int>(segments.end(place.row, s) - begin);
    const Channel<T> channel(a, place.image, begin, place.channel, place.valid);
    Acc* h =
        a.h + (place.image * segments.tokens + begin) * a.dim + place.channel;
    Acc state = state_before(
        a, carries, place.image, place.row, s, place.channel, place.valid);
    channel.template for_each<4, false>(count, [&](int t, Acc biased) {
      const auto map = channel.map(t, biased);
      state = map.decay * state + map.state;
      store(h + t * place.dim, state, place.valid);
    });
  }
}

// What apply_adjoint reads of a token.
template <typename Acc>
struct AdjointToken {
  Acc u, biased, B, grad_h, grad_y;

  template <typename T, typename Steps>
  SMD2_DEVICE AdjointToken(
      const Channel<T, Steps>& channel,
      int t,
      const Acc* grads_h,
      const T* grads_y)
      : u(channel.input(t)),
        biased(channel.biased(t)),
        B(read(channel.B + t)),
        grad_h(load_constant(grads_h + t * channel.stride, channel.valid)),
        grad_y(
            grads_y ? load_constant(grads_y + t * channel.stride, channel.valid)
                    : Acc(0)) {}
};

// The same for the adjoint. A warp recomputes the states of its segment and
// keeps them in shared memory.
template <typename T, bool kSkip, typename Steps = StoredSteps<T>>
__global__ void __launch_bounds__(
    kAdjointWarps* kLanes,
    min_blocks<acc_t<T>>(4, 3))
    apply_adjoint(ScanBackwardArgs<T, typename Steps::Args> a) {
  using Acc = acc_t<T>;
  SMD2_SHARED(Acc, shared);  // [warps][kMaxSegment][32]
  const int lane = threadIdx.x, warp = threadIdx.y;
  const Segments& segments = a.segments;
  const RowPlace place(segments.rows, a.dim);
  const Carries<Acc> carries(a), adjoint(a, a.adjoint_workspace);
  const int per_row = static_cast<int>(segments.per_row);
  const Acc D = kSkip ? load(a.D + place.channel, place.valid) : Acc(0);
  Acc* states = shared + warp * kMaxSegment * kLanes + lane;
  Acc sums[3] = {0, 0, 0};  // gradients of A, bias, D

  for (int s = warp; s < per_row; s += static_cast<int>(blockDim.y)) {
    const int64_t begin = segments.begin(place.row, s);
    const int count = static_cast<int>(segments.end(place.row, s) - begin);
    if (count == 0) {
      continue;
    }
    const Channel<T, Steps> channel(
        a, place.image, begin, place.channel, place.valid);
    const int64_t base =
        (place.image * segments.tokens + begin) * a.dim + place.channel;
    const Acc* grads_h = a.grad_h + base;
    const T* grads_y = kSkip ? a.grad_y + base : nullptr;
    Acc* grad_B =
        a.grad_B +
        (place.channel_block * a.images + place.image) * segments.tokens +
        begin;
    const Acc before = state_before(
        a, carries, place.image, place.row, s, place.channel, place.valid);
    Acc state = before;
    channel.template for_each<4, false>(count, [&](int i, Acc biased) {
      const auto map = channel.map(i, biased);
      state = map.decay * state + map.state;
      states[i * kLanes] = state;
    });
    // decay * gradient of the state after the segment
    Acc next = state_before(
        a, adjoint, place.image, place.row, s, place.channel, place.valid);
    // The next token is read before the stores of this one.
    AdjointToken<Acc> ahead(channel, count - 1, grads_h, grads_y);
#pragma unroll 2
    for (int i = count - 1; i >= 0; i--) {
      const AdjointToken<Acc> token = ahead;
      ahead = AdjointToken<Acc>(channel, larger(i - 1, 0), grads_h, grads_y);
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
      const int at = i * place.dim;
      store(a.grad_u + base + at, grad_u, place.valid);
      store(a.grad_delta + base + at, grad_delta, place.valid);
      const Acc of_B = warp_sum(g * step * u);
      if (lane == 0) {
        grad_B[i] = of_B;
      }
    }
  }

  __syncthreads();
  block_sum(sums, shared);
  if (warp == 0) {
    const int64_t at =
        (place.image * segments.rows + place.row) * a.dim + place.channel;
    store(a.grad_A + at, sums[0], place.valid);
    store(a.grad_bias + at, sums[1], place.valid);
    if (kSkip) {
      store(a.grad_D + at, sums[2], place.valid);
    }
  }
}

}  // namespace cuda
}  // namespace smd2
