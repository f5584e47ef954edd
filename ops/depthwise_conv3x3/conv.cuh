// Kernels of the depthwise convolution, forward and backward.
//
// A thread has a few channels of kConvColumns columns, and goes down a band of
// rows. Each row that it reads adds to the sums of three rows of the output, so
// that neither rows of the input nor of the output are kept, and a value is
// read once for each thread that needs it. Neighbouring threads have
// neighbouring channels, then neighbouring columns, so that the cache serves
// all reads except the first.
#pragma once

#include "../cuda/activations.cuh"
#include "../cuda/channels.cuh"

namespace smd2 {
namespace cuda {

// Not tuned on a GPU.
constexpr int kConvColumns = 2;  // of a thread
constexpr int kConvWarps = 8;    // of a block
// Channels of a thread of the backward pass, which has 40 sums for each; one
// where the addresses of several would take registers as well.
template <typename T, bool kPacked>
constexpr int kConvBackwardPack = kPacked ? kPack<T> / 2 : 1;

// How a map is cut; bands have band_height rows, the last one may have fewer.
struct ConvMap {
  int64_t images, height, width, dim;
  int64_t stride;  // of x, from token to token
  int64_t band_height, bands;
};

// Pointers to contiguous tensors, except x.
template <typename T>
struct ConvArgs {
  ConvMap map;
  const T* x;              // [images, height, width, dim]
  const acc_t<T>* weight;  // [dim, 9]
  const acc_t<T>* bias;    // [dim]
};

// The part of a map that a thread processes: columns x0, x0 + 1, ... of rows
// y0 .. y1 - 1.
struct ConvPlace {
  int64_t image;
  int height, width;
  int x0, y0, y1;

  SMD2_DEVICE ConvPlace(const ConvMap& map, int part, int column)
      : height(static_cast<int>(map.height)),
        width(static_cast<int>(map.width)),
        x0(column * kConvColumns) {
    const int bands = static_cast<int>(map.bands);
    image = part / bands;
    y0 = part % bands * static_cast<int>(map.band_height);
    y1 = y0 + static_cast<int>(map.band_height);
    y1 = y1 < height ? y1 : height;
  }
  // Number of a token among those of all images.
  SMD2_DEVICE int64_t token(int y, int x) const {
    return (image * height + y) * width + x;
  }
  SMD2_DEVICE bool has_row(int y) const {
    return y >= 0 && y < height;
  }
  SMD2_DEVICE bool has_column(int x) const {
    return x >= 0 && x < width;
  }
};

// Loads `columns` tokens, from column x of a row that `token` points into.
template <int columns, typename T, int count, bool kPacked>
SMD2_DEVICE void load_tokens(
    const T* token,
    int stride,
    const ConvPlace& place,
    bool inside,
    int x,
    const Channels<count, kPacked>& channels,
    acc_t<T> (&values)[columns][count]) {
#pragma unroll
  for (int i = 0; i < columns; i++) {
    channels.load(
        token + i * stride, inside && place.has_column(x + i), values[i]);
  }
}

// Weights of a thread's channels, and what follows from them.
template <typename T, int count>
struct ConvWeights {
  using Acc = acc_t<T>;
  Acc taps[count][9];
  Acc bias[count];

  template <bool kPacked>
  SMD2_DEVICE ConvWeights(
      const ConvArgs<T>& a,
      const Channels<count, kPacked>& channels) {
#pragma unroll
    for (int k = 0; k < count; k++) {
      const bool valid = channels.valid(k);
      bias[k] = load(a.bias + channels.at(k), valid);
#pragma unroll
      for (int tap = 0; tap < 9; tap++) {
        taps[k][tap] = load(a.weight + channels.at(k) * 9 + tap, valid);
      }
    }
  }

