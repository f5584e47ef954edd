// The kernel of gelu_gradients. Each thread has kPack channels of several
// tokens, whose gradients it sums.
#pragma once

#include "../cuda/activations.cuh"
#include "../cuda/channels.cuh"

namespace smd2 {
namespace cuda {

constexpr int kGeluWarps = 8;  // of a block

template <typename T>
struct GeluGradientsArgs {
  const T* grad_out;   // [tokens, dim]
  const T* x;          // [tokens, dim]
  T* grad_x;           // [tokens, dim]
  T* out;              // [tokens, dim]
  acc_t<T>* grad_sum;  // [parts, dim]
  int64_t tokens, dim, parts;
};

// A block has 32 kPack channels. Of `parts` blocks with the same channels,
// their warps taken together, warp i processes tokens i, i + number of these
// warps, ...; each block writes partial sums.
template <typename T, bool kPacked>
__global__ void __launch_bounds__(
    kGeluWarps* kLanes,
    min_blocks<acc_t<T>>(kPacked ? 4 : 3, 1))
    gelu_gradients(GeluGradientsArgs<T> a) {
  using Acc = acc_t<T>;
  constexpr int count = kPack<T>;
  SMD2_SHARED(Acc, shared);  // [warps][count][32]
  const int dim = static_cast<int>(a.dim);
  const int across = blocks_of(dim, kLanes * count);
  const int block = static_cast<int>(blockIdx.x);
  const int part = block / across;
  const int lane = block % across * kLanes + static_cast<int>(threadIdx.x);
  const Channels<count, kPacked> channels(lane, across * kLanes, dim);
  Acc sums[count];
#pragma unroll
  for (Acc& sum : sums) {
    sum = 0;
  }
  for (int64_t token = static_cast<int64_t>(part) * kGeluWarps + threadIdx.y;
       token < a.tokens;
       token += a.parts * kGeluWarps) {
    const int64_t at = token * dim;
    Acc values[count], grads[count];
    channels.load(a.x + at, true, values);
    channels.load(a.grad_out + at, true, grads);
#pragma unroll
    for (int k = 0; k < count; k++) {
      Acc slope;
      values[k] = gelu(values[k], &slope);
      grads[k] *= slope;
      sums[k] += grads[k];
    }
    channels.store(a.out + at, true, values);
    channels.store(a.grad_x + at, true, grads);
  }

  block_sum(sums, shared);
  if (threadIdx.y == 0) {
#pragma unroll
    for (int k = 0; k < count; k++) {
      const int64_t at = static_cast<int64_t>(part) * dim + channels.at(k);
      store(a.grad_sum + at, sums[k], channels.valid(k));
    }
  }
}

}  // namespace cuda
}  // namespace smd2
