// spatial_mamba::structure_aware_ssm on CUDA devices; op.py documents it.
#include "../cuda/tensors.h"
#include "cuda.h"
#include "tensors.h"

namespace smd2 {
namespace cuda {
namespace {

constexpr const char* kOp = "structure_aware_ssm";

// The inputs, checked, in the dtype and layout that kernels take.
struct Inputs : SsmTensors {
  at::Tensor workspace;
  Tiles tiles;

  Inputs(const char* op, const SsmTensors& inputs) {
    inputs.check(op);
    static_cast<SsmTensors&>(*this) = inputs.as(
        at::promote_types(inputs.u.scalar_type(), inputs.delta.scalar_type()));
    tiles = cut_for_device(
        A.scalar_type() == at::kDouble,
        u.size(0),
        u.size(1),
        u.size(2),
        u.size(3));
    workspace = at::empty(
        {workspace_size(image_segments(tiles), u.size(0), u.size(3))},
        A.options());
  }

  template <typename T>
  void fill(ScanArgs<T>* a) const {
    fill_scan<T>(*this, a);
    a->delta = delta.const_data_ptr<T>();
    a->workspace = workspace.data_ptr<acc_t<T>>();
    a->segments = image_segments(tiles);
    a->images = tiles.images;
    a->dim = tiles.dim;
  }
};

at::Tensor structure_aware_ssm(const SsmTensors& inputs) {
  const OnDeviceOf device(inputs.u);
  const Inputs in(kOp, inputs);
  at::Tensor y = at::empty_like(in.u);
  if (y.numel()) {
    SMD2_CUDA_DISPATCH(in.u.scalar_type(), kOp, [&] {
      using Acc = acc_t<scalar_t>;
      SsmForwardArgs<scalar_t> args{};
      in.fill(&args.scan);
      args.tiles = in.tiles;
      args.C = in.C.const_data_ptr<Acc>();
      args.D = in.D.const_data_ptr<Acc>();
      args.taps = in.taps.const_data_ptr<Acc>();
      args.y = y.data_ptr<scalar_t>();
      ssm_forward(args, device.stream());
    });
  }
  return y.to(inputs.u.scalar_type());
}

SsmGradientTensors structure_aware_ssm_backward(
    const at::Tensor& grad_output,
    const SsmTensors& inputs) {
  static constexpr char op[] = "structure_aware_ssm_backward";
  const OnDeviceOf device(inputs.u);
  const Inputs in(op, inputs);
  check_arguments(
      op, inputs.u, {{"grad_output", grad_output, inputs.u.sizes()}});
  const auto grad = contiguous_as(grad_output, in.u.scalar_type());
  const auto options = in.A.options();
  const auto images = in.u.size(0), height = in.u.size(1);
  const auto width = in.u.size(2), dim = in.u.size(3);
  at::Tensor workspace = at::empty_like(in.workspace);
  at::Tensor grad_h = at::empty(in.u.sizes(), options);
  at::Tensor grad_u = at::empty_like(in.u), grad_delta = at::empty_like(in.u);
  at::Tensor grad_A = at::empty({images, height, dim}, options);
  at::Tensor grad_D = at::empty_like(grad_A);
  at::Tensor grad_bias = at::empty_like(grad_A);
  at::Tensor grad_B =
      at::empty({blocks_of(dim, kLanes), images, height, width}, options);
  at::Tensor grad_C = at::empty_like(grad_B);
  at::Tensor grad_taps = at::empty({in.tiles.parts(), kTaps, dim}, options);
  if (images) {
    SMD2_CUDA_DISPATCH(in.u.scalar_type(), op, [&] {
      using Acc = acc_t<scalar_t>;
      SsmBackwardArgs<scalar_t> args{};
      in.fill(&args.scan);
      args.scan.grad_h = args.grad_h = grad_h.data_ptr<Acc>();
      args.scan.adjoint_workspace = workspace.data_ptr<Acc>();
      args.scan.grad_u = grad_u.data_ptr<scalar_t>();
      args.scan.grad_delta = grad_delta.data_ptr<scalar_t>();
      args.scan.grad_A = grad_A.data_ptr<Acc>();
      args.scan.grad_B = grad_B.data_ptr<Acc>();
      args.scan.grad_bias = grad_bias.data_ptr<Acc>();
      args.scan.grad_y = grad.const_data_ptr<scalar_t>();
      args.scan.D = in.D.const_data_ptr<Acc>();
      args.scan.grad_D = grad_D.data_ptr<Acc>();
      args.tiles = in.tiles;
      args.C = in.C.const_data_ptr<Acc>();
      args.taps = in.taps.const_data_ptr<Acc>();
      args.grad_C = grad_C.data_ptr<Acc>();
      args.grad_taps = grad_taps.data_ptr<Acc>();
      ssm_backward(args, device.stream());
    });
  }
  return {
      grad_u.to(inputs.u.scalar_type()),
      grad_delta.to(inputs.delta.scalar_type()),
      grad_A.sum({0, 1}).to(inputs.A.scalar_type()),
      grad_B.sum(0).to(inputs.B.scalar_type()),
      grad_C.sum(0).to(inputs.C.scalar_type()),
      grad_D.sum({0, 1}).to(inputs.D.scalar_type()),
      grad_bias.sum({0, 1}).to(inputs.delta_bias.scalar_type()),
      grad_taps.sum(0).to(inputs.taps.scalar_type())};
}

SMD2_CUDA_IMPL(m) {
  m.impl("structure_aware_ssm", forward_kernel<structure_aware_ssm, 8>);
  m.impl(
      "structure_aware_ssm_backward",
      backward_kernel<structure_aware_ssm_backward, 8>);
}

}  // namespace
}  // namespace cuda
}  // namespace smd2
