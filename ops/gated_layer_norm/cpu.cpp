// spatial_mamba::gated_layer_norm on the CPU; op.py documents it.
#include "../cpu/moments.h"
#include "../cpu/tensors.h"

namespace smd2 {
namespace {

constexpr const char* kOp = "gated_layer_norm";

// Tokens that a thread processes at a time. Fewer balance threads better; more
// have fewer partial sums of the weights' gradients.
constexpr int64_t kTokensPerPart = 128;

// Tokens are `dim` elements apart in y, and `z_stride` in z.
template <typename T>
struct NormArgs {
  const T* y;
  const T* z;
  const acc_t<T>* weight;
  const acc_t<T>* bias;
  int64_t z_stride, dim;
  acc_t<T> eps;
  int64_t part, first, last;
};

template <typename T>
struct ForwardArgs : NormArgs<T> {
  T* out;
};

template <typename T>
struct Forward {
  template <int N>
  SMD2_INLINE void run(const ForwardArgs<T>& a) {
    using V = vec<acc_t<T>, N>;
    const T* z = a.z;
    T* out = a.out;
    const int64_t z_stride = a.z_stride, dim = a.dim;
    normalize<T, N>(
        a.y,
        dim,
        a.weight,
        a.bias,
        a.eps,
        a.first,
        a.last,
        [=](auto count, int64_t t, int64_t c, int n, V* normal) SMD2_LAMBDA {
          constexpr int S = decltype(count)::value;
          const T* from = z + t * z_stride + c;
          T* to = out + t * dim + c;
          V gate[S];
          each<S>([&](int s) SMD2_LAMBDA {
            gate[s] = load_channels<T, N>(from + s * z_stride, n);
          });
          silu<acc_t<T>, N, S>(gate);
          each<S>([&](int s) SMD2_LAMBDA {
            store_channels<T, N>(to + s * dim, normal[s] * gate[s], n);
          });
        });
  }
};

template <typename T>
struct BackwardArgs : NormArgs<T> {
  const T* grad;
  T* grad_y;
  T* grad_z;
  acc_t<T>* grad_weights;  // [parts, 2, dim], 0 at first: weight, bias
};

template <typename T>
struct Backward {
  template <int N>
  SMD2_INLINE void run(const BackwardArgs<T>& a) {
    using Acc = acc_t<T>;
    Acc* grad_weight = a.grad_weights + 2 * a.part * a.dim;
    Acc* grad_bias = grad_weight + a.dim;
    for (int64_t t = a.first; t < a.last; t++) {
      const T* y = a.y + t * a.dim;
      const T* z = a.z + t * a.z_stride;
      const T* grad = a.grad + t * a.dim;
      Moments<T> m;
      moments_of<T, N, 1>(y, a.dim, a.eps, &m);
      // Sums over channels of the gradient of the normalized values, and of
      // its product with the values.
      vec<Acc, N> total{}, product{};
      for_channels<N>(a.dim, [&](int64_t c, int n) SMD2_LAMBDA {
        const auto normal = (load_channels<T, N>(y + c, n) - m.mean) * m.scale;
        const auto weight = load_channels<Acc, N>(a.weight + c, n);
        const auto norm =
            normal * weight + load_channels<Acc, N>(a.bias + c, n);
        const auto gate = load_channels<T, N>(z + c, n);
        auto open = gate;
        sigmoid<Acc, N, 1>(&open);
        const auto g = load_channels<T, N>(grad + c, n);
        const auto grad_norm = g * gate * open;
        store_channels<T, N>(
            a.grad_z + t * a.dim + c,
            g * norm * open * (1 + gate * (1 - open)),
            n);
        store_channels<Acc, N>(
            grad_weight + c,
            load_channels<Acc, N>(grad_weight + c, n) + grad_norm * normal,
            n);
        store_channels<Acc, N>(
            grad_bias + c,
            load_channels<Acc, N>(grad_bias + c, n) + grad_norm,
            n);
        total += grad_norm * weight;  // 0 after the last channel, because g is
        product += grad_norm * weight * normal;
      });
      const Acc mean = sum<Acc, N>(total) / a.dim;
      const Acc slope = sum<Acc, N>(product) / a.dim;
      for_channels<N>(a.dim, [&](int64_t c, int n) SMD2_LAMBDA {
        const auto normal = (load_channels<T, N>(y + c, n) - m.mean) * m.scale;
        const auto gate = load_channels<T, N>(z + c, n);
        auto open = gate;
        sigmoid<Acc, N, 1>(&open);
        const auto grad_normal = load_channels<T, N>(grad + c, n) * gate *
                                 open * load_channels<Acc, N>(a.weight + c, n);
        store_channels<T, N>(
            a.grad_y + t * a.dim + c,
            m.scale * (grad_normal - mean - normal * slope),
            n);
      });
    }
  }
};

// The inputs, checked, in the dtype and layout that kernels take.
struct Inputs {
  at::Tensor y, z, weight, bias;

