// Memory access to several channels of a token by one thread.
#pragma once

#include "device.cuh"

namespace smd2 {
namespace cuda {

// Channels of a thread: as many as give 16 bytes of sums.
template <typename T>
constexpr int kPack = static_cast<int>(16 / sizeof(acc_t<T>));

template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
  T values[count];
};

// `count` channels of each token. They are neighbours, which one instruction
// loads or stores; or, if kPacked is false because their number or an address
// does not allow that, `step` apart, where `step` threads are neighbours.
template <int count, bool kPacked>
struct Channels {
  int first, step, dim;

  // Of thread `number` among those of a token.
  SMD2_DEVICE Channels(int number, int threads, int dim_)
      : first(kPacked ? number * count : number),
        step(kPacked ? 1 : threads),
        dim(dim_) {}

  SMD2_DEVICE int at(int k) const {
    return first + k * step;
  }
  SMD2_DEVICE bool valid(int k) const {
    return at(kPacked ? 0 : k) < dim;
  }

  // The values of one token; 0 if it is not `inside`, and in channels that do
  // not exist.
  template <typename T>
  SMD2_DEVICE void load(const T* token, bool inside, acc_t<T> (&values)[count])
      const {
    if constexpr (kPacked) {
      Pack<T, count> pack{};
      if (inside && valid(0)) {
        pack = *reinterpret_cast<const Pack<T, count>*>(token + first);
      }
#pragma unroll
      for (int k = 0; k < count; k++) {
        values[k] = static_cast<acc_t<T>>(pack.values[k]);
      }
    } else {
#pragma unroll
      for (int k = 0; k < count; k++) {
        values[k] = cuda::load(token + at(k), inside && valid(k));
      }
    }
  }

  template <typename T>
  SMD2_DEVICE void store(T* token, bool inside, const acc_t<T> (&values)[count])
      const {
    if constexpr (kPacked) {
      Pack<T, count> pack;
#pragma unroll
      for (int k = 0; k < count; k++) {
        pack.values[k] = static_cast<T>(values[k]);
      }
      if (inside && valid(0)) {
        *reinterpret_cast<Pack<T, count>*>(token + first) = pack;
      }
    } else {
#pragma unroll
      for (int k = 0; k < count; k++) {
        cuda::store(token + at(k), values[k], inside && valid(k));
      }
    }
  }
};

}  // namespace cuda
}  // namespace smd2
