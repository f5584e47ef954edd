// spatial_mamba::quantize_uint8 on the CPU; op.py documents it.
#include <atomic>

#include "../cpu/tensors.h"

namespace smd2 {
namespace {

constexpr const char* kOp = "quantize_uint8";

// Values that a thread converts at a time: they fit into its first cache.
constexpr int64_t kValuesPerPart = 4096;

template <typename T>
struct QuantizeArgs {
  const T* x;
  uint8_t* out;
  acc_t<T> steps_per_unit;  // 1 / scale
  int64_t zero_point;
  std::atomic<bool>* found_not_finite;
  int64_t part, first, last;
};

template <typename T>
struct Quantize {
  using Acc = acc_t<T>;
  using Int = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;

  template <int N>
  SMD2_INLINE void run(const QuantizeArgs<T>& a) {
    // Adding 1.5 * 2^23 (2^52) rounds to integers, halves to even. The lowest
    // byte of the sum is theirs.
    const Acc magic = sizeof(Acc) == 8 ? 6755399441055744.0 : 12582912.0f;
    const auto zero_point = static_cast<Int>(a.zero_point);
    const auto least = splat<Acc, N>(-zero_point);
    const auto most = splat<Acc, N>(255 - zero_point);
    vec<Int, N> not_finite{};
    const T* x = a.x + a.first;
    uint8_t* out = a.out + a.first;
    for_channels<N>(a.last - a.first, [&](int64_t c, int n) SMD2_LAMBDA {
      const auto v = load_channels<T, N>(x + c, n);
      not_finite |= v - v != 0;  // NaN and infinities minus themselves are NaN
      auto steps = v * a.steps_per_unit;
      steps = at_least<Acc, N>(steps, least);
      steps = at_most<Acc, N>(steps, most);
      const vec<Acc, N> shifted = steps + magic;
      vec<Int, N> bits;
      std::memcpy(&bits, &shifted, sizeof(bits));
      const auto bytes =
          __builtin_convertvector(bits + zero_point, vec<uint8_t, N>);
      std::memcpy(out + c, &bytes, n);
    });
    Int any = 0;
    for (int i = 0; i < N; i++) {
      any |= not_finite[i];
    }
    if (any) {
      *a.found_not_finite = true;
    }
  }
};

Tensor quantize_uint8(const Tensor& x, double scale, int64_t zero_point) {
  const auto in = contiguous_as(x, kernel_type(x, x));
  Tensor out = torch::stable::new_empty(in, in.sizes(), ScalarType::Byte);
  std::atomic<bool> found_not_finite{false};
  SMD2_DISPATCH(in.scalar_type(), kOp, [&] {
    using Acc = acc_t<scalar_t>;
    const QuantizeArgs<scalar_t> args{
        in.const_data_ptr<scalar_t>(),
        out.mutable_data_ptr<uint8_t>(),
        static_cast<Acc>(1 / scale),
        zero_point,
        &found_not_finite,
        0,
        0,
        0};
    run_parts<Quantize<scalar_t>>(args, in.numel(), kValuesPerPart);
  });
  if (found_not_finite) {
    throw std::runtime_error(std::string(kOp) + ": x must be finite");
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(spatial_mamba, CPU, m) {
  m.impl("quantize_uint8", TORCH_BOX(&quantize_uint8));
}

}  // namespace
}  // namespace smd2
