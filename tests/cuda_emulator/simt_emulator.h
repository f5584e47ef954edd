// Runs CUDA kernels on the CPU, in place of NVRTC and a GPU: see
// ops/cuda/simt.h. Every CUDA thread is a fiber; blocks run one after the
// other, on the calling thread.
//
// `run` throws an exception for: a barrier or a shuffle that not all threads
// reach (or that they reach at different lines), a shuffle with a lane that has
// exited or is not in its mask, a deadlock, and a launch that a device of
// compute capability 7.5 cannot run. Shared memory starts as NaN. Sanitizers
// find the rest: with -fsanitize=thread, two accesses that no barrier orders
// are reported as a race, within a block and between blocks; with
// -fsanitize=address,undefined, accesses out of bounds and misaligned ones are
// errors.
//
// Not modelled: time, the order of memory accesses of different warps beyond
// the three orders of threads, and the rounding of the device's exp and log.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>

struct dim3 {
  unsigned x, y, z;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace smd2 {
namespace emulator {

// The order in which the warps of a block, and the lanes of a warp, run. A warp
// runs up to its next barrier before another one starts, so that the effect of
// a missing barrier shows in one of the orders.
enum class Order { forward, reverse, random };
void set_order(Order order);

// Sets a function that is called with the name of every launch when it has
// ended.
void set_observer(void (*observer)(const char* launch));

// Properties and operations of the running CUDA thread.
const dim3& thread_index();
const dim3& block_index();
const dim3& block_size();
void* shared_memory();
void synchronize_block(int line);
// Returns the value that lane `source` of the warp passed.
uint64_t shuffle(unsigned mask, uint64_t value, unsigned source, int line);
unsigned lane();

void run(
    const char* name,
    int64_t blocks,
    unsigned threads_x,
    unsigned threads_y,
    size_t shared_bytes,
    const std::function<void()>& thread);

template <typename T>
T shuffle_xor(int line, unsigned mask, T value, unsigned distance) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "as in CUDA");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, lane() ^ distance, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

}  // namespace smd2

#define SMD2_DEVICE inline __attribute__((always_inline))
#define SMD2_SHARED(TYPE, NAME) \
  TYPE* NAME = static_cast<TYPE*>(::smd2::emulator::shared_memory())
#define __global__
#define __launch_bounds__(...)
#define threadIdx (::smd2::emulator::thread_index())
#define blockIdx (::smd2::emulator::block_index())
#define blockDim (::smd2::emulator::block_size())
#define __syncthreads() ::smd2::emulator::synchronize_block(__LINE__)
#define __shfl_xor_sync(...) \
  ::smd2::emulator::shuffle_xor(__LINE__, __VA_ARGS__)
