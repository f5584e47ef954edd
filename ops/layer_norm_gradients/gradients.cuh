// The kernel of layer_norm_gradients. Every thread of a team has kPack channels
// of a token, so that each tensor is read once.
#pragma once

#include "../cuda/team.cuh"

namespace smd2 {
namespace cuda {

// Warps of a block, at most: more would leave too few registers.
constexpr int kNormGradientsWarps = 16;

// Pointers to contiguous tensors.
template <typename T>
struct NormGradientsArgs {
  const T* grad_out;       // [tokens, dim]
  const T* residual;       // [tokens, dim]
  const T* x;              // [tokens, dim]
  const acc_t<T>* weight;  // [dim]
  const acc_t<T>* bias;    // [dim]
  T* grad_x;               // [tokens, dim]
  T* out;                  // [tokens, dim]
  acc_t<T>* grad_weight;   // [blocks, dim]
  acc_t<T>* grad_bias;     // [blocks, dim]
  int64_t tokens, dim, blocks;
  int64_t team_warps;  // at least dim / (32 kPack)
  double eps;
};

// Team i processes tokens i, i + number of all teams, ...; each block writes
// partial sums.
template <typename T, bool kPacked>
__global__ void __launch_bounds__(kNormGradientsWarps* kLanes, 1)
    layer_norm_gradients(NormGradientsArgs<T> a) {
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
    const int64_t at = token * dim;
    Acc normal[1][count], grad[count], other[count], scale[1];
    channels.load(a.x + at, true, normal[0]);
    channels.load(a.grad_out + at, true, grad);
    channels.load(a.residual + at, true, other);
    normalize(team, channels, static_cast<Acc>(a.eps), normal, scale);
    Acc sums[2] = {0, 0};  // of the gradient of the norm, and times the norm
    Acc out[count];
#pragma unroll
    for (int k = 0; k < count; k++) {
      out[k] = normal[0][k] * weight[k] + bias[k];
      grads[2 * k] += grad[k] * normal[0][k];
      grads[2 * k + 1] += grad[k];
      grad[k] *= weight[k];
      sums[0] += grad[k];
      sums[1] += grad[k] * normal[0][k];
    }
    channels.store(a.out + at, true, out);
    team.sum(sums);
    const Acc share = Acc(1) / Acc(dim);
#pragma unroll
    for (int k = 0; k < count; k++) {
      const Acc along = share * (sums[0] + normal[0][k] * sums[1]);
      grad[k] = other[k] + scale[0] * (grad[k] - along);
    }
    channels.store(a.grad_x + at, true, grad);
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
