// One binary for all machines: a kernel is compiled for AVX-512, for AVX2 and
// for the baseline, and the version for the processor is chosen at run time. In
// double there is the baseline alone: it serves comparisons, and three versions
// of it were more than half of the time that compilation takes.
//
// A kernel is a struct with a static, always inlined function
//   template <int N> void run(const Args&)
// that processes N channels together. A kernel for one block of channels,
// args.block, has
//   template <int N, bool Full> void run(const Args&)
// instead, where Full says whether the block has N channels; PerBlock makes it
// a kernel of the first form.
#pragma once

#include <cstdlib>
#include <string>
#include <type_traits>

#include "simd.h"

namespace smd2 {

// Channels of a block in each version: as many floats as a vector register has.
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

// Number of channels in the block: a compile-time constant if it is full.
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

// Number of channels that the version for this processor processes together.
// SMD2_CPU_CAPABILITY=avx2 or =baseline chooses a version below that.
inline int processor_lanes() {
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

// The same for tensors of type T.
template <typename T>
int lanes() {
  return std::is_same_v<T, double> ? kLanesBaseline : processor_lanes();
}

// Args is a template of the tensors' type T, and perhaps of others.
template <
    typename Kernel,
    template <typename...> class Args,
    typename T,
    typename... Others>
void run(const Args<T, Others...>& args) {
#if defined(__x86_64__)
  if constexpr (!std::is_same_v<T, double>) {
    switch (lanes<T>()) {
      case kLanesAvx512:
        return run_avx512<Kernel>(args);
      case kLanesAvx2:
        return run_avx2<Kernel>(args);
      default:
        break;
    }
  }
#endif
  Kernel::template run<kLanesBaseline>(args);
}

}  // namespace smd2
