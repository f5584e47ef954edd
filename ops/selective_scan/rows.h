// The recursion of the selective scan, forward and adjoint, over a run of
// tokens and one block of channels. Torch-free.
#pragma once

#include "../common/simd.h"

namespace smd2 {

constexpr int kPrefetch = 16;  // tokens

// One image, one block of N channels: where its tokens are.
template <typename T, int N>
struct ScanBlock {
  const T* u;  // token 0, first channel of the block
  const T* delta;
  const acc_t<T>* B;
  int64_t stride;  // elements from token to token in u and delta
  int channels;    // of the block, at most N
  vec<acc_t<T>, N> A, bias;
};

// Step size and what its derivative needs, e = exp(-|x|). Beyond 20 it is the
// identity, as PyTorch defines it, which shows in double alone.
template <typename T, int N>
SMD2_INLINE vec<T, N> softplus(vec<T, N> x, vec<T, N>* e) {
  const vec<T, N> size = magnitude<T, N>(x);
  *e = exp_of_small<N>(-size);
  if constexpr (std::is_same_v<T, double>) {
    *e = x > splat<T, N>(20) ? vec<T, N>{} : *e;
  }
  return (x + size) * T(0.5) + log1p<N>(*e);
}

// The derivative of softplus.
template <typename T, int N>
SMD2_INLINE vec<T, N> softplus_slope(vec<T, N> x, vec<T, N> e) {
  return (x < vec<T, N>{} ? e : splat<T, N>(1)) / (e + 1);
}

// Step sizes of tokens [first, first + count) into `out`, N values a token.
//
// A loop of its own, for the processor works on several tokens at once only
// while the chain of operations of each is short. Tokens lie apart, in strides
// that it does not foresee by itself where they are pages.
template <typename T, int N>
SMD2_INLINE void step_row(
    const ScanBlock<T, N>& block,
    int64_t first,
    int64_t count,
    acc_t<T>* out) {
  using V = vec<acc_t<T>, N>;
  const T* u = block.u + first * block.stride;
  const T* delta = block.delta + first * block.stride;
  const int64_t ahead = kPrefetch * block.stride;
  for (int64_t t = 0; t < count; t++) {
    V e;
    __builtin_prefetch(delta + t * block.stride + ahead);
    __builtin_prefetch(u + t * block.stride + ahead);
    const V x = load_channels<T, N>(delta + t * block.stride, block.channels);
    write<acc_t<T>, N>(out + t * N, softplus<acc_t<T>, N>(x + block.bias, &e));
  }
}

// What a token adds to the state, given its step.
template <typename T, int N>
SMD2_INLINE vec<acc_t<T>, N>
gain(const ScanBlock<T, N>& block, int64_t t, vec<acc_t<T>, N> step) {
  return step *
         load_channels<T, N>(block.u + t * block.stride, block.channels) *
         block.B[t];
}

// States of tokens [first, first + count) into `out`; `h` is the state before
// and after.
template <typename T, int N>
SMD2_INLINE void scan_row(
    const ScanBlock<T, N>& block,
    int64_t first,
    int64_t count,
    vec<acc_t<T>, N>* h,
    acc_t<T>* out) {
  using V = vec<acc_t<T>, N>;
  step_row<T, N>(block, first, count, out);
  V state = *h;
  for (int64_t t = 0; t < count; t++) {
    const V step = read<acc_t<T>, N>(out + t * N);
    const V decay = exp<N>(step * block.A);
    state = decay * state + gain<T, N>(block, first + t, step);
    write<acc_t<T>, N>(out + t * N, state);
  }
  *h = state;
}

// scan_row in two parts, the first of which needs no state: factors of the
// states and what is added to them, then the states in place of the latter.
template <typename T, int N>
SMD2_INLINE void prepare_row(
    const ScanBlock<T, N>& block,
    int64_t first,
    int64_t count,
    acc_t<T>* decays,
    acc_t<T>* gains) {
  using V = vec<acc_t<T>, N>;
  step_row<T, N>(block, first, count, gains);
  for (int64_t t = 0; t < count; t++) {
    const V step = read<acc_t<T>, N>(gains + t * N);
    write<acc_t<T>, N>(decays + t * N, exp<N>(step * block.A));
    write<acc_t<T>, N>(gains + t * N, gain<T, N>(block, first + t, step));
  }
}
template <typename T, int N>
SMD2_INLINE void
recur_row(int64_t count, vec<T, N>* h, const T* decays, T* gains) {
  vec<T, N> state = *h;
  for (int64_t t = 0; t < count; t++) {
    state = read<T, N>(decays + t * N) * state + read<T, N>(gains + t * N);
    write<T, N>(gains + t * N, state);
  }
  *h = state;
}

// Where the adjoint puts its results.
template <typename T, int N>
struct ScanGradients {
  T* u;
  T* delta;
  acc_t<T>* B;  // of this block alone
  vec<acc_t<T>, N> A, bias;
};

// Adjoint of scan_row, last token first. `h` and `grad_h` are the states and
// their gradients at token `first`, N values a token; `h_before` is the state
// in front of it. `carry` is decay * gradient of the token after, and becomes
// that of token `first`. `skip_grad` (or null) is added to the gradient of u,
// times `skip`: the observation's D u.
template <typename T, int N>
SMD2_INLINE void scan_row_backward(
    const ScanBlock<T, N>& block,
    int64_t first,
    int64_t count,
    const acc_t<T>* h,
    vec<acc_t<T>, N> h_before,
    const acc_t<T>* grad_h,
    const T* skip_grad,
    vec<acc_t<T>, N> skip,
    vec<acc_t<T>, N>* carry,
    ScanGradients<T, N>* out) {
  using V = vec<acc_t<T>, N>;
  V next = *carry, grad_A{}, grad_bias{}, e;
  for (int64_t i = count - 1; i >= 0; i--) {
    const int64_t t = first + i, at = t * block.stride;
    const V u = load_channels<T, N>(block.u + at, block.channels);
    const V delta = load_channels<T, N>(block.delta + at, block.channels);
    const V step = softplus<acc_t<T>, N>(delta + block.bias, &e);
    const V decay = exp<N>(step * block.A);
    const V g = read<acc_t<T>, N>(grad_h + i * N) + next;
    const V previous = i ? read<acc_t<T>, N>(h + (i - 1) * N) : h_before;
    next = decay * g;
    const V grad_exponent = next * previous;  // with respect to step * A
    grad_A += grad_exponent * step;
    const V grad_step = g * u * block.B[t] + grad_exponent * block.A;
    const V grad_delta =
        grad_step * softplus_slope<acc_t<T>, N>(delta + block.bias, e);
    grad_bias += grad_delta;
    V grad_u = g * step * block.B[t];
    if (skip_grad) {
      grad_u += skip * load_channels<T, N>(skip_grad + at, block.channels);
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
