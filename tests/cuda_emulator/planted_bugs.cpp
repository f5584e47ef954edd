// Kernels with one bug each, chosen by name. The emulator or a sanitizer must
// report every one of them.
#include <cmath>
#include <cstdio>
#include <exception>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "kernels.h"
#include "ops/cuda/simt.h"

namespace smd2 {
namespace {

struct Args {
  float* out;
};

__global__ void divergent_barrier(Args a) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    a.out[threadIdx.x] = 1;
    __syncthreads();
  }
}

__global__ void exit_before_barrier(Args a) {
  if (threadIdx.x == 3) {
    return;
  }
  __syncthreads();
  a.out[threadIdx.x] = 1;
}

__global__ void divergent_shuffle(Args a) {
  if (threadIdx.x < 16) {
    a.out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.f, 1);
  } else {
    a.out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 2.f, 1);
  }
}

__global__ void exited_lane(Args a) {
  if (threadIdx.x == 3) {
    return;
  }
  a.out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.f, 1);
}

__global__ void partial_mask(Args a) {
  a.out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.f, 1);
}

__global__ void out_of_bounds(Args a) {
  a.out[64 * blockIdx.x + threadIdx.x + 1] = 1;
}

__global__ void out_of_shared(Args a) {
  SMD2_SHARED(float, shared);
  shared[threadIdx.x + 1] = 1;
  __syncthreads();
  a.out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void misaligned(Args a) {
  float4 four = *reinterpret_cast<const float4*>(a.out + 1);
  a.out[threadIdx.x] = four.x;
}

__global__ void unwritten_shared(Args a) {
  SMD2_SHARED(float, shared);
  if (threadIdx.x != 5) {
    shared[threadIdx.x] = 1;
  }
  __syncthreads();
  a.out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void missing_barrier(Args a) {
  SMD2_SHARED(float, shared);
  shared[threadIdx.x + 32 * threadIdx.y] = 1;
  a.out[threadIdx.x] = shared[threadIdx.x + 32 * (1 - threadIdx.y)];
}

__global__ void race(Args a) {
  a.out[0] += 1;
}

__global__ void race_between_blocks(Args a) {
  if (threadIdx.x == 0) {
    a.out[0] = static_cast<float>(blockIdx.x);
  }
}

__global__ void correct(Args a) {
  SMD2_SHARED(float, shared);
  shared[threadIdx.x] = 1;
  __syncthreads();
  a.out[32 * blockIdx.x + threadIdx.x] = shared[31 - threadIdx.x];
}

struct Plan {
  void (*kernel)(Args);
  int64_t blocks;
  int warps;
  size_t shared_bytes;
};

const std::map<std::string, Plan> kPlans = {
    {"correct", {correct, 2, 1, 128}},
    {"divergent_barrier", {divergent_barrier, 1, 1, 0}},
    {"exit_before_barrier", {exit_before_barrier, 1, 1, 0}},
    {"divergent_shuffle", {divergent_shuffle, 1, 1, 0}},
    {"exited_lane", {exited_lane, 1, 1, 0}},
    {"partial_mask", {partial_mask, 1, 1, 0}},
    {"out_of_bounds", {out_of_bounds, 1, 2, 0}},
    {"out_of_shared", {out_of_shared, 1, 1, 128}},
    {"misaligned", {misaligned, 1, 1, 0}},
    {"unwritten_shared", {unwritten_shared, 1, 1, 128}},
    {"missing_barrier", {missing_barrier, 1, 2, 256}},
    {"race", {race, 1, 1, 0}},
    {"race_between_blocks", {race_between_blocks, 2, 1, 0}},
    {"oversized_block", {correct, 1, 33, 128}},
    {"oversized_shared", {correct, 1, 1, 65 * 1024}},
    {"empty_grid", {correct, 0, 1, 128}},
};

}  // namespace
}  // namespace smd2

int main(int, char** argv) {
  const auto& plan = smd2::kPlans.at(argv[1]);
  const std::string order = argv[2];
  using smd2::emulator::Order;
  smd2::emulator::set_order(
      order == "forward"   ? Order::forward
      : order == "reverse" ? Order::reverse
                           : Order::random);
  // Room for threads that write nothing but their own element.
  std::vector<float> out(argv[1] == std::string("out_of_bounds") ? 32 : 64);
  try {
    smd2::emulator::Registration(argv[1], plan.kernel);
    const smd2::Args args{out.data()};
    smd2::emulator::launch(
        argv[1],
        plan.blocks,
        plan.warps,
        plan.shared_bytes,
        &args,
        sizeof(args));
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  for (const float value : out) {
    if (std::isnan(value)) {
      std::printf("a result is NaN\n");
      return 1;
    }
  }
  return 0;
}
