// One binary for all machines: a kernel is compiled for AVX-512, for AVX2 and
// for the baseline, and the processor decides at run time.
//
// A kernel is a struct with a static, always inlined
//   template <int N> void run(const Args&),
// N being the number of channels that it treats together. PerBlock makes one of
// a kernel for the single block args.block of args.dim channels,
//   template <int N, bool Full> void run(const Args&),
// Full saying whether the block has N channels.
#pragma once

#include <cstdlib>
#include <string>
#include <type_traits>

#include "simd.h"

namespace smd2 {

// Channels in a block of each version: one register of floats.
constexpr int kLanesAvx512 = 16;
constexpr int kLanesAvx2 = 8;
constexpr int kLanesBaseline = 4;

template <typename Kernel>
struct PerBlock {
  template <int N, typename Args>
  SMD2_INLINE void run(const Args& args) {
    if ((args.block + 1) * N <= args.dim) {
      Kernel::template run<N, true>(args);
    } else {
      Kernel::template run<N, false>(args);
    }
  }
};

// Channels in a block, known to the compiler where it is full.
template <int N, bool Full, typename Args>
SMD2_INLINE int block_channels(const Args& args) {
  return Full ? N : static_cast<int>(args.dim - args.block * N);
}

#if defined(__x86_64__)
template <typename Kernel, typename Args>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void
run_avx512(const Args& args) {
  Kernel::template run<kLanesAvx512>(args);
}
template <typename Kernel, typename Args>
__attribute__((target("avx2,fma"))) void run_avx2(const Args& args) {
  Kernel::template run<kLanesAvx2>(args);
}
#endif

// Number of channels that the version for this processor treats together.
inline int lanes() {
#if defined(__x86_64__)
  static const int count = [] {
    __builtin_cpu_init();
    const char* limit = std::getenv("SMD2_CPU_CAPABILITY");
    const std::string most = limit ? limit : "avx512";
    const bool fma = __builtin_cpu_supports("fma");
    if (most == "avx512" && fma && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      return kLanesAvx512;
    }
    return most != "baseline" && fma && __builtin_cpu_supports("avx2")
               ? kLanesAvx2
               : kLanesBaseline;
  }();
  return count;
#else
  return kLanesBaseline;
#endif
}

template <typename Kernel, typename Args>
void run(const Args& args) {
#if defined(__x86_64__)
  switch (lanes()) {
    case kLanesAvx512:
      return run_avx512<Kernel>(args);
    case kLanesAvx2:
      return run_avx2<Kernel>(args);
    default:
      break;
  }
#endif
  Kernel::template run<kLanesBaseline>(args);
}

}  // namespace smd2