  Inputs(
      const at::Tensor& y_,
      const at::Tensor& z_,
      const at::Tensor& weight_,
      const at::Tensor& bias_) {
    TORCH_CHECK_VALUE(
        y_.dim() == 4 && y_.size(3),
        kOp,
        ": y must be [B, H, W, D] with D >= 1, got ",
        y_.sizes());
    const auto dim = y_.size(3);
    check_arguments(
        kOp,
        y_,
        {{"z", z_, y_.sizes()},
         {"weight", weight_, {dim}},
         {"bias", bias_, {dim}}});
    const auto type = kernel_type(y_, z_);
    y = contiguous_as(y_, type);
    z = even_tokens(z_.to(type));
    weight = small(weight_, y);
    bias = small(bias_, y);
  }

  int64_t tokens() const {
    return y.numel() / y.size(3);
  }
  int64_t parts() const {
    return num_parts(tokens(), kTokensPerPart);
  }

  template <typename T>
  void fill(NormArgs<T>* a, double eps) const {
    a->y = y.const_data_ptr<T>();
    a->z = z.const_data_ptr<T>();
    a->z_stride = token_stride(z);
    a->weight = weight.const_data_ptr<acc_t<T>>();
    a->bias = bias.const_data_ptr<acc_t<T>>();
    a->dim = y.size(3);
    a->eps = eps;
  }
};

at::Tensor gated_layer_norm(
    const at::Tensor& y,
    const at::Tensor& z,
    const at::Tensor& weight,
    const at::Tensor& bias,
    double eps) {
  const Inputs in(y, z, weight, bias);
  at::Tensor out = at::empty_like(in.y);
  SMD2_DISPATCH(in.y.scalar_type(), kOp, [&] {
    ForwardArgs<scalar_t> args{};
    in.fill(&args, eps);
    args.out = out.data_ptr<scalar_t>();
    run_parts<Forward<scalar_t>>(args, in.tokens(), kTokensPerPart);
  });
  return out.to(y.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>
gated_layer_norm_backward(
    const at::Tensor& grad_output,
    const at::Tensor& y,
    const at::Tensor& z,
    const at::Tensor& weight,
    const at::Tensor& bias,
    double eps) {
  constexpr const char* op = "gated_layer_norm_backward";
  const Inputs in(y, z, weight, bias);
  check_arguments(op, y, {{"grad_output", grad_output, y.sizes()}});
  const auto grad = contiguous_as(grad_output, in.y.scalar_type());
  at::Tensor grad_y = at::empty_like(in.y), grad_z = at::empty_like(in.y);
  at::Tensor grad_weights =
      at::zeros({in.parts(), 2, in.y.size(3)}, in.weight.options());
  SMD2_DISPATCH(in.y.scalar_type(), op, [&] {
    BackwardArgs<scalar_t> args{};
    in.fill(&args, eps);
    args.grad = grad.const_data_ptr<scalar_t>();
    args.grad_y = grad_y.data_ptr<scalar_t>();
    args.grad_z = grad_z.data_ptr<scalar_t>();
    args.grad_weights = grad_weights.data_ptr<acc_t<scalar_t>>();
    run_parts<Backward<scalar_t>>(args, in.tokens(), kTokensPerPart);
  });
  const auto sums = grad_weights.sum(0);
  return {
      grad_y.to(y.scalar_type()),
      grad_z.to(z.scalar_type()),
      sums[0].clone().to(weight.scalar_type()),
      sums[1].clone().to(bias.scalar_type())};
}

TORCH_LIBRARY_IMPL(spatial_mamba, CPU, m) {
  m.impl("gated_layer_norm", &gated_layer_norm);
  m.impl("gated_layer_norm_backward", &gated_layer_norm_backward);
}

}  // namespace
}  // namespace smd2
