// spatial_mamba::structure_aware_ssm on CUDA devices; op.py documents it.
#include "../cuda/tensors.h"
#include "cuda.h"

namespace smd2 {
namespace cuda {
namespace {

// The inputs as the kernels want them.
struct Inputs {
  at::Tensor u, delta, A, B, C, D, bias, taps, workspace;
  Tiles tiles;

  Inputs(
      const char* op,
      const at::Tensor& u_,
      const at::Tensor& delta_,
      const at::Tensor& A_,
      const at::Tensor& B_,
      const at::Tensor& C_,
      const at::Tensor& D_,
      const at::Tensor& bias_,
      const at::Tensor& taps_) {
    TORCH_CHECK_VALUE(
        u_.dim() == 4 && u_.size(1) && u_.size(2) && u_.size(3),
        op,
        ": u must be [B, H, W, D] with H, W, D >= 1, got ",
        u_.sizes());
    const auto tokens = u_.sizes().slice(0, 3);
    const auto dim = u_.size(3);
    check_arguments(
        op,
        u_,
        {{"delta", delta_, u_.sizes()},
         {"A", A_, {dim}},
         {"B", B_, tokens},
         {"C", C_, tokens},
         {"D", D_, {dim}},
         {"delta_bias", bias_, {dim}},
         {"taps", taps_, {kTaps, dim}}});
    const auto type = at::promote_types(u_.scalar_type(), delta_.scalar_type());
    const auto wide = accumulate_type(type);
    u = as(u_, type);
    delta = as(delta_, type);
    A = as(A_, wide);
    B = as(B_, wide);
    C = as(C_, wide);
    D = as(D_, wide);
    bias = as(bias_, wide);
    taps = as(taps_, wide);
    tiles = cut_for_device(
        wide == at::kDouble, u.size(0), u.size(1), u.size(2), dim);
    workspace = at::empty(
        {workspace_size(image_segments(tiles), u.size(0), dim)}, A.options());
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
    a->segments = image_segments(tiles);
    a->images = tiles.images;
    a->dim = tiles.dim;
  }
};

at::Tensor structure_aware_ssm(
    const at::Tensor& u,
    const at::Tensor& delta,
    const at::Tensor& A,
    const at::Tensor& B,
    const at::Tensor& C,
    const at::Tensor& D,
    const at::Tensor& delta_bias,
    const at::Tensor& taps) {
  const OnDeviceOf device(u);
  const Inputs in(
      "structure_aware_ssm", u, delta, A, B, C, D, delta_bias, taps);
  at::Tensor y = at::empty_like(in.u);
  if (y.numel()) {
    SMD2_CUDA_DISPATCH(in.u.scalar_type(), "structure_aware_ssm", [&] {
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
  return y.to(u.scalar_type());
}

std::tuple<
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor>
structure_aware_ssm_backward(
    const at::Tensor& grad_y,
    const at::Tensor& u,
    const at::Tensor& delta,
    const at::Tensor& A,
    const at::Tensor& B,
    const at::Tensor& C,
    const at::Tensor& D,
    const at::Tensor& delta_bias,
    const at::Tensor& taps) {
  static constexpr char op[] = "structure_aware_ssm_backward";
  const OnDeviceOf device(u);
  const Inputs in(op, u, delta, A, B, C, D, delta_bias, taps);
  check_arguments(op, u, {{"grad_y", grad_y, u.sizes()}});
  const auto grad = as(grad_y, in.u.scalar_type());
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
      grad_u.to(u.scalar_type()),
      grad_delta.to(delta.scalar_type()),
      grad_A.sum({0, 1}).to(A.scalar_type()),
      grad_B.sum(0).to(B.scalar_type()),
      grad_C.sum(0).to(C.scalar_type()),
      grad_D.sum({0, 1}).to(D.scalar_type()),
      grad_bias.sum({0, 1}).to(delta_bias.scalar_type()),
      grad_taps.sum(0).to(taps.scalar_type())};
}

SMD2_CUDA_IMPL(m) {
  m.impl("structure_aware_ssm", &structure_aware_ssm);
  m.impl("structure_aware_ssm_backward", &structure_aware_ssm_backward);
}

}  // namespace
}  // namespace cuda
}  // namespace smd2
