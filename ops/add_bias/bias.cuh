// The kernel of add_bias_. Each thread has kPack channels of a token.
#pragma once

#include "../cuda/activations.cuh"
#include "../cuda/channels.cuh"

namespace smd2 {
namespace cuda {

constexpr int kBiasWarps = 8;  // of a block

template <typename T>
struct AddBiasArgs {
  T* x;                  // [tokens, dim]
  const acc_t<T>* bias;  // [dim]
  const T* residual;     // [tokens, dim], or null
  int64_t tokens, dim;
  int64_t relu;  // 0 or 1
};

template <typename T, bool kPacked>
__global__ void __launch_bounds__(kBiasWarps* kLanes)
    add_bias(AddBiasArgs<T> a) {
  using Acc = acc_t<T>;
  constexpr int count = kPack<T>;
  const int dim = static_cast<int>(a.dim);
  const int groups = (dim + count - 1) / count;
  const int64_t number =
      static_cast<int64_t>(blockIdx.x) * (kBiasWarps * kLanes) +
      static_cast<int64_t>(threadIdx.y * kLanes + threadIdx.x);
  const int64_t token = number / groups;
  if (token >= a.tokens) {
    return;
  }
  const int group = static_cast<int>(number - token * groups);
  const Channels<count, kPacked> channels(group, groups, dim);
  Acc sums[count], bias[count], residual[count];
  channels.load(a.x + token * dim, true, sums);
  channels.load(a.bias, true, bias);
  const T* others = a.residual ? a.residual : a.x;
  channels.load(others + token * dim, a.residual != nullptr, residual);
#pragma unroll
  for (int k = 0; k < count; k++) {
    sums[k] += bias[k] + residual[k];
    sums[k] = a.relu ? relu(sums[k]) : sums[k];
  }
  channels.store(a.x + token * dim, true, sums);
}

}  // namespace cuda
}  // namespace smd2
