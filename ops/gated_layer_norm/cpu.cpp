// spatial_mamba::gated_layer_norm and gated_layer_norm_gradients_ on the CPU;
// op.py documents them.
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
  int64_t grad_z_stride;   // from token to token
  T* out;                  // null if it is not wanted
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
      using Norm = NormGradient<T, N>;
      Norm of_norm;
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
        if (a.out) {
          store_channels<T, N>(a.out + t * a.dim + c, norm * (gate * open), n);
        }
        store_channels<T, N>(
            a.grad_z + t * a.grad_z_stride + c,
            g * norm * open * (1 + gate * (1 - open)),
            n);
        Norm::add(
            &of_norm,
            grad_norm,
            normal,
            weight,
            grad_weight + c,
            grad_bias + c,
            n);
      });
      Norm::finish(&of_norm, a.dim);
      for_channels<N>(a.dim, [&](int64_t c, int n) SMD2_LAMBDA {
        const auto normal = (load_channels<T, N>(y + c, n) - m.mean) * m.scale;
        const auto gate = load_channels<T, N>(z + c, n);
        auto open = gate;
        sigmoid<Acc, N, 1>(&open);
        const auto grad_normal = load_channels<T, N>(grad + c, n) * gate *
                                 open * load_channels<Acc, N>(a.weight + c, n);
        store_channels<T, N>(
            a.grad_y + t * a.dim + c,
            Norm::of_input(of_norm, grad_normal, normal, m),
            n);
      });
    }
  }
};

// The inputs, checked, in the dtype and layout that kernels take.
struct Inputs {
  Tensor y, z, weight, bias;

  Inputs(
      const char* op,
      const Tensor& y_,
      const Tensor& z_,
      const Tensor& weight_,
      const Tensor& bias_) {
    SMD2_CHECK_VALUE(
        y_.dim() == 4 && y_.size(3),
        op,
        ": y must be [B, H, W, D] with D >= 1, got ",
        text(y_.sizes()));
    const auto dim = y_.size(3);
    check_arguments(
        op,
        {{"z", z_, y_.sizes()},
         {"weight", weight_, {dim}},
         {"bias", bias_, {dim}}});
    const auto type = kernel_type(y_, z_);
    y = contiguous_as(y_, type);
    z = even_tokens(as_type(z_, type));
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

Tensor gated_layer_norm(
    const Tensor& y,
    const Tensor& z,
    const Tensor& weight,
    const Tensor& bias,
    double eps) {
  const Inputs in(kOp, y, z, weight, bias);
  Tensor out = empty_like(in.y);
  SMD2_DISPATCH(in.y.scalar_type(), kOp, [&] {
    ForwardArgs<scalar_t> args{};
    in.fill(&args, eps);
    args.out = out.mutable_data_ptr<scalar_t>();
    run_parts<Forward<scalar_t>>(args, in.tokens(), kTokensPerPart);
  });
  return as_type(out, y.scalar_type());
}

// Writes the gradients of y and z, and the output unless `out` is null, in the
// dtype of in.y; `grad_z` has even tokens, the others are contiguous. Returns
// the sums that are the gradients of weight and bias, [2, dim].
Tensor write_gradients(
    const char* op,
    const Inputs& in,
    const Tensor& grad_output,
    double eps,
    const Tensor& grad_y,
    const Tensor& grad_z,
    const Tensor* out) {
  check_arguments(op, {{"grad_output", grad_output, in.y.sizes()}});
  const auto grad = contiguous_as(grad_output, in.y.scalar_type());
  Tensor grad_weights = zeros({in.parts(), 2, in.y.size(3)}, in.weight);
  SMD2_DISPATCH(in.y.scalar_type(), kOp, [&] {
    BackwardArgs<scalar_t> args{};
    in.fill(&args, eps);
    args.grad = grad.const_data_ptr<scalar_t>();
    args.grad_y = grad_y.mutable_data_ptr<scalar_t>();
    args.grad_z = grad_z.mutable_data_ptr<scalar_t>();
    args.grad_z_stride = token_stride(grad_z);
    args.out = out ? out->mutable_data_ptr<scalar_t>() : nullptr;
    args.grad_weights = grad_weights.mutable_data_ptr<acc_t<scalar_t>>();
    run_parts<Backward<scalar_t>>(args, in.tokens(), kTokensPerPart);
  });
  return sum_first(grad_weights, in.weight.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_layer_norm_backward(
    const Tensor& grad_output,
    const Tensor& y,
    const Tensor& z,
    const Tensor& weight,
    const Tensor& bias,
    double eps) {
  constexpr const char* op = "gated_layer_norm_backward";
  const Inputs in(kOp, y, z, weight, bias);
  const Tensor grad_y = empty_like(in.y), grad_z = empty_like(in.y);
  const auto sums =
      write_gradients(op, in, grad_output, eps, grad_y, grad_z, nullptr);
  return {
      as_type(grad_y, y.scalar_type()),
      as_type(grad_z, z.scalar_type()),
      copy_row(sums, 0, weight.scalar_type()),
      copy_row(sums, 1, bias.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_layer_norm_gradients_(
    const Tensor& grad_z,
    const Tensor& grad_output,
    const Tensor& y,
    const Tensor& z,
    const Tensor& weight,
    const Tensor& bias,
    double eps) {
  constexpr const char* op = "gated_layer_norm_gradients_";
  const Inputs in(op, y, z, weight, bias);
  check_written(op, "grad_z", grad_z, z);
  const auto memory = memory_for(grad_z, in.y.scalar_type());
  const Tensor grad_y = empty_like(in.y), out = empty_like(in.y);
  const auto sums =
      write_gradients(op, in, grad_output, eps, grad_y, memory, &out);
  copy_back(grad_z, memory);
  return {
      as_type(grad_y, y.scalar_type()),
      as_type(out, y.scalar_type()),
      copy_row(sums, 0, weight.scalar_type()),
      copy_row(sums, 1, bias.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(spatial_mamba, CPU, m) {
  m.impl("gated_layer_norm", TORCH_BOX(&gated_layer_norm));
  m.impl("gated_layer_norm_backward", TORCH_BOX(&gated_layer_norm_backward));
  m.impl(
      "gated_layer_norm_gradients_", TORCH_BOX(&gated_layer_norm_gradients_));
}

}  // namespace
}  // namespace smd2
