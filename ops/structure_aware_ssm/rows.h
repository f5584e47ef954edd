// Scan, fusion and observation of an image and one block of channels: what the
// forward pass, which structure_aware_ssm and structure_aware_ssm_from_dt
// share, and the backward pass have in common.
#pragma once

#include "../cpu/tensors.h"
#include "../selective_scan/rows.h"
#include "../state_fusion/rows.h"
#include "tensors.h"

namespace smd2 {

// Pointers to contiguous tensors; a kernel processes one block of one image.
template <typename T>
struct SsmArgs {
  const T* u;
  Steps<T> steps;
  const acc_t<T>* A;
  const acc_t<T>* B;
  const acc_t<T>* C;
  const acc_t<T>* D;
  const acc_t<T>* bias;
  const acc_t<T>* taps;  // [25, dim]
  int64_t images, height, width, dim;
  int64_t image, block;
  acc_t<T>* scratch;

  int64_t tokens() const {
    return height * width;
  }
};

// One block of one image, as both the forward and the backward pass need it.
template <typename T, int N, bool Full>
struct SsmBlock {
  ScanBlock<T, N> scan;
  const acc_t<T>* C;
  vec<acc_t<T>, N> D, taps[kTaps];
  int64_t at;  // first value of the block in [images, tokens, dim]

  explicit __attribute__((always_inline)) SsmBlock(const SsmArgs<T>& a) {
    using Acc = acc_t<T>;
    const int64_t c = a.block * N;
    const int n = block_channels<N, Full>(a);
    at = a.image * a.tokens() * a.dim + c;
    scan = {
        a.u + at,
        a.steps.template of_block<N>(a.image * a.tokens(), a.dim, a.block),
        a.B + a.image * a.tokens(),
        a.dim,
        n,
        load_channels<Acc, N>(a.A + c, n),
        load_channels<Acc, N>(a.bias + c, n)};
    C = a.C + a.image * a.tokens();
    D = load_channels<Acc, N>(a.D + c, n);
    load_taps<Acc, N>(a.taps, a.dim, c, n, taps);
  }
};

template <typename T>
struct ForwardArgs : SsmArgs<T> {
  T* y;
};

// Sets args.y. Defined in cpu_forward.cpp, which is compiled once for both
// operators.
template <typename T>
void run_forward(const ForwardArgs<T>& args);

// Sets all that SsmArgs has of the inputs; without a delta, the caller sets
// what the steps are computed from.
template <typename T>
void fill(const SsmTensors& in, SsmArgs<T>* a) {
  using Acc = acc_t<T>;
  fill_scan<T>(in, a);
  if (in.delta.defined()) {
    a->steps.delta = in.delta.const_data_ptr<T>();
  }
  a->C = in.C.const_data_ptr<Acc>();
  a->D = in.D.const_data_ptr<Acc>();
  a->taps = in.taps.const_data_ptr<Acc>();
  a->images = in.u.size(0);
  a->height = in.u.size(1);
  a->width = in.u.size(2);
  a->dim = in.u.size(3);
}

}  // namespace smd2
