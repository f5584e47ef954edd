// spatial_mamba::depthwise_conv3x3_stride2 on the CPU; op.py documents it.
//
// Threads process whole rows: of the output in the forward pass, of the input
// in the backward pass. A "row" counts the rows of all images together.
#include "../depthwise_conv3x3/rows.h"

namespace smd2 {
namespace {

constexpr const char* kOp = "depthwise_conv3x3_stride2";
constexpr int kStride = 2;
// Outputs whose sums are in registers at once, with their 9 inputs.
constexpr int kOutputs = 4;

// Size of the output for an input of this height or width.
SMD2_INLINE int64_t halved(int64_t size) {
  return (size + 1) / kStride;
}

// NaN stays NaN.
template <typename T, int N>
SMD2_INLINE vec<T, N> relu(vec<T, N> x) {
  return at_least<T, N>(x, vec<T, N>{});
}

// `grad` where the input of the ReLU was positive or NaN, else 0.
template <typename T, int N>
SMD2_INLINE vec<T, N> relu_backward(vec<T, N> grad, vec<T, N> input) {
  return input <= 0 ? vec<T, N>{} : grad;
}

// Writes row r of a contiguous map of the output's size, from the convolution
// at each token: finish(conv, at, n) stores n channels at element `at`.
template <typename T, int N, typename Finish>
SMD2_INLINE void
convolve_row(const ConvArgs<T>& a, int64_t r, const Finish& finish) {
  using V = vec<acc_t<T>, N>;
  const int64_t rows = halved(a.height), columns = halved(a.width);
  const int64_t top = kStride * (r % rows) - 1;  // within the image
  const T* image = a.x.data + r / rows * a.height * a.width * a.x.stride;
  for_strips<N, kOutputs>(
      columns,
      a.dim,
      [&](auto strip, auto edge, int64_t x, int64_t c, int n) SMD2_LAMBDA {
        constexpr int S = decltype(strip)::value;
        const acc_t<T>* block = a.weights + c * kPacked;
        V conv[S];
        for (int s = 0; s < S; s++) {
          conv[s] = read<acc_t<T>, N>(block + kWeights * N);
        }
        for (int i = 0; i < kKernel; i++) {
          if (top + i < 0 || top + i >= a.height) {
            continue;
          }
          V values[kStride * S + 1];
          load_tokens<T, N, kStride * S + 1, decltype(edge)::value>(
              image + (top + i) * a.width * a.x.stride,
              a.x.stride,
              kStride * x - 1,
              a.width,
              c,
              n,
              values);
          each<kStride * S + 1>([&](int s) SMD2_LAMBDA {
            values[s] = relu<acc_t<T>, N>(values[s]);
          });
#pragma GCC unroll 3
          for (int j = 0; j < kKernel; j++) {
            const V w = read<acc_t<T>, N>(block + (i * kKernel + j) * N);
#pragma GCC unroll 8
            for (int s = 0; s < S; s++) {
              conv[s] += w * values[kStride * s + j];
            }
          }
        }
        each<S>([&](int s) SMD2_LAMBDA {
          finish(conv[s], (r * columns + x + s) * a.dim + c, n);
        });
      });
}

template <typename T>
struct Forward {
  template <int N>
  SMD2_INLINE void run(const ForwardArgs<T>& a) {
    using V = vec<acc_t<T>, N>;
    for (int64_t r = a.first; r < a.last; r++) {
      convolve_row<T, N>(a, r, [&](V conv, int64_t at, int n) SMD2_LAMBDA {
        store_channels<T, N>(a.out + at, relu<acc_t<T>, N>(conv), n);
      });
    }
  }
};

// From the gradient of the output to that of the convolution.
template <typename T>
struct ConvGradient {
  template <int N>
  SMD2_INLINE void run(const ConvGradientArgs<T>& a) {
    using Acc = acc_t<T>;
    using V = vec<Acc, N>;
    for (int64_t r = a.first; r < a.last; r++) {
      convolve_row<T, N>(a, r, [&](V conv, int64_t at, int n) SMD2_LAMBDA {
        const V grad = load_channels<T, N>(a.grad + at, n);
        store_channels<Acc, N>(
            a.grad_conv + at, relu_backward<Acc, N>(grad, conv), n);
      });
    }
  }
};

// From the gradient of the convolution to those of input, weights and bias.
template <typename T>
struct BackwardArgs : ConvArgs<T> {
  const acc_t<T>* grad_conv;  // contiguous
  T* grad_x;
  // [parts, kPacked, dim], 0 at first: sums of weights, and last of the bias.
  acc_t<T>* grad_weights;
};

template <typename T>
struct Backward {
  template <int N>
  SMD2_INLINE void run(const BackwardArgs<T>& a) {
    for (int64_t r = a.first; r < a.last; r++) {
      const int64_t y = r % a.height;
      if (y % kStride == 0) {  // read by the middle row of one window
        row<N, 1, 1>(a, r, y / kStride);
      } else if (y + 1 < a.height) {  // by the outer rows of two windows
        row<N, 0, 2>(a, r, (y + 1) / kStride);
      } else {
        row<N, 2, 2>(a, r, (y + 1) / kStride);
      }
    }
  }

