// Sums over all channels of a token.
#pragma once

#include "channels.cuh"

namespace smd2 {
namespace cuda {

// Warps of a block if a warp processes a token. Not tuned on a GPU.
constexpr int kTeamWarps = 8;
// Sums over a team at once, at most.
constexpr int kTeamSums = 2;

// The threads that process a token: a warp, or, if that has too few threads for
// the channels, all warps of the block.
template <typename Acc>
class Team {
 public:
  // `scratch` has 2 x kTeamSums values for each warp; a warp needs none.
  SMD2_DEVICE Team(Acc* scratch, int64_t warps)
      : scratch_(scratch), warps_(static_cast<int>(warps)) {}

  // Number of this thread in its team, and number of its team in the block.
  SMD2_DEVICE int thread() const {
    const int warp = static_cast<int>(warps_ == 1 ? 0 : threadIdx.y);
    return warp * kLanes + static_cast<int>(threadIdx.x);
  }
  SMD2_DEVICE int threads() const {
    return warps_ * kLanes;
  }
  SMD2_DEVICE int number() const {
    return static_cast<int>(warps_ == 1 ? threadIdx.y : 0);
  }
  SMD2_DEVICE int teams() const {
    return static_cast<int>(warps_ == 1 ? blockDim.y : 1);
  }

  // Sums each value over the threads of the team; all of them get the sums, and
  // the same bits.
  template <int count>
  SMD2_DEVICE void sum(Acc (&values)[count]) {
    static_assert(count <= kTeamSums, "the size of the scratch memory");
#pragma unroll
    for (int k = 0; k < count; k++) {
      values[k] = warp_sum(values[k]);
    }
    if (warps_ == 1) {
      return;
    }
    // The two halves take turns: who writes to one has passed the barrier that
    // all others reach after they have read it.
    Acc* of_warps = scratch_ + half_ * kTeamSums * warps_;
    half_ = 1 - half_;
    if (threadIdx.x == 0) {
#pragma unroll
      for (int k = 0; k < count; k++) {
        of_warps[k * warps_ + threadIdx.y] = values[k];
      }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < count; k++) {
      values[k] = 0;
      for (int warp = 0; warp < warps_; warp++) {
        values[k] += of_warps[k * warps_ + warp];
      }
    }
  }

 private:
  Acc* scratch_;
  int warps_, half_ = 0;
};

// Makes the channels of `tokens` tokens, `count` in each thread, normalized:
// mean 0, variance 1 except for eps. Returns the factors in `scales`.
template <typename Acc, int tokens, int count, bool kPacked>
SMD2_DEVICE void normalize(
    Team<Acc>& team,
    const Channels<count, kPacked>& channels,
    Acc eps,
    Acc (&values)[tokens][count],
    Acc (&scales)[tokens]) {
  const Acc share = Acc(1) / Acc(channels.dim);
  Acc sums[tokens];
#pragma unroll
  for (int i = 0; i < tokens; i++) {
    sums[i] = 0;
#pragma unroll
    for (int k = 0; k < count; k++) {
      sums[i] += values[i][k];  // 0 in channels that do not exist
    }
  }
  team.sum(sums);
#pragma unroll
  for (int i = 0; i < tokens; i++) {
    const Acc mean = sums[i] * share;
    sums[i] = 0;
#pragma unroll
    for (int k = 0; k < count; k++) {
      values[i][k] = channels.valid(k) ? values[i][k] - mean : Acc(0);
      sums[i] += values[i][k] * values[i][k];
    }
  }
  team.sum(sums);
#pragma unroll
  for (int i = 0; i < tokens; i++) {
    scales[i] = Acc(1) / sqrt_(sums[i] * share + eps);
#pragma unroll
    for (int k = 0; k < count; k++) {
      values[i][k] *= scales[i];
    }
  }
}

}  // namespace cuda
}  // namespace smd2
