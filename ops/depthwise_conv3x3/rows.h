// Depthwise 3x3 convolution of single rows, all channels. "Row r" counts the
// rows of all images together.
#pragma once

#include "../cpu/tensors.h"

namespace smd2 {

constexpr int kKernel = 3;
constexpr int kWeights = kKernel * kKernel;
constexpr int kPacked = kWeights + 1;  // weights of a channel and its bias
// Tokens whose sums are in registers at once. A strip loads kStrip + 2 tokens
// of each of three rows, so longer ones load fewer values twice; but its sums,
// the loaded values and a weight must fit into the vector registers. Tuned on
// two cores of an AMD EPYC (AVX-512).
constexpr int kStrip = 6;
// Rows that a thread processes at a time. Fewer balance threads better; more
// read fewer rows twice, above and below a part, and have fewer partial sums of
// the weights' gradients.
constexpr int kRowsPerPart = 4;

// A map whose tokens are `stride` elements apart.
template <typename T>
struct Map {
  const T* data;
  int64_t stride;

  explicit Map(const Tensor& x)
      : data(x.const_data_ptr<T>()), stride(token_stride(x)) {}
};

struct Geometry {
  int64_t height, width, dim;
  int64_t part, first, last;  // set by run_parts

  explicit Geometry(const Tensor& x)
      : height(x.size(1)), width(x.size(2)), dim(x.size(3)) {}
};

// What all convolutions of an input read.
template <typename T>
struct ConvArgs : Geometry {
  Map<T> x;
  const acc_t<T>* weights;  // from pack_weights

  ConvArgs(const Tensor& x_, const Tensor& weights_)
      : Geometry(x_), x(x_), weights(weights_.const_data_ptr<acc_t<T>>()) {}
};

template <typename T>
struct ForwardArgs : ConvArgs<T> {
  T* out;
};

// From the gradient of what follows the convolution to that of the convolution.
template <typename T>
struct ConvGradientArgs : ConvArgs<T> {
  const T* grad;  // contiguous
  acc_t<T>* grad_conv;
};

// Rows r - 1, r, r + 1 of a map; null outside of the image.
template <typename T>
struct Rows {
  const T* row[kKernel];
  int64_t stride;

