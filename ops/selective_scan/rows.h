// The recursion of the selective scan, forward and adjoint, over a run of
// tokens and one block of channels. Torch-free.
#pragma once

#include "../common/simd.h"

namespace smd2 {

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

// Step size and what its derivative needs: softplus(x) and e = exp(x), with x
// limited to where softplus is not yet the identity.
template <typename T, int N>
SMD2_INLINE vec<T, N> softplus(vec<T, N> x, vec<T, N>* e) {
  const auto limit = splat<T, N>(20);
  *e = exp<N>(x > limit ? limit : x);
  return x > limit ? x : log1p<N>(*e);
}

// States of tokens [first, first + count) into `out`, N values a token; `h` is
// the state before and after.
template <typename T, int N>
SMD2_INLINE void scan_row(
    const ScanBlock<T, N>& block,
    int64_t first,
    int64_t count,
    vec<acc_t<T>, N>* h,
    acc_t<T>* out) {
  using V = vec<acc_t<T>, N>;
  V state = *h, e;
  for (int64_t t = first; t < first + count; t++, out += N) {
    const V u = load_channels<T, N>(block.u + t * block.stride, block.channels);
    const V delta =
        load_channels<T, N>(block.delta + t * block.stride, block.channels);
    const V step = softplus<acc_t<T>, N>(delta + block.bias, &e);
    state = exp<N>(step * block.A) * state + step * u * block.B[t];
    write<acc_t<T>, N>(out, state);
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
    const V slope = delta + block.bias > splat<acc_t<T>, N>(20)
                        ? splat<acc_t<T>, N>(1)
                        : e / (e + 1);
    const V grad_delta = grad_step * slope;
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
