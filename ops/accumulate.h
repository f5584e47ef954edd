// The precision of sums and states, on every device. Torch-free.
#pragma once

namespace smd2 {

// The type of sums and states: double for double, else float.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulate<T>::type;

}  // namespace smd2