  SMD2_INLINE Rows around(const Map<T>& map, const Geometry& g, int64_t r) {
    Rows rows{{}, map.stride};
    const int64_t y = r % g.height;
    for (int i = 0; i < kKernel; i++) {
      const bool inside = y + i - 1 >= 0 && y + i - 1 < g.height;
      rows.row[i] =
          inside ? map.data + (r + i - 1) * g.width * map.stride : nullptr;
    }
    return rows;
  }
};

// Count tokens of a row from x on, n channels from c on. Tokens outside the row
// are 0; only an Edge strip can have some.
template <typename T, int N, int Count, bool Edge>
SMD2_INLINE void load_tokens(
    const T* row,
    int64_t stride,
    int64_t x,
    int64_t width,
    int64_t c,
    int n,
    vec<acc_t<T>, N>* values) {
  const T* first = row + x * stride + c;
#pragma GCC unroll 16
  for (int i = 0; i < Count; i++) {
    const bool inside = !Edge || (x + i >= 0 && x + i < width);
    values[i] = inside ? load_channels<T, N>(first + i * stride, n)
                       : vec<acc_t<T>, N>{};
  }
}

// The convolution at tokens x .. x + S - 1.
template <typename T, int N, int S, bool Edge>
SMD2_INLINE void convolve(
    const Rows<T>& rows,
    int64_t x,
    int64_t width,
    const acc_t<T>* weights,  // from pack_weights
    int64_t c,
    int n,
    vec<acc_t<T>, N>* out) {
  using V = vec<acc_t<T>, N>;
  const acc_t<T>* block = weights + c * kPacked;
  const V bias = read<acc_t<T>, N>(block + kWeights * N);
  for (int s = 0; s < S; s++) {
    out[s] = bias;
  }
  for (int i = 0; i < kKernel; i++) {
    if (!rows.row[i]) {
      continue;
    }
    V values[S + 2];
    load_tokens<T, N, S + 2, Edge>(
        rows.row[i], rows.stride, x - 1, width, c, n, values);
#pragma GCC unroll 3
    for (int j = 0; j < kKernel; j++) {
      const V w = read<acc_t<T>, N>(block + (i * kKernel + j) * N);
#pragma GCC unroll 8
      for (int s = 0; s < S; s++) {
        out[s] += w * values[s + j];
      }
    }
  }
}

// Calls body(S, Edge, x, c, n) for each strip of S tokens from x on and each
// block of n channels from c on; S is Strip or 1. Edge strips touch the left or
// right side of the image.
template <int N, int Strip = kStrip, typename Body>
SMD2_INLINE void for_strips(int64_t width, int64_t dim, const Body& body) {
  const auto strip = [&](auto size, auto edge, int64_t x) SMD2_LAMBDA {
    for_channels<N>(
        dim, [&](int64_t c, int n) SMD2_LAMBDA { body(size, edge, x, c, n); });
  };
  constexpr std::integral_constant<int, Strip> many;
  constexpr std::integral_constant<int, 1> one;
  int64_t x = 0;
  for (; x < std::min<int64_t>(1, width); x++) {
    strip(one, std::true_type{}, x);
  }
  for (; x + Strip < width; x += Strip) {
    strip(many, std::false_type{}, x);
  }
  for (; x < width; x++) {
    strip(one, std::true_type{}, x);
  }
}

// Writes row r of the contiguous map `out`. finish(S, conv, here) turns the
// convolution of S tokens, in place, into their output; `here` is their input.
template <typename T, int N, typename Finish>
SMD2_INLINE void
convolve_row(const ConvArgs<T>& a, int64_t r, T* out, const Finish& finish) {
  const auto rows = Rows<T>::around(a.x, a, r);
  const int64_t width = a.width, dim = a.dim;
  const acc_t<T>* weights = a.weights;
  T* row = out + r * width * dim;
  for_strips<N>(
      width,
      dim,
      [=](auto strip, auto edge, int64_t x, int64_t c, int n) SMD2_LAMBDA {
        constexpr int S = decltype(strip)::value;
        vec<acc_t<T>, N> conv[S], here[S];
        convolve<T, N, S, decltype(edge)::value>(
            rows, x, width, weights, c, n, conv);
        each<S>([&](int s) SMD2_LAMBDA {
          here[s] =
              load_channels<T, N>(rows.row[1] + (x + s) * rows.stride + c, n);
        });
        finish(strip, conv, here);
        T* first = row + x * dim + c;
        each<S>([&](int s) SMD2_LAMBDA {
          store_channels<T, N>(first + s * dim, conv[s], n);
        });
      });
}

// Raises ValueError unless these fit together.
inline void check_convolution(
    const char* op,
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias) {
  SMD2_CHECK_VALUE(
      x.dim() == 4 && x.size(1) && x.size(2),
      op,
      ": x must be [B, H, W, D] with H, W >= 1, got ",
      text(x.sizes()));
  const auto dim = x.size(3);
  check_arguments(
      op,
      {{"weight", weight, {dim, 1, kKernel, kKernel}}, {"bias", bias, {dim}}});
}

// Weights [dim, 1, 3, 3] and bias in the layout that `convolve` reads, [blocks
// of channels, kPacked, lanes()].
inline Tensor
pack_weights(const Tensor& weight_, const Tensor& bias_, const Tensor& like) {
  const auto weight = small(weight_, like), bias = small(bias_, like);
  const int64_t dim = bias.size(0), size = lanes_of(bias.scalar_type());
  Tensor packed = zeros({channel_blocks(dim, size), kPacked, size}, weight);
  SMD2_DISPATCH_WIDE(weight.scalar_type(), "pack_weights", [&] {
    const auto* from = weight.const_data_ptr<scalar_t>();
    const auto* last = bias.const_data_ptr<scalar_t>();
    auto* to = packed.mutable_data_ptr<scalar_t>();
    for (int64_t c = 0; c < dim; c++) {
      scalar_t* lane = to + c / size * kPacked * size + c % size;
      for (int k = 0; k < kWeights; k++) {
        lane[k * size] = from[c * kWeights + k];
      }
      lane[kWeights * size] = last[c];
    }
  });
  return packed;
}

// The inputs, checked, in the dtype and layout that kernels take.
struct ConvInputs {
  Tensor x, weights;

  ConvInputs(
      const char* op,
      const Tensor& x_,
      const Tensor& weight,
      const Tensor& bias) {
    check_convolution(op, x_, weight, bias);
    x = even_tokens(as_type(x_, kernel_type(x_, x_)));
    weights = pack_weights(weight, bias, x);
  }

  int64_t rows() const {
    return x.size(0) * x.size(1);
  }
  int64_t parts() const {
    return num_parts(rows(), kRowsPerPart);
  }
};

// Gradients of weight and bias, in their dtypes, from `partial_sums`, [parts,
// kPacked, dim], of weights, and last of the bias.
inline std::tuple<Tensor, Tensor> gradients_of_parameters(
    const Tensor& partial_sums,
    const Tensor& weight,
    const Tensor& bias) {
  Tensor sums = sum_first(partial_sums, partial_sums.scalar_type());
  const auto grad_weight = torch::stable::transpose(
      torch::stable::narrow(sums, 0, 0, kWeights), 0, 1);
  return {
      torch::stable::view(
          contiguous_as(grad_weight, weight.scalar_type()), weight.sizes()),
      copy_row(sums, kWeights, bias.scalar_type())};
}

// What the backward pass returns, in the dtypes of x, weight and bias.
inline std::tuple<Tensor, Tensor, Tensor> gradients_of_convolution(
    const Tensor& grad_x,
    const Tensor& partial_sums,
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias) {
  const auto [grad_weight, grad_bias] =
      gradients_of_parameters(partial_sums, weight, bias);
  return {as_type(grad_x, x.scalar_type()), grad_weight, grad_bias};
}

}  // namespace smd2
