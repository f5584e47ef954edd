// The recursion of the selective scan, forward and adjoint, over a run of
// tokens and one block of channels. Torch-free.
#pragma once

#include <limits>

#include "../cpu/simd.h"

namespace smd2 {

// Both constants were tuned on two cores of an AMD EPYC (AVX-512), for the
// blocks of the tiny backbone on 640 x 896 pixels. Any value gives the same
// results.
//
// Tokens between a prefetch and its use. Fewer, and memory is not there in
// time; more, and the cache holds what is not needed yet.
constexpr int kPrefetch = 16;
// Tokens whose steps and decays are computed together. They are independent, so
// that the operations on one hide the latency of those on the others; more
// would spill vector registers.
constexpr int kTogether = 8;

// The source of step sizes, before bias and softplus: `delta`, with one value
// for each of u, or, if rank > 0, the products dt W^T, each a sum of `rank`
// terms.
template <typename T>
struct Steps {
  const T* delta;
  const acc_t<T>* dt;      // [tokens, rank]
  const acc_t<T>* weight;  // [blocks, rank, lanes()]
  int64_t rank;

  // The steps of one block, from token `token` on.
  template <int N>
  __attribute__((always_inline)) Steps
  of_block(int64_t token, int64_t dim, int64_t block) const {
    if (rank) {
      return {nullptr, dt + token * rank, weight + block * rank * N, rank};
    }
    return {delta + token * dim + block * N, nullptr, nullptr, 0};
  }
};

// The inputs of the scan of one image and one block of N channels.
template <typename T, int N>
struct ScanBlock {
  const T* u;  // token 0, first channel of the block
  Steps<T> steps;
  const acc_t<T>* B;
  int64_t stride;  // elements from token to token in u and delta
  int channels;    // number of channels in the block, at most N
  vec<acc_t<T>, N> A, bias;

  // Step sizes of S tokens from t on, with the bias.
  template <int S>
  __attribute__((always_inline)) void load_steps(
      int64_t t,
      vec<acc_t<T>, N>* out) const {
    if (steps.rank) {
      const int64_t rank = steps.rank;
      const acc_t<T>* dt = steps.dt + t * rank;
      each<S>([&](int s) SMD2_LAMBDA { out[s] = bias; });
      for (int64_t r = 0; r < rank; r++) {
        const auto weight = read<acc_t<T>, N>(steps.weight + r * N);
        each<S>([&](int s)
                    SMD2_LAMBDA { out[s] += weight * dt[s * rank + r]; });
      }
    } else {
      const T* delta = steps.delta + t * stride;
      each<S>([&](int s) SMD2_LAMBDA {
        __builtin_prefetch(delta + (s + kPrefetch) * stride);
        out[s] = load_channels<T, N>(delta + s * stride, channels) + bias;
      });
    }
  }
};

// x[s] = softplus(x[s]), and e[s] = exp(-|x[s]|), which softplus_slope takes.
// Above 20 it is the identity, as PyTorch defines it; in float the formula
// gives that anyway.
template <typename T, int N, int S>
SMD2_INLINE void softplus(vec<T, N>* x, vec<T, N>* e) {
  using V = vec<T, N>;
  const auto limit = exp_limit<T, N>();
  V size[S], rest[S];
  each<S>([&](int s) SMD2_LAMBDA { size[s] = magnitude<T, N>(x[s]); });
  each<S>([&](int s) SMD2_LAMBDA { e[s] = at_most<T, N>(size[s], limit); });
  exp_of_products<N, S>(e, splat<T, N>(-kExpUnit<T>));
  if constexpr (std::is_same_v<T, double>) {
    each<S>([&](int s)
                SMD2_LAMBDA { e[s] = x[s] > splat<T, N>(20) ? V{} : e[s]; });
  }
  each<S>([&](int s) SMD2_LAMBDA { rest[s] = e[s]; });
  log1p<N, S>(rest);
  each<S>([&](int s)
              SMD2_LAMBDA { x[s] = (x[s] + size[s]) * T(0.5) + rest[s]; });
}

// The derivative of softplus.
template <typename T, int N>
SMD2_INLINE vec<T, N> softplus_slope(vec<T, N> x, vec<T, N> e) {
  return (x < vec<T, N>{} ? e : splat<T, N>(1)) / (e + 1);
}

// exp(step * A) for steps >= 0, clamped to 2^-126 .. 2^126 in float.
template <typename T, int N>
struct Decay {
  vec<T, N> rate, limit;

