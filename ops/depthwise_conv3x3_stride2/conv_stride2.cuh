// Kernels of the depthwise convolution of stride 2 between two ReLUs, forward
// and backward. Threads are arranged as in the one of stride 1, over the
// columns of the output; bands have rows of the output.
#pragma once

#include "../depthwise_conv3x3/conv.cuh"

namespace smd2 {
namespace cuda {

// Channels of a thread of the forward pass; fewer where each has an address of
// its own.
template <typename T, bool kPacked>
constexpr int kStride2Pack = kPacked ? kPack<T> : kPack<T> / 2;

// The part of a map that a thread processes: columns x0, x0 + 1, ... of rows
// y0 .. y1 - 1 of the output.
struct HalvedPlace {
  int64_t image;
  int height, width;  // of the input
  int out_height, out_width;
  int x0, y0, y1;

  SMD2_DEVICE HalvedPlace(const ConvMap& map, int part, int column)
      : height(static_cast<int>(map.height)),
        width(static_cast<int>(map.width)),
        out_height((height + 1) / 2),
        out_width((width + 1) / 2),
        x0(column) {
    const int bands = static_cast<int>(map.bands);
    image = part / bands;
    y0 = part % bands * static_cast<int>(map.band_height);
    y1 = y0 + static_cast<int>(map.band_height);
    y1 = y1 < out_height ? y1 : out_height;
  }
  // Number of a token among those of all images, of the input and the output.
  SMD2_DEVICE int64_t token(int y, int x) const {
    return (image * height + y) * width + x;
  }
  SMD2_DEVICE int64_t out_token(int y, int x) const {
    return (image * out_height + y) * out_width + x;
  }
};

// Loads `columns` tokens of row y of the input, from column x, through the
// first ReLU.
template <int columns, typename T, int count, bool kPacked>
SMD2_DEVICE void load_positive(
    const ConvArgs<T>& a,
    const HalvedPlace& place,
    const Channels<count, kPacked>& channels,
    int y,
    int x,
    acc_t<T> (&values)[columns][count]) {
  const bool inside = y >= 0 && y < place.height;
  const T* token = a.x + place.token(y, x) * a.map.stride;
  const int stride = static_cast<int>(a.map.stride);
#pragma unroll
  for (int c = 0; c < columns; c++) {
    const bool exists = inside && x + c >= 0 && x + c < place.width;
    channels.load(token + c * stride, exists, values[c]);
#pragma unroll
    for (int k = 0; k < count; k++) {
      values[c][k] = relu(values[c][k]);
    }
  }
}

// Adds a row of the input to the convolution, as row `i` of the kernel.
template <int i, typename T, int columns, int in_columns, int count>
SMD2_DEVICE void add_row(
    const ConvWeights<T, count>& weights,
    const acc_t<T> (&row)[in_columns][count],
    acc_t<T> (&sums)[columns][count]) {
  static_assert(in_columns == 2 * columns + 1, "one more on each side");
#pragma unroll
  for (int c = 0; c < columns; c++) {
#pragma unroll
    for (int k = 0; k < count; k++) {
#pragma unroll
      for (int j = 0; j < 3; j++) {
        sums[c][k] += weights.taps[k][i * 3 + j] * row[2 * c + j][k];
      }
    }
  }
}

template <typename Acc, int columns, int count>
SMD2_DEVICE void fill_columns(
    Acc (&values)[columns][count],
    const Acc (&value)[count]) {
#pragma unroll
  for (int c = 0; c < columns; c++) {
#pragma unroll
    for (int k = 0; k < count; k++) {
      values[c][k] = value[k];
    }
  }
}

// Block: a share of the threads of a band, which are numbered by channels, then
// by columns. A row between two rows of the output is read once for both.
template <typename T, bool kPacked>
__global__ void __launch_bounds__(
    kConvWarps* kLanes,
    min_blocks<acc_t<T>>(2, 1)) conv3x3_stride2(ConvForwardArgs<T> a) {
  using Acc = acc_t<T>;
  constexpr int count = kStride2Pack<T, kPacked>, columns = kConvColumns;
  const int dim = static_cast<int>(a.map.dim);
  const int out_width = (static_cast<int>(a.map.width) + 1) / 2;
  const int groups = (dim + count - 1) / count;
  const int threads = groups * ((out_width + columns - 1) / columns);
  const int block_threads = kConvWarps * kLanes;
  const int blocks = (threads + block_threads - 1) / block_threads;
  const int block = static_cast<int>(blockIdx.x);
  const int number = block % blocks * block_threads +
                     static_cast<int>(threadIdx.y * kLanes + threadIdx.x);
  if (number >= threads) {
    return;
  }
  const HalvedPlace place(a.map, block / blocks, number / groups * columns);
  const Channels<count, kPacked> channels(number % groups, groups, dim);
  const ConvWeights<T, count> weights(a, channels);
  const int left = 2 * place.x0 - 1;
  Acc row[2 * columns + 1][count], sums[columns][count], next[columns][count];
  fill_columns(sums, weights.bias);
  load_positive(a, place, channels, 2 * place.y0 - 1, left, row);
  add_row<0, T>(weights, row, sums);
  T* out = a.out + place.out_token(place.y0, place.x0) * dim;
  for (int y = place.y0; y < place.y1; y++) {
    load_positive(a, place, channels, 2 * y, left, row);
    add_row<1, T>(weights, row, sums);
    load_positive(a, place, channels, 2 * y + 1, left, row);
    add_row<2, T>(weights, row, sums);
    fill_columns(next, weights.bias);
    add_row<0, T>(weights, row, next);
#pragma unroll
    for (int c = 0; c < columns; c++) {
#pragma unroll
      for (int k = 0; k < count; k++) {
        sums[c][k] = relu(sums[c][k]);
      }
      channels.store(out + c * dim, place.x0 + c < out_width, sums[c]);
#pragma unroll
      for (int k = 0; k < count; k++) {
        sums[c][k] = next[c][k];
      }
    }
    out += static_cast<int64_t>(out_width) * dim;
  }
}

// Block: 32 x kConvBackwardPack channels of kConvWarps columns of the output,
// and of a band, a part; each writes partial sums.
//
// A thread has column x of the output, and columns 2x and 2x + 1 of the input,
// whose gradients need those of columns x and x + 1. The convolution of both,
// for the slope of the second ReLU, is computed again.
template <typename T, bool kPacked>
__global__ void __launch_bounds__(
    kConvWarps* kLanes,
    min_blocks<acc_t<T>>(2, 1))
    conv3x3_stride2_backward(ConvBackwardArgs<T> a) {
  using Acc = acc_t<T>;
  constexpr int count = kConvBackwardPack<T, kPacked>;
  SMD2_SHARED(Acc, shared);  // [warps][10 x count][32]
  const int dim = static_cast<int>(a.map.dim);
  const int out_width = (static_cast<int>(a.map.width) + 1) / 2;
  const int lanes = (dim + kLanes * count - 1) / (kLanes * count);
  const int across = (out_width + kConvWarps - 1) / kConvWarps;
  const int block = static_cast<int>(blockIdx.x);
  const int channel_block = block % lanes, part = block / lanes;
  const HalvedPlace place(
      a.map,
      part / across,
      part % across * kConvWarps + static_cast<int>(threadIdx.y));
  const Channels<count, kPacked> channels(
      channel_block * kLanes + static_cast<int>(threadIdx.x),
      lanes * kLanes,
      dim);
  const ConvWeights<T, count> weights(a, channels);
  Acc grads[10 * count];  // of the weights and the bias
#pragma unroll
  for (Acc& grad : grads) {
    grad = 0;
  }
  const int x = place.x0, left = 2 * x - 1;
  Acc rows[3][5][count];     // rows 2y - 1, 2y, 2y + 1, columns 2x - 1 ...
  Acc above[2][count] = {};  // gradients of the convolution at row y - 1
  load_positive(a, place, channels, 2 * place.y0 - 1, left, rows[2]);
  // The row after the band gives the gradient of the band's last row.
  for (int y = place.y0; y <= place.y1; y++) {
#pragma unroll
    for (int c = 0; c < 5; c++) {
#pragma unroll
      for (int k = 0; k < count; k++) {
        rows[0][c][k] = rows[2][c][k];
      }
    }
    load_positive(a, place, channels, 2 * y, left, rows[1]);
    load_positive(a, place, channels, 2 * y + 1, left, rows[2]);
    Acc conv[2][count], grad[2][count];
    fill_columns(conv, weights.bias);
    add_row<0, T>(weights, rows[0], conv);
    add_row<1, T>(weights, rows[1], conv);
    add_row<2, T>(weights, rows[2], conv);
    const T* of_out = a.grad_out + place.out_token(y, x) * dim;
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const bool exists = y < place.out_height && x + c < out_width;
      channels.load(of_out + c * dim, exists, grad[c]);
#pragma unroll
      for (int k = 0; k < count; k++) {
        grad[c][k] = conv[c][k] <= Acc(0) ? Acc(0) : grad[c][k];
      }
    }
    Acc upper[2][count], lower[2][count];  // gradients of rows 2y - 1 and 2y
#pragma unroll
    for (int k = 0; k < count; k++) {
      const Acc(&taps)[9] = weights.taps[k];
      upper[0][k] = taps[7] * above[0][k] + taps[1] * grad[0][k];
      upper[1][k] = taps[8] * above[0][k] + taps[6] * above[1][k] +
                    taps[2] * grad[0][k] + taps[0] * grad[1][k];
      lower[0][k] = taps[4] * grad[0][k];
      lower[1][k] = taps[5] * grad[0][k] + taps[3] * grad[1][k];
      const Acc own = y < place.y1 ? grad[0][k] : Acc(0);
#pragma unroll
      for (int tap = 0; tap < 9; tap++) {
        grads[k * 10 + tap] += rows[tap / 3][tap % 3][k] * own;
      }
      grads[k * 10 + 9] += own;
    }
    T* of_x = a.grad_x + place.token(2 * y, 2 * x) * dim;
    const int64_t row_size = static_cast<int64_t>(place.width) * dim;
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const bool exists = 2 * x + c < place.width;
#pragma unroll
      for (int k = 0; k < count; k++) {
        upper[c][k] = rows[0][c + 1][k] <= Acc(0) ? Acc(0) : upper[c][k];
        lower[c][k] = rows[1][c + 1][k] <= Acc(0) ? Acc(0) : lower[c][k];
        above[c][k] = grad[c][k];
      }
      channels.store(
          of_x - row_size + c * dim,
          exists && y > place.y0 && 2 * y - 1 < place.height,
          upper[c]);
      channels.store(of_x + c * dim, exists && y < place.y1, lower[c]);
    }
  }

  store_weight_sums(a, part, channels, grads, shared);
}

}  // namespace cuda
}  // namespace smd2
