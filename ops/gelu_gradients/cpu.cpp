// spatial_mamba::gelu_gradients on the CPU; op.py documents it.
#include "../cpu/tensors.h"

namespace smd2 {
namespace {

constexpr const char* kOp = "gelu_gradients";

// Tokens that a thread processes at a time. Fewer balance threads better; more
// have fewer partial sums.
constexpr int64_t kTokensPerPart = 128;

// Blocks of channels that are processed together. Those of several tokens would
// share the loads and stores of sums, but the maps are larger than caches, and
// memory delivers faster what is read in its order: 9 ms instead of 14 for
// 32,768 tokens of 256 channels in float32, on one core of an Intel Xeon
// (AVX-512).
constexpr int kBlocks = 4;

// below[s] = P(X < x[s]) for a standard normal X; bell[s] = exp(-x[s]^2 / 2).
//
// The smaller of P(X < x) and P(X > x) is the bell times a polynomial in
// 1 / (1 + 0.3 |x|), which was fitted for the smallest relative error, 1.2e-7.
template <int N, int S>
SMD2_INLINE void
normal(const vec<float, N>* x, vec<float, N>* below, vec<float, N>* bell) {
  using V = vec<float, N>;
  const V limit =
      2 * exp_limit<float, N>();  // of x^2; beyond it, the bell is 0
  V t[S], p[S];
  each<S>([&](int s)
              SMD2_LAMBDA { bell[s] = at_most<float, N>(x[s] * x[s], limit); });
  exp_of_products<N, S>(bell, splat<float, N>(-0.5f * kExpUnit<float>));
  each<S>([&](int s) SMD2_LAMBDA {
    bell[s] = x[s] * x[s] > limit ? V{} : bell[s];
    t[s] = 1 / (1 + 0.3f * magnitude<float, N>(x[s]));
  });
  each<S>([&](int s)
              SMD2_LAMBDA { p[s] = t[s] * 3.603621436e-2f - 1.587132719e-1f; });
  each<S>([&](int s) SMD2_LAMBDA { p[s] = p[s] * t[s] + 2.089640495e-1f; });
  each<S>([&](int s) SMD2_LAMBDA { p[s] = p[s] * t[s] - 5.609541946e-2f; });
  each<S>([&](int s) SMD2_LAMBDA { p[s] = p[s] * t[s] + 1.298431931e-1f; });
  each<S>([&](int s) SMD2_LAMBDA { p[s] = p[s] * t[s] + 9.952312766e-2f; });
  each<S>([&](int s) SMD2_LAMBDA { p[s] = p[s] * t[s] + 1.208168825e-1f; });
  each<S>([&](int s) SMD2_LAMBDA { p[s] = p[s] * t[s] + 1.196251661e-1f; });
  each<S>([&](int s) SMD2_LAMBDA {
    p[s] *= t[s] * bell[s];
    below[s] = x[s] < 0 ? p[s] : 1 - p[s];
  });
}
template <int N, int S>
SMD2_INLINE void
normal(const vec<double, N>* x, vec<double, N>* below, vec<double, N>* bell) {
  constexpr double root_half = 0.70710678118654752440;
  for (int s = 0; s < S; s++) {
    for (int i = 0; i < N; i++) {
      below[s][i] = std::erfc(-root_half * x[s][i]) / 2;
      bell[s][i] = std::exp(-x[s][i] * x[s][i] / 2);
    }
  }
}

template <typename T>
struct GeluArgs {
  const T* grad;
  const T* x;
  T* grad_x;
  T* out;
  acc_t<T>* grad_sum;  // [parts, dim], 0 at first
  int64_t dim;
  int64_t part, first, last;
};

template <typename T>
struct Gelu {
  template <int N>
  SMD2_INLINE void run(const GeluArgs<T>& a) {
    using Acc = acc_t<T>;
    using V = vec<Acc, N>;
    const int64_t dim = a.dim;
    Acc* sums = a.grad_sum + a.part * dim;
    const Acc height = 0.39894228040143267794;  // 1 / sqrt(2 pi)
    for (int64_t t = a.first; t < a.last; t++) {
      const T* grad = a.grad + t * dim;
      const T* x = a.x + t * dim;
      T* grad_x = a.grad_x + t * dim;
      T* out = a.out + t * dim;
      for_channels<N, kBlocks>(
          dim, [=](auto count, int64_t c, int n) SMD2_LAMBDA {
            constexpr int S = decltype(count)::value;
            V value[S], below[S], bell[S];
            each<S>([&](int s) SMD2_LAMBDA {
              value[s] = load_channels<T, N>(x + c + s * N, n);
            });
            normal<N, S>(value, below, bell);
            each<S>([&](int s) SMD2_LAMBDA {
              const int64_t at = c + s * N;
              const V slope = below[s] + value[s] * (height * bell[s]);
              const V g = load_channels<T, N>(grad + at, n) * slope;
              store_channels<T, N>(out + at, value[s] * below[s], n);
              store_channels<T, N>(grad_x + at, g, n);
              add_channels<Acc, N>(sums + at, g, n);
            });
          });
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> gelu_gradients(
    const Tensor& grad_output,
    const Tensor& x_) {
  SMD2_CHECK_VALUE(
      x_.dim() == 4 && x_.size(3),
      kOp,
      ": x must be [B, H, W, D] with D >= 1, got ",
      text(x_.sizes()));
  check_arguments(kOp, {{"grad_output", grad_output, x_.sizes()}});
  const auto x = contiguous_as(x_, kernel_type(x_, x_));
  const auto grad = contiguous_as(grad_output, x.scalar_type());
  const auto dim = x.size(3), tokens = x.numel() / dim;
  Tensor grad_x = empty_like(x), out = empty_like(x);
  const auto sum_type = accumulate_type(x.scalar_type());
  Tensor grad_sum = torch::stable::new_zeros(
      x, {num_parts(tokens, kTokensPerPart), dim}, sum_type);
  SMD2_DISPATCH(x.scalar_type(), kOp, [&] {
    GeluArgs<scalar_t> args{};
    args.grad = grad.const_data_ptr<scalar_t>();
    args.x = x.const_data_ptr<scalar_t>();
    args.grad_x = grad_x.mutable_data_ptr<scalar_t>();
    args.out = out.mutable_data_ptr<scalar_t>();
    args.grad_sum = grad_sum.mutable_data_ptr<acc_t<scalar_t>>();
    args.dim = dim;
    run_parts<Gelu<scalar_t>>(args, tokens, kTokensPerPart);
  });
  return {
      as_type(grad_x, x_.scalar_type()),
      as_type(out, x_.scalar_type()),
      sum_first(grad_sum, sum_type)};
}

STABLE_TORCH_LIBRARY_IMPL(spatial_mamba, CPU, m) {
  m.impl("gelu_gradients", TORCH_BOX(&gelu_gradients));
}

}  // namespace
}  // namespace smd2
