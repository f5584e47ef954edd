// spatial_mamba::depthwise_conv3x3_layer_norm on the CPU; op.py documents it.
//
// A row is normalized while it is still in cache.
#include "../cpu/moments.h"
#include "../depthwise_conv3x3/rows.h"

namespace smd2 {
namespace {

constexpr const char* kOp = "depthwise_conv3x3_layer_norm";

template <typename T>
struct ForwardArgs : ConvArgs<T> {
  const acc_t<T>* norm_weight;
  const acc_t<T>* norm_bias;
  acc_t<T> eps;
  T* y;
  T* norm;
};

template <typename T>
struct Forward {
  template <int N>
  SMD2_INLINE void run(const ForwardArgs<T>& a) {
    using V = vec<acc_t<T>, N>;
    T* norm = a.norm;
    const int64_t dim = a.dim;
    for (int64_t r = a.first; r < a.last; r++) {
      convolve_row<T, N>(
          a, r, a.y, [](auto strip, V* conv, V* here) SMD2_LAMBDA {
            each<decltype(strip)::value>(
                [&](int s) SMD2_LAMBDA { conv[s] += here[s]; });
          });
      normalize<T, N>(
          a.y,
          a.dim,
          a.norm_weight,
          a.norm_bias,
          a.eps,
          r * a.width,
          (r + 1) * a.width,
          [=](auto count, int64_t t, int64_t c, int n, V* normal) SMD2_LAMBDA {
            T* to = norm + t * dim + c;
            each<decltype(count)::value>([&](int s) SMD2_LAMBDA {
              store_channels<T, N>(to + s * dim, normal[s], n);
            });
          });
    }
  }
};

std::tuple<Tensor, Tensor> depthwise_conv3x3_layer_norm(
    const Tensor& x_,
    const Tensor& weight,
    const Tensor& bias,
    const Tensor& norm_weight,
    const Tensor& norm_bias,
    double eps) {
  check_convolution(kOp, x_, weight, bias);
  const auto dim = x_.size(3);
  check_arguments(
      kOp,
      {{"norm_weight", norm_weight, {dim}}, {"norm_bias", norm_bias, {dim}}});
  const auto x = even_tokens(as_type(x_, kernel_type(x_, x_)));
  const auto weights = pack_weights(weight, bias, x);
  const auto gain = small(norm_weight, x), shift = small(norm_bias, x);
  Tensor y = empty(x.sizes(), x);
  Tensor norm = empty_like(y);
  SMD2_DISPATCH(x.scalar_type(), kOp, [&] {
    using Acc = acc_t<scalar_t>;
    const ForwardArgs<scalar_t> args{
        {x, weights},
        gain.const_data_ptr<Acc>(),
        shift.const_data_ptr<Acc>(),
        static_cast<Acc>(eps),
        y.mutable_data_ptr<scalar_t>(),
        norm.mutable_data_ptr<scalar_t>()};
    run_parts<Forward<scalar_t>>(args, x.size(0) * x.size(1), kRowsPerPart);
  });
  return {as_type(y, x_.scalar_type()), as_type(norm, x_.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(spatial_mamba, CPU, m) {
  m.impl(
      "depthwise_conv3x3_layer_norm", TORCH_BOX(&depthwise_conv3x3_layer_norm));
}

}  // namespace
}  // namespace smd2