  // Adds a row of the input to the convolution of the rows above, at and below
  // it.
  template <int columns>
  SMD2_DEVICE void add(
      const Acc (&row)[columns + 2][count],
      Acc (&sums)[3][columns][count]) const {
#pragma unroll
    for (int i = 0; i < 3; i++) {
#pragma unroll
      for (int c = 0; c < columns; c++) {
#pragma unroll
        for (int k = 0; k < count; k++) {
#pragma unroll
          for (int j = 0; j < 3; j++) {
            sums[i][c][k] += taps[k][(2 - i) * 3 + j] * row[c + j][k];
          }
        }
      }
    }
  }
};

// Moves three rows up by one; the last one is set to `fresh`.
template <typename Acc, int columns, int count>
SMD2_DEVICE void shift_rows(
    Acc (&rows)[3][columns][count],
    const Acc (&fresh)[count]) {
#pragma unroll
  for (int c = 0; c < columns; c++) {
#pragma unroll
    for (int k = 0; k < count; k++) {
      rows[0][c][k] = rows[1][c][k];
      rows[1][c][k] = rows[2][c][k];
      rows[2][c][k] = fresh[k];
    }
  }
}

template <typename Acc, int columns, int count>
SMD2_DEVICE void fill_rows(
    Acc (&rows)[3][columns][count],
    const Acc (&value)[count]) {
#pragma unroll
  for (int i = 0; i < 3; i++) {
    shift_rows(rows, value);
  }
}

// Calls use(y, values) with each row of the convolution, to which kResidual
// adds its input.
template <bool kResidual, typename T, int count, bool kPacked, typename Use>
SMD2_DEVICE void convolve(
    const ConvArgs<T>& a,
    const ConvPlace& place,
    const Channels<count, kPacked>& channels,
    const Use& use) {
  using Acc = acc_t<T>;
  const ConvWeights<T, count> weights(a, channels);
  Acc sums[3][kConvColumns][count];  // of rows y - 1, y, y + 1
  fill_rows(sums, weights.bias);
  const int stride = static_cast<int>(a.map.stride);
  const T* token = a.x + place.token(place.y0 - 1, place.x0 - 1) * a.map.stride;
  for (int y = place.y0 - 1; y <= place.y1; y++) {
    Acc row[kConvColumns + 2][count];
    load_tokens(
        token, stride, place, place.has_row(y), place.x0 - 1, channels, row);
    token += place.width * a.map.stride;
    weights.add(row, sums);
    if (kResidual) {
#pragma unroll
      for (int c = 0; c < kConvColumns; c++) {
#pragma unroll
        for (int k = 0; k < count; k++) {
          sums[1][c][k] += row[c + 1][k];
        }
      }
    }
    if (y > place.y0) {
      use(y - 1, sums[0]);
    }
    shift_rows(sums, weights.bias);
  }
}

template <typename T>
struct ConvForwardArgs : ConvArgs<T> {
  T* out;  // [images, height, width, dim]
};

// Block: a share of the threads of a band, which are numbered by channels, then
// by columns.
template <typename T, bool kPacked, bool kResidual>
__global__ void __launch_bounds__(
    kConvWarps* kLanes,
    min_blocks<acc_t<T>>(2, 2)) conv3x3(ConvForwardArgs<T> a) {
  constexpr int count = kPack<T>;
  const int width = static_cast<int>(a.map.width);
  const int dim = static_cast<int>(a.map.dim);
  const int groups = (dim + count - 1) / count;
  const int threads = groups * ((width + kConvColumns - 1) / kConvColumns);
  const int block_threads = kConvWarps * kLanes;
  const int blocks = (threads + block_threads - 1) / block_threads;
  const int block = static_cast<int>(blockIdx.x);
  const int number = block % blocks * block_threads +
                     static_cast<int>(threadIdx.y * kLanes + threadIdx.x);
  if (number >= threads) {
    return;
  }
  const ConvPlace place(a.map, block / blocks, number / groups);
  const Channels<count, kPacked> channels(number % groups, groups, dim);
  T* out = a.out + place.token(place.y0, place.x0) * dim;
  convolve<kResidual>(a, place, channels, [&](int, auto& values) {
#pragma unroll
    for (int c = 0; c < kConvColumns; c++) {
      if (!kResidual) {
#pragma unroll
        for (int k = 0; k < count; k++) {
          values[c][k] = silu(values[c][k]);
        }
      }
      channels.store(out + c * dim, place.x0 + c < width, values[c]);
    }
    out += static_cast<int64_t>(width) * dim;
  });
}

template <typename T>
struct ConvBackwardArgs : ConvArgs<T> {
  const T* grad_out;      // [images, height, width, dim]
  T* grad_x;              // [images, height, width, dim]
  acc_t<T>* grad_weight;  // [parts, dim, 9]
  acc_t<T>* grad_bias;    // [parts, dim]
};

// Sums what each thread has for the gradients of the weights and of the bias
// over a block, and stores the partial sums of a part.
template <typename T, int count, bool kPacked>
SMD2_DEVICE void store_weight_sums(
    const ConvBackwardArgs<T>& a,
    int part,
    const Channels<count, kPacked>& channels,
    acc_t<T> (&grads)[10 * count],
    acc_t<T>* shared) {
  block_sum(grads, shared);
  if (threadIdx.y != 0) {
    return;
  }
#pragma unroll
  for (int k = 0; k < count; k++) {
    const int64_t at = static_cast<int64_t>(part) * a.map.dim + channels.at(k);
#pragma unroll
    for (int tap = 0; tap < 9; tap++) {
      store(
          a.grad_weight + at * 9 + tap, grads[k * 10 + tap], channels.valid(k));
    }
    store(a.grad_bias + at, grads[k * 10 + 9], channels.valid(k));
  }
}

template <typename T>
struct ConvStride1BackwardArgs : ConvBackwardArgs<T> {
  int64_t grad_x_stride;  // from token to token
};

// Block: 32 x kConvBackwardPack channels of kConvWarps x kConvColumns columns
// of a band, a part; each writes partial sums.
//
// Row y of the gradient of the convolution adds to those of rows y - 1, y,
// y + 1 of x, and, multiplied by these, to that of the weights. It is that of
// the output, after SiLU multiplied by its slope at the convolution. That is
// computed again, also in the neighbouring columns: more arithmetic, but
// nothing to store or to wait for.
template <typename T, bool kPacked, bool kResidual>
__global__ void __launch_bounds__(
    kConvWarps* kLanes,
    min_blocks<acc_t<T>>(2, 1)) conv3x3_backward(ConvStride1BackwardArgs<T> a) {
  using Acc = acc_t<T>;
  constexpr int count = kConvBackwardPack<T, kPacked>, columns = kConvColumns;
  constexpr int halo = kResidual ? 0 : 2;  // columns of x that are read
  SMD2_SHARED(Acc, shared);                // [warps][10 x count][32]
  const int dim = static_cast<int>(a.map.dim);
  const int width = static_cast<int>(a.map.width);
  const int lanes = (dim + kLanes * count - 1) / (kLanes * count);
  const int across =
      (width + kConvWarps * columns - 1) / (kConvWarps * columns);
  const int block = static_cast<int>(blockIdx.x);
  const int channel_block = block % lanes, part = block / lanes;
  const ConvPlace place(
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
  constexpr Acc zero[count] = {};
  Acc x[3][columns][count];         // rows y - 1, y, y + 1 of the band
  Acc grad_x[3][columns][count];    // the same rows
  Acc conv[3][columns + 2][count];  // rows y, y + 1, y + 2
  fill_rows(x, zero);
  fill_rows(grad_x, zero);
  fill_rows(conv, weights.bias);

  const int stride = static_cast<int>(a.map.stride);
  const int first = place.y0 - (kResidual ? 1 : 3);
  const T* x_token =
      a.x + place.token(first + 1, place.x0 - halo) * a.map.stride;
  int64_t at = place.token(place.y0 - 1, place.x0 - 1);  // of the gradient
  for (int y = first; y <= place.y1; y++) {
    const bool in_band = y + 1 >= place.y0 && y + 1 < place.y1;
    Acc row[columns + 2 * halo][count];
    load_tokens(
        x_token,
        stride,
        place,
        kResidual ? in_band : place.has_row(y + 1),
        place.x0 - halo,
        channels,
        row);
    x_token += width * a.map.stride;
    shift_rows(x, zero);
#pragma unroll
    for (int c = 0; c < columns; c++) {
#pragma unroll
      for (int k = 0; k < count; k++) {
        x[2][c][k] = in_band ? row[c + halo][k] : Acc(0);
      }
    }
    if constexpr (!kResidual) {
      weights.template add<columns + 2>(row, conv);
    }
    if (y >= place.y0 - 1) {
      Acc grad[columns + 2][count];
      load_tokens(
          a.grad_out + at * dim,
          dim,
          place,
          place.has_row(y),
          place.x0 - 1,
          channels,
          grad);
      if (!kResidual) {
#pragma unroll
        for (int c = 0; c < columns + 2; c++) {
#pragma unroll
          for (int k = 0; k < count; k++) {
            grad[c][k] *= silu_slope(conv[0][c][k]);
          }
        }
      }
#pragma unroll
      for (int c = 0; c < columns; c++) {
#pragma unroll
        for (int k = 0; k < count; k++) {
#pragma unroll
          for (int tap = 0; tap < 9; tap++) {
            const int i = tap / 3, j = tap % 3;
            const Acc value = grad[c + 2 - j][k];
            grad_x[i][c][k] += weights.taps[k][tap] * value;
            grads[k * 10 + tap] += x[i][c][k] * value;
          }
          if (kResidual) {
            grad_x[1][c][k] += grad[c + 1][k];
          }
          if (y >= place.y0 && y < place.y1) {
            grads[k * 10 + 9] += grad[c + 1][k];
          }
        }
      }
      if (y > place.y0) {
        T* above = a.grad_x + (at - width + 1) * a.grad_x_stride;
#pragma unroll
        for (int c = 0; c < columns; c++) {
          channels.store(above, place.x0 + c < width, grad_x[0][c]);
          above += a.grad_x_stride;
        }
      }
      at += width;
      shift_rows(grad_x, zero);
    }
    shift_rows(conv, weights.bias);
  }

  store_weight_sums(a, part, channels, grads, shared);
}

}  // namespace cuda
}  // namespace smd2
