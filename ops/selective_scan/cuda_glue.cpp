// spatial_mamba::selective_scan on CUDA devices; op.py documents it.
#include "../cuda/tensors.h"
#include "cuda.h"

namespace smd2 {
namespace cuda {
namespace {

// The inputs as the kernels want them.
struct Inputs {
  at::Tensor u, delta, A, B, bias, workspace;
  Segments segments;

  Inputs(
      const char* op,
      const at::Tensor& u_,
      const at::Tensor& delta_,
      const at::Tensor& A_,
      const at::Tensor& B_,
      const at::Tensor& bias_) {
    TORCH_CHECK_VALUE(
        u_.dim() == 3 && u_.size(1) && u_.size(2),
        op,
        ": u must be [B, L, D] with L, D >= 1, got ",
        u_.sizes());
    const auto images = u_.size(0), length = u_.size(1), dim = u_.size(2);
    check_arguments(
        op,
        u_,
        {{"delta", delta_, u_.sizes()},
         {"A", A_, {dim}},
         {"B", B_, {images, length}},
         {"delta_bias", bias_, {dim}}});
    const auto type = at::promote_types(u_.scalar_type(), delta_.scalar_type());
    u = as(u_, type);
    delta = as(delta_, type);
    A = as(A_, accumulate_type(type));
    B = as(B_, accumulate_type(type));
    bias = as(bias_, accumulate_type(type));
    segments = sequence_segments(length);
    workspace = at::empty({workspace_size(segments, images, dim)}, A.options());
  }

  template <typename T>
  void fill(ScanArgs<T>* a) const {
    using Acc = acc_t<T>;
    a->u = u.const_data_ptr<T>();
    a->delta = delta.const_data_ptr<T>();
    a->A = A.const_data_ptr<Acc>();
    a->B = B.const_data_ptr<Acc>();
    a->bias = bias.const_data_ptr<Acc>();
    a->workspace = workspace.data_ptr<Acc>();
    a->segments = segments;
    a->images = u.size(0);
    a->dim = u.size(2);
  }
};

at::Tensor selective_scan(
    const at::Tensor& u,
    const at::Tensor& delta,
    const at::Tensor& A,
    const at::Tensor& B,
    const at::Tensor& delta_bias) {
  const OnDeviceOf device(u);
  const Inputs in("selective_scan", u, delta, A, B, delta_bias);
  at::Tensor h = at::empty(in.u.sizes(), in.A.options());
  if (h.numel() == 0) {
    return h;
  }
  SMD2_CUDA_DISPATCH(in.u.scalar_type(), "selective_scan", [&] {
    ScanForwardArgs<scalar_t> args{};
    in.fill(&args);
    args.h = h.data_ptr<acc_t<scalar_t>>();
    scan_forward(args, device.stream());
  });
  return h;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
selective_scan_backward(
    const at::Tensor& grad_h,
    const at::Tensor& u,
    const at::Tensor& delta,
    const at::Tensor& A,
    const at::Tensor& B,
    const at::Tensor& delta_bias) {
  static constexpr char op[] = "selective_scan_backward";
  const OnDeviceOf device(u);
  const Inputs in(op, u, delta, A, B, delta_bias);
  check_arguments(op, u, {{"grad_h", grad_h, u.sizes()}});
  const auto options = in.A.options();
  const auto grad = as(grad_h, in.A.scalar_type());
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
      grad_u.to(u.scalar_type()),
      grad_delta.to(delta.scalar_type()),
      grad_A.sum({0, 1}).to(A.scalar_type()),
      grad_B.sum(0).to(B.scalar_type()),
      grad_bias.sum({0, 1}).to(delta_bias.scalar_type())};
}

SMD2_CUDA_IMPL(m) {
  m.impl("selective_scan", &selective_scan);
  m.impl("selective_scan_backward", &selective_scan_backward);
}

}  // namespace
}  // namespace cuda
}  // namespace smd2
