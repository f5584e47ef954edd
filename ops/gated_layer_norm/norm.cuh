// Kernels of gated_layer_norm, forward and backward. Every thread of a team has
// kPack channels of a token, so that each tensor is read once.
#pragma once

#include "../cuda/activations.cuh"
#include "../cuda/team.cuh"

namespace smd2 {
namespace cuda {

// Threads of a block, at most: more would leave too few registers.
template <typename Acc>
constexpr int kMaxNormThreads = sizeof(Acc) == sizeof(double) ? 512 : 1024;
constexpr int kMaxNormBackwardThreads = 512;

// Pointers to contiguous tensors, except y, z and the gradient of z.
template <typename T>
struct NormArgs {
  const T* y;              // [tokens, dim]
  const T* z;              // [tokens, dim]
  const acc_t<T>* weight;  // [dim]
  const acc_t<T>* bias;    // [dim]
  int64_t tokens, dim;
  int64_t y_stride, z_stride;  // from token to token
  int64_t team_warps;          // at least dim / (32 kPack)
  double eps;
};

template <typename T>
struct NormForwardArgs : NormArgs<T> {
  T* out;  // [tokens, dim]
};

// One token for each team.
template <typename T, bool kPacked>
__global__ void __launch_bounds__(kMaxNormThreads<acc_t<T>>, 1)
    gated_norm(NormForwardArgs<T> a) {
  using Acc = acc_t<T>;
  constexpr int count = kPack<T>;
  SMD2_SHARED(Acc, shared);
  Team<Acc> team(shared, a.team_warps);
  const int64_t token =
      static_cast<int64_t>(blockIdx.x) * team.teams() + team.number();
  if (token >= a.tokens) {  // such a team is a warp, and waits for no other
    return;
  }
  const int dim = static_cast<int>(a.dim);
  const Channels<count, kPacked> channels(team.thread(), team.threads(), dim);
  Acc norm[1][count], gate[count], weight[count], bias[count], scale[1];
  channels.load(a.y + token * a.y_stride, true, norm[0]);
  channels.load(a.z + token * a.z_stride, true, gate);
  channels.load(a.weight, true, weight);
  channels.load(a.bias, true, bias);
  normalize(team, channels, static_cast<Acc>(a.eps), norm, scale);
#pragma unroll
  for (int k = 0; k < count; k++) {
    norm[0][k] = (norm[0][k] * weight[k] + bias[k]) * silu(gate[k]);
  }
  channels.store(a.out + token * dim, true, norm[0]);
}

template <typename T>
struct NormBackwardArgs : NormArgs<T> {
  const T* grad_out;      // [tokens, dim]
  T* grad_y;              // [tokens, dim]
  T* grad_z;              // [tokens, dim]
  acc_t<T>* grad_weight;  // [blocks, dim]
  acc_t<T>* grad_bias;    // [blocks, dim]
  T* out;                 // [tokens, dim], or null if it is not wanted
  int64_t grad_z_stride;  // from token to token
  int64_t blocks;
};

// Team i processes tokens i, i + number of all teams, ...; each block writes
// partial sums.
template <typename T, bool kPacked>
__global__ void __launch_bounds__(kMaxNormBackwardThreads, 1)
    gated_norm_backward(NormBackwardArgs<T> a) {
  using Acc = acc_t<T>;
  constexpr int count = kPack<T>;
  // For teams, then [warps][2 x count][32].
  SMD2_SHARED(Acc, shared);
  Team<Acc> team(shared, a.team_warps);
  const int dim = static_cast<int>(a.dim);
  const Channels<count, kPacked> channels(team.thread(), team.threads(), dim);
  Acc weight[count], bias[count];
  channels.load(a.weight, true, weight);
  channels.load(a.bias, true, bias);
  Acc grads[2 * count];  // of weight and bias
#pragma unroll
  for (Acc& grad : grads) {
    grad = 0;
  }
  const int64_t block = blockIdx.x;
  for (int64_t token = block * team.teams() + team.number(); token < a.tokens;
       token += a.blocks * team.teams()) {
    Acc norm[1][count], gate[count], grad[count], out[count], scale[1];
    channels.load(a.y + token * a.y_stride, true, norm[0]);
    channels.load(a.z + token * a.z_stride, true, gate);
    channels.load(a.grad_out + token * dim, true, grad);
    normalize(team, channels, static_cast<Acc>(a.eps), norm, scale);
    Acc sums[2] = {0, 0};  // of the gradient of the norm, and times the norm
#pragma unroll
    for (int k = 0; k < count; k++) {
      const Acc affine = norm[0][k] * weight[k] + bias[k];
      const Acc of_silu = grad[k] * affine;
      out[k] = affine * silu(gate[k]);
      grad[k] *= silu(gate[k]);
      gate[k] = of_silu * silu_slope(gate[k]);
      grads[2 * k] += grad[k] * norm[0][k];
      grads[2 * k + 1] += grad[k];
      grad[k] *= weight[k];
      sums[0] += grad[k];
      sums[1] += grad[k] * norm[0][k];
    }
    channels.store(a.grad_z + token * a.grad_z_stride, true, gate);
    if (a.out) {
      channels.store(a.out + token * dim, true, out);
    }
    team.sum(sums);
    const Acc share = Acc(1) / Acc(dim);
#pragma unroll
    for (int k = 0; k < count; k++) {
      grad[k] = scale[0] * (grad[k] - share * (sums[0] + norm[0][k] * sums[1]));
    }
    channels.store(a.grad_y + token * dim, true, grad);
  }

  if (a.team_warps == 1) {
    block_sum(grads, shared);
  }
  if (team.number() == 0) {
#pragma unroll
    for (int k = 0; k < count; k++) {
      const int64_t at = block * dim + channels.at(k);
      store(a.grad_weight + at, grads[2 * k], channels.valid(k));
      store(a.grad_bias + at, grads[2 * k + 1], channels.valid(k));
    }
  }
}

}  // namespace cuda
}  // namespace smd2
