// spatial_mamba::state_fusion on the CPU; op.py documents it.
#include "../cpu/tensors.h"
#include "rows.h"

namespace smd2 {
namespace {

constexpr const char* kOp = "state_fusion";

// Pointers to contiguous tensors; a kernel processes one block of one image.
template <typename T>
struct FusionArgs {
  const T* h;
  const acc_t<T>* taps;  // [25, dim]
  int64_t height, width, dim;
  int64_t image, block;
  acc_t<T>* scratch;

  // First value of the block in row y of a tensor [images, height, width, dim].
  template <int N>
  int64_t offset(int64_t y) const {
    return (image * height + y) * width * dim + block * N;
  }
};

// One row of a tensor [.., width, dim] into `out`, N values a token.
template <typename T, int N>
SMD2_INLINE void gather_row(
    const T* row,
    int64_t width,
    int64_t dim,
    int channels,
    acc_t<T>* out) {
  for (int64_t x = 0; x < width; x++) {
    write<acc_t<T>, N>(
        out + x * N, load_channels<T, N>(row + x * dim, channels));
  }
}

template <typename T>
struct ForwardArgs : FusionArgs<T> {
  acc_t<T>* out;
};

template <typename T>
struct Forward {
  template <int N, bool Full>
  SMD2_INLINE void run(const ForwardArgs<T>& a) {
    using Acc = acc_t<T>;
    const int n = block_channels<N, Full>(a);
    vec<Acc, N> taps[kTaps];
    load_taps<Acc, N>(a.taps, a.dim, a.block * N, n, taps);
    const auto produce = [&](int64_t y, Acc* row) SMD2_LAMBDA {
      gather_row<T, N>(a.h + a.template offset<N>(y), a.width, a.dim, n, row);
    };
    const auto use = [&](int64_t y, const Window<Acc>& window) SMD2_LAMBDA {
      Acc* out = a.out + a.template offset<N>(y);
      fuse_row<Acc, N>(
          window, taps, a.width, [&](int64_t x, auto fused) SMD2_LAMBDA {
            store_channels<Acc, N>(out + x * a.dim, fused, n);
          });
    };
    sweep_rows<Acc, N>(a.scratch, a.height, a.width, produce, use);
  }
};

template <typename T>
struct BackwardArgs : FusionArgs<T> {
  const acc_t<T>* grad_out;
  T* grad_h;
  acc_t<T>* grad_taps;  // [images, 25, dim]
};

template <typename T>
struct Backward {
  template <int N, bool Full>
  SMD2_INLINE void run(const BackwardArgs<T>& a) {
    using Acc = acc_t<T>;
    const int n = block_channels<N, Full>(a);
    const FusionTape<Acc, N> tape(a.scratch, a.height, a.width);
    vec<Acc, N> taps[kTaps], grad_taps[kTaps]{};
    load_taps<Acc, N>(a.taps, a.dim, a.block * N, n, taps);
    for (int64_t y = 0; y < a.height; y++) {
      const int64_t at = a.template offset<N>(y);
      gather_row<T, N>(a.h + at, a.width, a.dim, n, tape.map.row(y));
      replicate_row<Acc, N>(tape.map.row(y), a.width);
      gather_row<Acc, N>(a.grad_out + at, a.width, a.dim, n, tape.grad_row(y));
    }
    for (int64_t y = 0; y < a.height; y++) {
      fuse_row_grad_taps<Acc, N>(
          window_around<Acc, N>(tape.map, y, a.height),
          tape.grad_row(y),
          a.width,
          grad_taps);
      fuse_row_grad_input<Acc, N>(tape, taps, y);
      T* grad_h = a.grad_h + a.template offset<N>(y);
      for (int64_t x = 0; x < a.width; x++) {
        store_channels<T, N>(
            grad_h + x * a.dim, read<Acc, N>(tape.out + x * N), n);
      }
    }
    Acc* sums = a.grad_taps + a.image * kTaps * a.dim;
    store_taps<Acc, N>(grad_taps, a.dim, a.block * N, n, sums);
  }
};

// The inputs, checked, in the dtype and layout that kernels take.
struct Inputs {
  Tensor h, taps;

  Inputs(const Tensor& h_, const Tensor& taps_) {
    SMD2_CHECK_VALUE(
        h_.dim() == 4 && h_.size(1) && h_.size(2),
        kOp,
        ": h must be [B, H, W, D] with H, W >= 1, got ",
        text(h_.sizes()));
    check_arguments(kOp, {{"taps", taps_, {kTaps, h_.size(3)}}});
    h = contiguous_as(h_, kernel_type(h_, h_));
    taps = small(taps_, h);
  }

  template <typename T>
  void fill(FusionArgs<T>* a) const {
    a->h = h.const_data_ptr<T>();
    a->taps = taps.const_data_ptr<acc_t<T>>();
    a->height = h.size(1);
    a->width = h.size(2);
    a->dim = h.size(3);
  }
};

Tensor state_fusion(const Tensor& h, const Tensor& taps) {
  const Inputs in(h, taps);
  Tensor out = empty(h.sizes(), in.taps);
  SMD2_DISPATCH(in.h.scalar_type(), kOp, [&] {
    using Acc = acc_t<scalar_t>;
    ForwardArgs<scalar_t> shared{};
    in.fill(&shared);
    shared.out = out.mutable_data_ptr<Acc>();
    run_blocks<Forward<scalar_t>, Acc>(
        shared, h.size(0), sweep_size(shared.width, lanes<Acc>()));
  });
  return out;
}

std::tuple<Tensor, Tensor> state_fusion_backward(
    const Tensor& grad_output,
    const Tensor& h,
    const Tensor& taps) {
  constexpr const char* op = "state_fusion_backward";
  const Inputs in(h, taps);
  check_arguments(op, {{"grad_output", grad_output, h.sizes()}});
  const auto grad = small(grad_output, in.h);
  Tensor grad_h = empty_like(in.h);
  Tensor grad_taps = empty({h.size(0), kTaps, h.size(3)}, in.taps);
  SMD2_DISPATCH(in.h.scalar_type(), op, [&] {
    using Acc = acc_t<scalar_t>;
    BackwardArgs<scalar_t> shared{};
    in.fill(&shared);
    shared.grad_out = grad.const_data_ptr<Acc>();
    shared.grad_h = grad_h.mutable_data_ptr<scalar_t>();
    shared.grad_taps = grad_taps.mutable_data_ptr<Acc>();
    run_blocks<Backward<scalar_t>, Acc>(
        shared,
        h.size(0),
        tape_size(shared.height, shared.width, lanes<Acc>()));
  });
  return {
      as_type(grad_h, h.scalar_type()),
      sum_first(grad_taps, taps.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(spatial_mamba, CPU, m) {
  m.impl("state_fusion", TORCH_BOX(&state_fusion));
  m.impl("state_fusion_backward", TORCH_BOX(&state_fusion_backward));
}

}  // namespace
}  // namespace smd2