  // Row r of the input, which output row `below` read with row First of its
  // weights (First < 2) and the output row above it with row 2 (Last = 2).
  template <int N, int First, int Last>
  SMD2_INLINE void row(const BackwardArgs<T>& a, int64_t r, int64_t below) {
    using Acc = acc_t<T>;
    using V = vec<Acc, N>;
    const int64_t rows = halved(a.height), columns = halved(a.width);
    const Acc* grads_of_image =
        a.grad_conv + r / a.height * rows * columns * a.dim;
    const T* input = a.x.data + r * a.width * a.x.stride;
    T* grad_x = a.grad_x + r * a.width * a.dim;
    Acc* sums = a.grad_weights + a.part * kPacked * a.dim;
    for_strips<N, kOutputs>(
        columns,
        a.dim,
        [&](auto strip, auto edge, int64_t x, int64_t c, int n) SMD2_LAMBDA {
          constexpr int S = decltype(strip)::value;
          constexpr bool Edge = decltype(edge)::value;
          // Of inputs 2x .. 2x + 2S - 1, those that exist.
          const int count =
              Edge ? static_cast<int>(std::min<int64_t>(2 * S, a.width - 2 * x))
                   : 2 * S;
          V inputs[2 * S], out[2 * S]{};
          load_tokens<T, N, 2 * S, Edge>(
              input, a.x.stride, 2 * x, a.width, c, n, inputs);
#pragma GCC unroll 2
          for (int i = First; i <= Last; i += 2) {
            const int64_t y = i == 2 ? below - 1 : below;
            V grads[S + 1];
            load_tokens<Acc, N, S + 1, Edge>(
                grads_of_image + y * columns * a.dim,
                a.dim,
                x,
                columns,
                c,
                n,
                grads);
#pragma GCC unroll 3
            for (int j = 0; j < kKernel; j++) {
              const int64_t k = i * kKernel + j;
              const V w = read<Acc, N>(a.weights + c * kPacked + k * N);
              V total = load_channels<Acc, N>(sums + k * a.dim + c, n);
#pragma GCC unroll 8
              for (int s = 0; s < S; s++) {
                // The middle weight meets even inputs; the outer ones meet odd
                // inputs, the first from the next output on.
                const V grad = grads[j == 0 ? s + 1 : s];
                const int at = j == 1 ? 2 * s : 2 * s + 1;
                out[at] += w * grad;
                total += relu<Acc, N>(inputs[at]) * grad;
              }
              store_channels<Acc, N>(sums + k * a.dim + c, total, n);
            }
            if (i == 1) {
              Acc* bias = sums + kWeights * a.dim + c;
              V total = load_channels<Acc, N>(bias, n);
              each<S>([&](int s) SMD2_LAMBDA { total += grads[s]; });
              store_channels<Acc, N>(bias, total, n);
            }
          }
          for (int s = 0; s < count; s++) {
            store_channels<T, N>(
                grad_x + (2 * x + s) * a.dim + c,
                relu_backward<Acc, N>(out[s], inputs[s]),
                n);
          }
        });
  }
};

struct Inputs : ConvInputs {
  Inputs(const Tensor& x_, const Tensor& weight, const Tensor& bias)
      : ConvInputs(kOp, x_, weight, bias) {}

  int64_t output_rows() const {
    return x.size(0) * halved(x.size(1));
  }
  std::vector<int64_t> output_sizes() const {
    return {x.size(0), halved(x.size(1)), halved(x.size(2)), x.size(3)};
  }
};

Tensor depthwise_conv3x3_stride2(
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias) {
  const Inputs in(x, weight, bias);
  Tensor out = empty(in.output_sizes(), in.x);
  SMD2_DISPATCH(in.x.scalar_type(), kOp, [&] {
    const ForwardArgs<scalar_t> args{
        {in.x, in.weights}, out.mutable_data_ptr<scalar_t>()};
    run_parts<Forward<scalar_t>>(args, in.output_rows(), kRowsPerPart);
  });
  return as_type(out, x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv3x3_stride2_backward(
    const Tensor& grad_output,
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias) {
  constexpr const char* op = "depthwise_conv3x3_stride2_backward";
  const Inputs in(x, weight, bias);
  check_arguments(op, {{"grad_output", grad_output, in.output_sizes()}});
  const auto grad = contiguous_as(grad_output, in.x.scalar_type());
  Tensor grad_conv = empty(in.output_sizes(), in.weights);
  Tensor grad_x = empty(in.x.sizes(), in.x);
  Tensor grad_weights = zeros({in.parts(), kPacked, x.size(3)}, in.weights);
  SMD2_DISPATCH(in.x.scalar_type(), op, [&] {
    using Acc = acc_t<scalar_t>;
    const ConvGradientArgs<scalar_t> outer{
        {in.x, in.weights},
        grad.const_data_ptr<scalar_t>(),
        grad_conv.mutable_data_ptr<Acc>()};
    run_parts<ConvGradient<scalar_t>>(outer, in.output_rows(), kRowsPerPart);
    const BackwardArgs<scalar_t> inner{
        {in.x, in.weights},
        grad_conv.const_data_ptr<Acc>(),
        grad_x.mutable_data_ptr<scalar_t>(),
        grad_weights.mutable_data_ptr<Acc>()};
    run_parts<Backward<scalar_t>>(inner, in.rows(), kRowsPerPart);
  });
  return gradients_of_convolution(grad_x, grad_weights, x, weight, bias);
}

STABLE_TORCH_LIBRARY_IMPL(spatial_mamba, CPU, m) {
  m.impl("depthwise_conv3x3_stride2", TORCH_BOX(&depthwise_conv3x3_stride2));
  m.impl(
      "depthwise_conv3x3_stride2_backward",
      TORCH_BOX(&depthwise_conv3x3_stride2_backward));
}

}  // namespace
}  // namespace smd2
