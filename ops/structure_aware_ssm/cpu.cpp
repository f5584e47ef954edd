// spatial_mamba::structure_aware_ssm on the CPU; op.py documents it.
//
// The backward pass recomputes h, one block at a time.
#include "rows.h"

namespace smd2 {
namespace {

constexpr const char* kOp = "structure_aware_ssm";

template <typename T>
struct BackwardArgs : SsmArgs<T> {
  const T* grad_y;
  T* grad_u;
  T* grad_delta;
  acc_t<T>* grad_A;     // [images, dim]
  acc_t<T>* grad_B;     // [blocks, images, tokens]
  acc_t<T>* grad_C;     // [blocks, images, tokens]
  acc_t<T>* grad_D;     // [images, dim]
  acc_t<T>* grad_bias;  // [images, dim]
  acc_t<T>* grad_taps;  // [images, 25, dim]
};

template <typename T>
struct Backward {
  template <int N, bool Full>
  SMD2_INLINE void run(const BackwardArgs<T>& a) {
    using Acc = acc_t<T>;
    const SsmBlock<T, N, Full> block(a);
    const int n = block_channels<N, Full>(a);
    const int64_t partial = (a.block * a.images + a.image) * a.tokens();
    const int64_t channel = a.image * a.dim + a.block * N;
    const T* grad_y = a.grad_y + block.at;
    const FusionTape<Acc, N> tape(a.scratch, a.height, a.width);

    vec<Acc, N> h{};
    for (int64_t y = 0; y < a.height; y++) {
      Acc* row = tape.map.row(y);
      scan_row<T, N>(block.scan, y * a.width, a.width, &h, row);
      replicate_row<Acc, N>(row, a.width);
    }

    vec<Acc, N> grad_D{}, grad_taps[kTaps]{};
    for (int64_t y = 0; y < a.height; y++) {
      const auto window = window_around<Acc, N>(tape.map, y, a.height);
      Acc* grad_fused = tape.grad_row(y);
      vec<Acc, N> row_grad_D{};
      const auto one = [&](int64_t x, auto fused) SMD2_LAMBDA {
        const int64_t t = y * a.width + x;
        const auto dy = load_channels<T, N>(grad_y + t * a.dim, n);
        const auto u = load_channels<T, N>(block.scan.u + t * a.dim, n);
        a.grad_C[partial + t] = sum<Acc, N>(dy * fused);
        row_grad_D += dy * u;
        write<Acc, N>(grad_fused + x * N, dy * block.C[t]);
      };
      fuse_row<Acc, N>(window, block.taps, a.width, one);
      grad_D += row_grad_D;
      fuse_row_grad_taps<Acc, N>(window, grad_fused, a.width, grad_taps);
    }

    ScanGradients<T, N> out{};
    out.u = a.grad_u + block.at;
    out.delta = a.grad_delta + block.at;
    out.B = a.grad_B + partial;
    vec<Acc, N> carry{};
    for (int64_t y = a.height - 1; y >= 0; y--) {
      fuse_row_grad_input<Acc, N>(tape, block.taps, y);
      const auto before =
          y ? read<Acc, N>(tape.map.row(y - 1) + (a.width - 1) * N)
            : vec<Acc, N>{};
      const RowAdjoint<T, N> row{
          tape.map.row(y), before, tape.out, grad_y, block.D};
      scan_row_backward<T, N>(
          block.scan, y * a.width, a.width, row, &carry, &out);
    }
    store_channels<Acc, N>(a.grad_A + channel, out.A, n);
    store_channels<Acc, N>(a.grad_bias + channel, out.bias, n);
    store_channels<Acc, N>(a.grad_D + channel, grad_D, n);
    Acc* sums = a.grad_taps + a.image * kTaps * a.dim;
    store_taps<Acc, N>(grad_taps, a.dim, a.block * N, n, sums);
  }
};

Tensor structure_aware_ssm(const SsmTensors& inputs) {
  inputs.check(kOp);
  const auto in = inputs.as(kernel_type(inputs.u, inputs.delta));
  Tensor y = empty_like(in.u);
  SMD2_DISPATCH(in.u.scalar_type(), kOp, [&] {
    ForwardArgs<scalar_t> args{};
    fill(in, &args);
    args.y = y.mutable_data_ptr<scalar_t>();
    run_forward(args);
  });
  return as_type(y, inputs.u.scalar_type());
}

SsmGradientTensors structure_aware_ssm_backward(
    const Tensor& grad_output,
    const SsmTensors& inputs) {
  constexpr const char* op = "structure_aware_ssm_backward";
  inputs.check(op);
  check_arguments(op, {{"grad_output", grad_output, inputs.u.sizes()}});
  const auto in = inputs.as(kernel_type(inputs.u, inputs.delta));
  const auto grad = contiguous_as(grad_output, in.u.scalar_type());
  const auto images = in.u.size(0), height = in.u.size(1);
  const auto width = in.u.size(2), dim = in.u.size(3);
  const auto blocks = channel_blocks(dim, lanes_of(in.A.scalar_type()));
  const auto options = in.A;
  Tensor grad_u = empty_like(in.u), grad_delta = empty_like(in.u);
  Tensor grad_A = empty({images, dim}, options);
  Tensor grad_D = empty_like(grad_A);
  Tensor grad_bias = empty_like(grad_A);
  Tensor grad_B = empty({blocks, images, height, width}, options);
  Tensor grad_C = empty_like(grad_B);
  Tensor grad_taps = empty({images, kTaps, dim}, options);
  SMD2_DISPATCH(in.u.scalar_type(), op, [&] {
    using Acc = acc_t<scalar_t>;
    BackwardArgs<scalar_t> shared{};
    fill(in, &shared);
    shared.grad_y = grad.const_data_ptr<scalar_t>();
    shared.grad_u = grad_u.mutable_data_ptr<scalar_t>();
    shared.grad_delta = grad_delta.mutable_data_ptr<scalar_t>();
    shared.grad_A = grad_A.mutable_data_ptr<Acc>();
    shared.grad_B = grad_B.mutable_data_ptr<Acc>();
    shared.grad_C = grad_C.mutable_data_ptr<Acc>();
    shared.grad_D = grad_D.mutable_data_ptr<Acc>();
    shared.grad_bias = grad_bias.mutable_data_ptr<Acc>();
    shared.grad_taps = grad_taps.mutable_data_ptr<Acc>();
    run_blocks<Backward<scalar_t>, Acc>(
        shared, images, tape_size(height, width, lanes<Acc>()));
  });
  return {
      as_type(grad_u, inputs.u.scalar_type()),
      as_type(grad_delta, inputs.delta.scalar_type()),
      sum_first(grad_A, inputs.A.scalar_type()),
      sum_first(grad_B, inputs.B.scalar_type()),
      sum_first(grad_C, inputs.C.scalar_type()),
      sum_first(grad_D, inputs.D.scalar_type()),
      sum_first(grad_bias, inputs.delta_bias.scalar_type()),
      sum_first(grad_taps, inputs.taps.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(spatial_mamba, CPU, m) {
  m.impl(
      "structure_aware_ssm",
      TORCH_BOX((forward_kernel<structure_aware_ssm, 8>)));
  m.impl(
      "structure_aware_ssm_backward",
      TORCH_BOX((backward_kernel<structure_aware_ssm_backward, 8>)));
}

}  // namespace
}  // namespace smd2
