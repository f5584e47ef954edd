// spatial_mamba::structure_aware_ssm on the CPU; op.py documents it.
//
// The backward pass computes h again, for one block at a time.
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
  // Scratch: the padded states, the gradients of the fused ones with margins,
  // one row of zeros, two rows more.
  template <int N, bool Full>
  SMD2_INLINE void run(const BackwardArgs<T>& a) {
    using Acc = acc_t<T>;
    const SsmBlock<T, N, Full> block(a);
    const int n = block_channels<N, Full>(a);
    const int64_t row_size = (a.width + 2 * kRadius) * N;
    const int64_t grad_size = (a.width + 2 * kMargin) * N;
    const int64_t partial = (a.block * a.images + a.image) * a.tokens();
    const int64_t channel = a.image * a.dim + a.block * N;
    const T* grad_y = a.grad_y + block.at;
    Acc* states = a.scratch;
    Acc* grads = states + a.height * row_size;
    Acc* zeros = grads + a.height * grad_size;
    Acc* row = zeros + grad_size;
    Acc* grad_h = row + row_size;
    std::fill(grads, row, Acc(0));

    vec<Acc, N> h{};
    for (int64_t y = 0; y < a.height; y++) {
      Acc* out = states + y * row_size + kRadius * N;
      scan_row<T, N>(block.scan, y * a.width, a.width, &h, out);
      replicate_row<Acc, N>(out, a.width);
    }

    vec<Acc, N> grad_D{}, grad_taps[kTaps]{};
    for (int64_t y = 0; y < a.height; y++) {
      const auto window =
          window_around<Acc, N>(states, a.height, y, a.height, a.width);
      Acc* grad_fused = grads + y * grad_size + kMargin * N;
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
      fuse_row_grad_input<Acc, N>(
          grads, zeros, block.taps, y, a.height, a.width, row, grad_h);
      const Acc* here = states + y * row_size + kRadius * N;
      const Acc* above = here - row_size + (a.width - 1) * N;
      const auto before = y ? read<Acc, N>(above) : vec<Acc, N>{};
      scan_row_backward<T, N>(
          block.scan,
          y * a.width,
          a.width,
          here,
          before,
          grad_h,
          grad_y,
          block.D,
          &carry,
          &out);
    }
    store_channels<Acc, N>(a.grad_A + channel, out.A, n);
    store_channels<Acc, N>(a.grad_bias + channel, out.bias, n);
    store_channels<Acc, N>(a.grad_D + channel, grad_D, n);
    for (int k = 0; k < kTaps; k++) {
      store_channels<Acc, N>(
          a.grad_taps + (a.image * kTaps + k) * a.dim + a.block * N,
          grad_taps[k],
          n);
    }
  }
};

// The inputs as the kernels want them.
struct Inputs : SsmInputs {
  at::Tensor delta;

  Inputs(
      const at::Tensor& u,
      const at::Tensor& delta_,
      const at::Tensor& A,
      const at::Tensor& B,
      const at::Tensor& C,
      const at::Tensor& D,
      const at::Tensor& bias,
      const at::Tensor& taps)
      : SsmInputs(kOp, kernel_type(u, delta_), u, A, B, C, D, bias, taps) {
    check_shape(kOp, "delta", delta_, u.sizes());
    delta = delta_.to(this->u.scalar_type()).contiguous();
  }

  template <typename T>
  void fill(SsmArgs<T>* a) const {
    SsmInputs::fill(a);
    a->steps.delta = delta.const_data_ptr<T>();
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
  const Inputs in(u, delta, A, B, C, D, delta_bias, taps);
  at::Tensor y = at::empty_like(in.u);
  SMD2_DISPATCH(in.u.scalar_type(), kOp, [&] {
    ForwardArgs<scalar_t> args{};
    in.fill(&args);
    args.y = y.data_ptr<scalar_t>();
    run_forward(args);
  });
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
  const Inputs in(u, delta, A, B, C, D, delta_bias, taps);
  check_shape("structure_aware_ssm_backward", "grad_y", grad_y, u.sizes());
  const auto grad = grad_y.to(in.u.scalar_type()).contiguous();
  const auto images = in.u.size(0), height = in.u.size(1);
  const auto width = in.u.size(2), dim = in.u.size(3);
  const auto blocks = (dim + lanes() - 1) / lanes();
  const auto options = in.A.options();
  at::Tensor grad_u = at::empty_like(in.u), grad_delta = at::empty_like(in.u);
  at::Tensor grad_A = at::empty({images, dim}, options);
  at::Tensor grad_D = at::empty_like(grad_A);
  at::Tensor grad_bias = at::empty_like(grad_A);
  at::Tensor grad_B = at::empty({blocks, images, height, width}, options);
  at::Tensor grad_C = at::empty_like(grad_B);
  at::Tensor grad_taps = at::empty({images, kTaps, dim}, options);
  SMD2_DISPATCH(in.u.scalar_type(), "structure_aware_ssm_backward", [&] {
    using Acc = acc_t<scalar_t>;
    BackwardArgs<scalar_t> shared{};
    in.fill(&shared);
    shared.grad_y = grad.const_data_ptr<scalar_t>();
    shared.grad_u = grad_u.data_ptr<scalar_t>();
    shared.grad_delta = grad_delta.data_ptr<scalar_t>();
    shared.grad_A = grad_A.data_ptr<Acc>();
    shared.grad_B = grad_B.data_ptr<Acc>();
    shared.grad_C = grad_C.data_ptr<Acc>();
    shared.grad_D = grad_D.data_ptr<Acc>();
    shared.grad_bias = grad_bias.data_ptr<Acc>();
    shared.grad_taps = grad_taps.data_ptr<Acc>();
    const int64_t scratch_size =
        lanes() * ((height + 2) * (width + 2 * kRadius) +
                   (height + 1) * (width + 2 * kMargin));
    run_blocks<Backward<scalar_t>, Acc>(shared, images, scratch_size);
  });
  return {
      grad_u.to(u.scalar_type()),
      grad_delta.to(delta.scalar_type()),
      grad_A.sum(0).to(A.scalar_type()),
      grad_B.sum(0).to(B.scalar_type()),
      grad_C.sum(0).to(C.scalar_type()),
      grad_D.sum(0).to(D.scalar_type()),
      grad_bias.sum(0).to(delta_bias.scalar_type()),
      grad_taps.sum(0).to(taps.scalar_type())};
}

TORCH_LIBRARY_IMPL(spatial_mamba, CPU, m) {
  m.impl("structure_aware_ssm", &structure_aware_ssm);
  m.impl("structure_aware_ssm_backward", &structure_aware_ssm_backward);
}

}  // namespace
}  // namespace smd2
