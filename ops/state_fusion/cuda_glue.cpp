// spatial_mamba::state_fusion on CUDA devices; op.py documents it.
#include "../cuda/tensors.h"
#include "cuda.h"

namespace smd2 {
namespace cuda {
namespace {

constexpr const char* kOp = "state_fusion";

// The inputs, checked, in the dtype and layout that kernels take.
struct Inputs {
  at::Tensor h, taps;
  Tiles tiles;

  Inputs(const char* op, const at::Tensor& h_, const at::Tensor& taps_) {
    TORCH_CHECK_VALUE(
        h_.dim() == 4 && h_.size(1) && h_.size(2) && h_.size(3),
        op,
        ": h must be [B, H, W, D] with H, W, D >= 1, got ",
        h_.sizes());
    check_arguments(op, h_, {{"taps", taps_, {kTaps, h_.size(3)}}});
    h = h_.contiguous();
    taps = contiguous_as(taps_, accumulate_type(h.scalar_type()));
    tiles = cut_for_device(
        h.scalar_type() == at::kDouble,
        h.size(0),
        h.size(1),
        h.size(2),
        h.size(3));
  }

  template <typename T>
  void fill(FusionArgs<T>* a) const {
    a->h = h.const_data_ptr<T>();
    a->taps = taps.const_data_ptr<acc_t<T>>();
    a->tiles = tiles;
  }
};

at::Tensor state_fusion(const at::Tensor& h, const at::Tensor& taps) {
  const OnDeviceOf device(h);
  const Inputs in(kOp, h, taps);
  at::Tensor out = at::empty(h.sizes(), in.taps.options());
  if (out.numel() == 0) {
    return out;
  }
  SMD2_CUDA_DISPATCH(h.scalar_type(), kOp, [&] {
    FusionForwardArgs<scalar_t> args{};
    in.fill(&args);
    args.out = out.data_ptr<acc_t<scalar_t>>();
    fusion_forward(args, device.stream());
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> state_fusion_backward(
    const at::Tensor& grad_output,
    const at::Tensor& h,
    const at::Tensor& taps) {
  static constexpr char op[] = "state_fusion_backward";
  const OnDeviceOf device(h);
  const Inputs in(op, h, taps);
  check_arguments(op, h, {{"grad_output", grad_output, h.sizes()}});
  const auto grad = contiguous_as(grad_output, in.taps.scalar_type());
  at::Tensor grad_h = at::empty_like(in.h);
  at::Tensor grad_taps =
      at::empty({in.tiles.parts(), kTaps, h.size(3)}, in.taps.options());
  if (h.numel()) {
    SMD2_CUDA_DISPATCH(h.scalar_type(), op, [&] {
      using Acc = acc_t<scalar_t>;
      FusionBackwardArgs<scalar_t> args{};
      in.fill(&args);
      args.grad_out = grad.const_data_ptr<Acc>();
      args.grad_h = grad_h.data_ptr<scalar_t>();
      args.grad_taps = grad_taps.data_ptr<Acc>();
      fusion_backward(args, device.stream());
    });
  }
  return {grad_h, grad_taps.sum(0).to(taps.scalar_type())};
}

SMD2_CUDA_IMPL(m) {
  m.impl("state_fusion", &state_fusion);
  m.impl("state_fusion_backward", &state_fusion_backward);
}

}  // namespace
}  // namespace cuda
}  // namespace smd2
