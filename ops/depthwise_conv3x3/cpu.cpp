// spatial_mamba::depthwise_conv3x3 and depthwise_conv3x3_gradients_ on the CPU;
// op.py documents them.
//
// Threads process whole rows. Within a row, the outer loop goes over strips of
// tokens and the inner one over channels, so that memory is read in order.
#include "rows.h"

namespace smd2 {
namespace {

constexpr const char* kOp = "depthwise_conv3x3";

template <typename T, bool Residual>
struct Forward {
  template <int N>
  SMD2_INLINE void run(const ForwardArgs<T>& a) {
    using V = vec<acc_t<T>, N>;
    for (int64_t r = a.first; r < a.last; r++) {
      convolve_row<T, N>(
          a, r, a.out, [&](auto strip, V* conv, V* here) SMD2_LAMBDA {
            constexpr int S = decltype(strip)::value;
            if constexpr (Residual) {
              each<S>([&](int s) SMD2_LAMBDA { conv[s] += here[s]; });
            } else {
              silu<acc_t<T>, N, S>(conv);
            }
          });
    }
  }
};

// From the gradient of SiLU(convolution) to that of the convolution.
template <typename T>
struct ConvGradient {
  template <int N>
  SMD2_INLINE void run(const ConvGradientArgs<T>& a) {
    using Acc = acc_t<T>;
    using V = vec<Acc, N>;
    for (int64_t r = a.first; r < a.last; r++) {
      const auto rows = Rows<T>::around(a.x, a, r);
      for_strips<N>(
          a.width,
          a.dim,
          [&](auto strip, auto edge, int64_t x, int64_t c, int n) SMD2_LAMBDA {
            constexpr int S = decltype(strip)::value;
            V conv[S];
            convolve<T, N, S, decltype(edge)::value>(
                rows, x, a.width, a.weights, c, n, conv);
            for (int s = 0; s < S; s++) {
              const int64_t at = (r * a.width + x + s) * a.dim + c;
              V gate = conv[s];
              sigmoid<Acc, N, 1>(&gate);
              const V slope = gate * (1 + conv[s] * (1 - gate));
              const V grad = load_channels<T, N>(a.grad + at, n);
              store_channels<Acc, N>(a.grad_conv + at, grad * slope, n);
            }
          });
    }
  }
};

// From the gradient of the convolution, in dtype G, to those of input, weights
// and bias.
template <typename T, typename G>
struct BackwardArgs : ConvArgs<T> {
  Map<G> grad_conv;
  T* grad_x;
  int64_t grad_x_stride;  // from token to token
  // [parts, kPacked, dim], 0 at first: sums of weights, and last of the bias.
  acc_t<T>* grad_weights;
  bool residual;
};

template <typename T, typename G>
struct Backward {
  template <int N>
  SMD2_INLINE void run(const BackwardArgs<T, G>& a) {
    using Acc = acc_t<T>;
    using V = vec<Acc, N>;
    Acc* sums = a.grad_weights + a.part * kPacked * a.dim;
    for (int64_t r = a.first; r < a.last; r++) {
      const auto rows = Rows<G>::around(a.grad_conv, a, r);
      const T* input = a.x.data + r * a.width * a.x.stride;
      T* grad_x = a.grad_x + r * a.width * a.grad_x_stride;
      for_strips<N>(
          a.width,
          a.dim,
          [&](auto strip, auto edge, int64_t x, int64_t c, int n) SMD2_LAMBDA {
            constexpr int S = decltype(strip)::value;
            V inputs[S], out[S]{};
            for (int s = 0; s < S; s++) {
              inputs[s] =
                  load_channels<T, N>(input + (x + s) * a.x.stride + c, n);
            }
            for (int i = 0; i < kKernel; i++) {
              if (!rows.row[i]) {
                continue;
              }
              V grads[S + 2];
              load_tokens<G, N, S + 2, decltype(edge)::value>(
                  rows.row[i], rows.stride, x - 1, a.width, c, n, grads);
#pragma GCC unroll 3
              for (int j = 0; j < kKernel; j++) {
                // The output at (r + i - 1, x + s + j - 1) read the input at
                // (r, x + s) with the opposite weight.
                const int64_t k = kWeights - 1 - (i * kKernel + j);
                const V w = read<Acc, N>(a.weights + c * kPacked + k * N);
                V total = load_channels<Acc, N>(sums + k * a.dim + c, n);
#pragma GCC unroll 8
                for (int s = 0; s < S; s++) {
                  out[s] += w * grads[s + j];
                  total += inputs[s] * grads[s + j];
                }
                store_channels<Acc, N>(sums + k * a.dim + c, total, n);
              }
              if (i == 1) {
                Acc* bias = sums + kWeights * a.dim + c;
                V total = load_channels<Acc, N>(bias, n);
                for (int s = 0; s < S; s++) {
                  total += grads[s + 1];
                  if (a.residual) {
                    out[s] += grads[s + 1];
                  }
                }
                store_channels<Acc, N>(bias, total, n);
              }
            }
            for (int s = 0; s < S; s++) {
              store_channels<T, N>(
                  grad_x + (x + s) * a.grad_x_stride + c, out[s], n);
            }
          });
    }
  }
};

Tensor depthwise_conv3x3(
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias,
    bool residual) {
  const ConvInputs in(kOp, x, weight, bias);
  Tensor out = empty(in.x.sizes(), in.x);
  SMD2_DISPATCH(in.x.scalar_type(), kOp, [&] {
    const ForwardArgs<scalar_t> args{
        {in.x, in.weights}, out.mutable_data_ptr<scalar_t>()};
    if (residual) {
      run_parts<Forward<scalar_t, true>>(args, in.rows(), kRowsPerPart);
    } else {
      run_parts<Forward<scalar_t, false>>(args, in.rows(), kRowsPerPart);
    }
  });
  return as_type(out, x.scalar_type());
}

template <typename T, typename G>
void backward(
    const ConvInputs& in,
    const Tensor& grad_conv,
    const Tensor& grad_x,
    const Tensor& grad_weights,
    bool residual) {
  const BackwardArgs<T, G> args{
      {in.x, in.weights},
      Map<G>(grad_conv),
      grad_x.mutable_data_ptr<T>(),
      token_stride(grad_x),
      grad_weights.mutable_data_ptr<acc_t<T>>(),
      residual};
  run_parts<Backward<T, G>>(args, in.rows(), kRowsPerPart);
}

// Writes the gradient of x into `grad_x`, in the dtype of in.x and with even
// tokens; returns partial sums of weights, and last of the bias.
Tensor write_gradients(
    const char* op,
    const ConvInputs& in,
    const Tensor& grad_output,
    const Tensor& grad_x,
    bool residual) {
  check_arguments(op, {{"grad_output", grad_output, in.x.sizes()}});
  const auto grad = contiguous_as(grad_output, in.x.scalar_type());
  Tensor grad_weights = zeros({in.parts(), kPacked, in.x.size(3)}, in.weights);
  SMD2_DISPATCH(in.x.scalar_type(), kOp, [&] {
    using Acc = acc_t<scalar_t>;
    if (residual) {
      backward<scalar_t, scalar_t>(in, grad, grad_x, grad_weights, true);
    } else {
      Tensor grad_conv = empty(in.x.sizes(), in.weights);
      const ConvGradientArgs<scalar_t> args{
          {in.x, in.weights},
          grad.const_data_ptr<scalar_t>(),
          grad_conv.mutable_data_ptr<Acc>()};
      run_parts<ConvGradient<scalar_t>>(args, in.rows(), kRowsPerPart);
      backward<scalar_t, Acc>(in, grad_conv, grad_x, grad_weights, false);
    }
  });
  return grad_weights;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv3x3_backward(
    const Tensor& grad_output,
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias,
    bool residual) {
  constexpr const char* op = "depthwise_conv3x3_backward";
  const ConvInputs in(kOp, x, weight, bias);
  const Tensor grad_x = empty(in.x.sizes(), in.x);
  const auto sums = write_gradients(op, in, grad_output, grad_x, residual);
  return gradients_of_convolution(grad_x, sums, x, weight, bias);
}

std::tuple<Tensor, Tensor> depthwise_conv3x3_gradients_(
    const Tensor& grad_x,
    const Tensor& grad_output,
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias,
    bool residual) {
  constexpr const char* op = "depthwise_conv3x3_gradients_";
  const ConvInputs in(op, x, weight, bias);
  check_written(op, "grad_x", grad_x, x);
  const auto memory = memory_for(grad_x, in.x.scalar_type());
  const auto sums = write_gradients(op, in, grad_output, memory, residual);
  copy_back(grad_x, memory);
  return gradients_of_parameters(sums, weight, bias);
}

STABLE_TORCH_LIBRARY_IMPL(spatial_mamba, CPU, m) {
  m.impl("depthwise_conv3x3", TORCH_BOX(&depthwise_conv3x3));
  m.impl("depthwise_conv3x3_backward", TORCH_BOX(&depthwise_conv3x3_backward));
  m.impl(
      "depthwise_conv3x3_gradients_", TORCH_BOX(&depthwise_conv3x3_gradients_));
}

}  // namespace
}  // namespace smd2