  explicit __attribute__((always_inline)) Decay(vec<T, N> A) {
    const auto most = splat<T, N>(std::numeric_limits<T>::max());
    rate = A * kExpUnit<T>;
    rate = at_most<T, N>(at_least<T, N>(rate, -most), most);
    limit = kExpLimit<T> / magnitude<T, N>(rate);
  }

  template <int S>
  __attribute__((always_inline)) void operator()(
      const vec<T, N>* step,
      vec<T, N>* decay) const {
    each<S>([&](int s)
                SMD2_LAMBDA { decay[s] = at_most<T, N>(step[s], limit); });
    exp_of_products<N, S>(decay, rate);
  }
};

// The state after token t, given the one before. One function for all callers,
// so that the compiler contracts, and rounds, the expression in the same way.
template <typename T, int N>
SMD2_INLINE vec<acc_t<T>, N> update(
    const ScanBlock<T, N>& block,
    int64_t t,
    vec<acc_t<T>, N> decay,
    vec<acc_t<T>, N> drive,
    vec<acc_t<T>, N> state) {
  return decay * state + drive * block.B[t];
}

// Calls body(t, decay, drive) for each of S tokens from t on, with the
// arguments of `update`.
//
// Prefetches explicitly, because the hardware prefetchers do not cross pages
// and successive tokens may be a page apart.
template <typename T, int N, int S, typename Body>
SMD2_INLINE void for_updates(
    const ScanBlock<T, N>& block,
    const Decay<acc_t<T>, N>& decay_of,
    int64_t t,
    const Body& body) {
  using V = vec<acc_t<T>, N>;
  const T* u = block.u + t * block.stride;
  V step[S], rest[S], decay[S];
  each<S>([&](int s) SMD2_LAMBDA {
    __builtin_prefetch(u + (s + kPrefetch) * block.stride);
  });
  block.template load_steps<S>(t, step);
  softplus<acc_t<T>, N, S>(step, rest);
  decay_of.template operator()<S>(step, decay);
  each<S>([&](int s) SMD2_LAMBDA {
    const V input = load_channels<T, N>(u + s * block.stride, block.channels);
    body(t + s, decay[s], step[s] * input);
  });
}
template <typename T, int N, typename Body>
SMD2_INLINE void for_updates(
    const ScanBlock<T, N>& block,
    int64_t first,
    int64_t count,
    const Body& body) {
  const Decay<acc_t<T>, N> decay_of(block.A);
  int64_t t = first;
  for (; t + kTogether <= first + count; t += kTogether) {
    for_updates<T, N, kTogether>(block, decay_of, t, body);
  }
  for (; t < first + count; t++) {
    for_updates<T, N, 1>(block, decay_of, t, body);
  }
}

// Writes the states of tokens [first, first + count) to `out`, N values a
// token. `h` is the state before the first token, and becomes that after the
// last.
template <typename T, int N>
SMD2_INLINE void scan_row(
    const ScanBlock<T, N>& block,
    int64_t first,
    int64_t count,
    vec<acc_t<T>, N>* h,
    acc_t<T>* out) {
  using V = vec<acc_t<T>, N>;
  V state = *h;
  for_updates<T, N>(
      block, first, count, [&](int64_t t, V decay, V drive) SMD2_LAMBDA {
        state = update<T, N>(block, t, decay, drive, state);
        write<acc_t<T>, N>(out + (t - first) * N, state);
      });
  *h = state;
}

// scan_row in two parts. The first one needs no state: it writes the arguments
// of the updates. The second one overwrites the drives with the states.
template <typename T, int N>
SMD2_INLINE void prepare_row(
    const ScanBlock<T, N>& block,
    int64_t first,
    int64_t count,
    acc_t<T>* decays,
    acc_t<T>* drives) {
  using V = vec<acc_t<T>, N>;
  for_updates<T, N>(
      block, first, count, [&](int64_t t, V decay, V drive) SMD2_LAMBDA {
        write<acc_t<T>, N>(decays + (t - first) * N, decay);
        write<acc_t<T>, N>(drives + (t - first) * N, drive);
      });
}
template <typename T, int N>
SMD2_INLINE void recur_row(
    const ScanBlock<T, N>& block,
    int64_t first,
    int64_t count,
    vec<acc_t<T>, N>* h,
    const acc_t<T>* decays,
    acc_t<T>* drives) {
  vec<acc_t<T>, N> state = *h;
  for (int64_t i = 0; i < count; i++) {
    const auto decay = read<acc_t<T>, N>(decays + i * N);
    const auto drive = read<acc_t<T>, N>(drives + i * N);
    state = update<T, N>(block, first + i, decay, drive, state);
    write<acc_t<T>, N>(drives + i * N, state);
  }
  *h = state;
}

// Results of the adjoint.
template <typename T, int N>
struct ScanGradients {
  T* u;
  T* delta;
  acc_t<T>* B;  // the sum over this block of channels alone
  vec<acc_t<T>, N> A, bias;
};

// What the adjoint of scan_row takes for its tokens, N values each.
template <typename T, int N>
struct RowAdjoint {
  const acc_t<T>* h;          // their states
  vec<acc_t<T>, N> h_before;  // the state before the first token
  const acc_t<T>* grad_h;     // gradients of their states
  // Of an observation y = ... + skip * u, which adds skip * grad_y to the
  // gradient of u: grad_y from token 0 on, or null without one.
  const T* grad_y;
  vec<acc_t<T>, N> skip;
};

// Adjoint of scan_row, last token first. `carry` is decay * gradient of the
// state after the last token, and becomes that of the first token.
template <typename T, int N>
SMD2_INLINE void scan_row_backward(
    const ScanBlock<T, N>& block,
    int64_t first,
    int64_t count,
    const RowAdjoint<T, N>& row,
    vec<acc_t<T>, N>* carry,
    ScanGradients<T, N>* out) {
  using V = vec<acc_t<T>, N>;
  const Decay<acc_t<T>, N> decay_of(block.A);
  V next = *carry, grad_A{}, grad_bias{}, x, step, e, decay;
  for (int64_t i = count - 1; i >= 0; i--) {
    const int64_t t = first + i, at = t * block.stride;
    const V u = load_channels<T, N>(block.u + at, block.channels);
    block.template load_steps<1>(t, &x);
    step = x;
    softplus<acc_t<T>, N, 1>(&step, &e);
    decay_of.template operator()<1>(&step, &decay);
    const V g = read<acc_t<T>, N>(row.grad_h + i * N) + next;
    const V previous =
        i ? read<acc_t<T>, N>(row.h + (i - 1) * N) : row.h_before;
    next = decay * g;
    const V grad_exponent = next * previous;  // with respect to step * A
    grad_A += grad_exponent * step;
    const V grad_step = g * u * block.B[t] + grad_exponent * block.A;
    const V grad_delta = grad_step * softplus_slope<acc_t<T>, N>(x, e);
    grad_bias += grad_delta;
    V grad_u = g * step * block.B[t];
    if (row.grad_y) {
      grad_u += row.skip * load_channels<T, N>(row.grad_y + at, block.channels);
    }
    out->B[t] = sum<acc_t<T>, N>(g * step * u);
    store_channels<T, N>(out->u + at, grad_u, block.channels);
    store_channels<T, N>(out->delta + at, grad_delta, block.channels);
  }
  *carry = next;
  out->A += grad_A;
  out->bias += grad_bias;
}

}  // namespace smd2
