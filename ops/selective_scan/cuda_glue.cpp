// spatial_mamba::selective_scan on CUDA devices; op.py documents it.
#include "../cuda/tensors.h"
#include "cuda.h"
#include "tensors.h"

namespace smd2 {
namespace cuda {
namespace {

constexpr const char* kOp = "selective_scan";

// The inputs, checked, in the dtype and layout that kernels take.
struct Inputs : ScanTensors {
  at::Tensor workspace;
  Segments segments;

  Inputs(const char* op, const ScanTensors& inputs) {
    inputs.check(op);
    static_cast<ScanTensors&>(*this) = inputs.as(
        at::promote_types(inputs.u.scalar_type(), inputs.delta.scalar_type()));
    segments = sequence_segments(u.size(1));
    workspace = at::empty(
        {workspace_size(segments, u.size(0), u.size(2))}, A.options());
  }

  template <typename T>
  void fill(ScanArgs<T>* a) const {
    fill_scan<T>(*this, a);
    a->delta = delta.const_data_ptr<T>();
    a->workspace = workspace.data_ptr<acc_t<T>>();
    a->segments = segments;
    a->images = u.size(0);
    a->dim = u.size(2);
  }
};

at::Tensor selective_scan(const ScanTensors& inputs) {
  const OnDeviceOf device(inputs.u);
  const Inputs in(kOp, inputs);
  at::Tensor h = at::empty(in.u.sizes(), in.A.options());
  if (h.numel() == 0) {
    return h;
  }
  SMD2_CUDA_DISPATCH(in.u.scalar_type(), kOp, [&] {
    ScanForwardArgs<scalar_t> args{};
    in.fill(&args);
    args.h = h.data_ptr<acc_t<scalar_t>>();
    scan_forward(args, device.stream());
  });
  return h;
}

ScanGradientTensors selective_scan_backward(
    const at::Tensor& grad_output,
    const ScanTensors& inputs) {
  static constexpr char op[] = "selective_scan_backward";
  const OnDeviceOf device(inputs.u);
  const Inputs in(op, inputs);
  check_arguments(
      op, inputs.u, {{"grad_output", grad_output, inputs.u.sizes()}});
  const auto options = in.A.options();
  const auto grad = contiguous_as(grad_output, in.A.scalar_type());
  const auto images = in.u.size(0), length = in.u.size(1), dim = in.u.size(2);
  at::Tensor workspace = at::empty_like(in.workspace);
  at::Tensor grad_u = at::empty_like(in.u), grad_delta = at::empty_like(in.u);
  at::Tensor grad_A = at::empty({images, in.segments.rows(), dim}, options);
  at::Tensor grad_bias = at::empty_like(grad_A);
  at::Tensor grad_B =
      at::empty({blocks_of(dim, kLanes), images, length}, options);
  if (images) {
    SMD2_CUDA_DISPATCH(in.u.scalar_type(), op, [&] {
      using Acc = acc_t<scalar_t>;
      ScanBackwardArgs<scalar_t> args{};
      in.fill(&args);
      args.grad_h = grad.const_data_ptr<Acc>();
      args.adjoint_workspace = workspace.data_ptr<Acc>();
      args.grad_u = grad_u.data_ptr<scalar_t>();
      args.grad_delta = grad_delta.data_ptr<scalar_t>();
      args.grad_A = grad_A.data_ptr<Acc>();
      args.grad_B = grad_B.data_ptr<Acc>();
      args.grad_bias = grad_bias.data_ptr<Acc>();
      scan_carries<scalar_t>(args, device.stream());
      scan_backward(args, device.stream());
    });
  }
  return {
      grad_u.to(inputs.u.scalar_type()),
      grad_delta.to(inputs.delta.scalar_type()),
      grad_A.sum({0, 1}).to(inputs.A.scalar_type()),
      grad_B.sum(0).to(inputs.B.scalar_type()),
      grad_bias.sum({0, 1}).to(inputs.delta_bias.scalar_type())};
}

SMD2_CUDA_IMPL(m) {
  m.impl("selective_scan", forward_kernel<selective_scan, 5>);
  m.impl(
      "selective_scan_backward", backward_kernel<selective_scan_backward, 5>);
}

}  // namespace
}  // namespace cuda
}  // namespace smd2
