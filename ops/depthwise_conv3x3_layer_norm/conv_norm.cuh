// The kernel of depthwise_conv3x3_layer_norm: the convolution's, with threads
// arranged in teams that have all channels of a column.
#pragma once

#include "../cuda/team.cuh"
#include "../depthwise_conv3x3/conv.cuh"

namespace smd2 {
namespace cuda {

// Channels of a thread; fewer where each has an address of its own.
template <typename T, bool kPacked>
constexpr int kConvNormPack = kPacked ? kPack<T> : kPack<T> / 2;

template <typename T>
struct ConvNormArgs : ConvArgs<T> {
  const acc_t<T>* norm_weight;  // [dim]
  const acc_t<T>* norm_bias;    // [dim]
  T* y;                         // [images, height, width, dim]
  T* norm;                      // [images, height, width, dim]
  int64_t team_warps;           // at least dim / (32 kConvNormPack)
  double eps;
};

// Warps of a block, at most; more would leave too few registers.
constexpr int kConvNormWarps = 8;

// Each team has kConvColumns columns of a band. The norm is that of y as it is
// stored.
template <typename T, bool kPacked>
__global__ void __launch_bounds__(
    kConvNormWarps* kLanes,
    min_blocks<acc_t<T>>(2, 1)) conv3x3_norm(ConvNormArgs<T> a) {
  using Acc = acc_t<T>;
  constexpr int count = kConvNormPack<T, kPacked>, columns = kConvColumns;
  SMD2_SHARED(Acc, shared);
  Team<Acc> team(shared, a.team_warps);
  const int width = static_cast<int>(a.map.width);
  const int dim = static_cast<int>(a.map.dim);
  const int per_block = team.teams() * columns;
  const int across = (width + per_block - 1) / per_block;
  const int block = static_cast<int>(blockIdx.x);
  const ConvPlace place(
      a.map, block / across, block % across * team.teams() + team.number());
  const Channels<count, kPacked> channels(team.thread(), team.threads(), dim);
  int64_t at = place.token(place.y0, place.x0) * dim;
  convolve<true>(a, place, channels, [&](int, auto& values) {
    Acc scales[columns];
#pragma unroll
    for (int c = 0; c < columns; c++) {
      channels.store(a.y + at + c * dim, place.x0 + c < width, values[c]);
#pragma unroll
      for (int k = 0; k < count; k++) {
        values[c][k] = channels.valid(k)
                           ? static_cast<Acc>(static_cast<T>(values[c][k]))
                           : Acc(0);
      }
    }
    normalize(team, channels, static_cast<Acc>(a.eps), values, scales);
    Acc weight[count], bias[count];  // from the cache, registers are scarce
    channels.load(a.norm_weight, true, weight);
    channels.load(a.norm_bias, true, bias);
#pragma unroll
    for (int c = 0; c < columns; c++) {
#pragma unroll
      for (int k = 0; k < count; k++) {
        values[c][k] = values[c][k] * weight[k] + bias[k];
      }
      channels.store(a.norm + at + c * dim, place.x0 + c < width, values[c]);
    }
    at += static_cast<int64_t>(width) * dim;
  });
}

}  // namespace cuda
}  // namespace smd2
