// Operators' tensor arguments, on every device: how they arrive from the
// dispatcher, how they are checked and converted.
#pragma once

// Not ATen/ATen.h, which declares all of PyTorch's operators and takes longer
// to compile than the kernels.
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/promote_types.h>
#include <ATen/ops/zeros.h>

#include <utility>
#include <vector>

#include "accumulate.h"

namespace smd2 {

// acc_t at run time.
inline at::ScalarType accumulate_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

inline at::Tensor contiguous_as(const at::Tensor& x, at::ScalarType type) {
  return x.to(type).contiguous();
}

struct Argument {
  const char* name;
  const at::Tensor& value;
  at::IntArrayRef shape;
};

// Raises ValueError unless all arguments have the shapes given here, and are on
// the device of `like`.
inline void check_arguments(
    const char* op,
    const at::Tensor& like,
    const std::vector<Argument>& arguments) {
  for (const auto& [name, value, shape] : arguments) {
    TORCH_CHECK_VALUE(
        value.sizes() == shape,
        op,
        ": ",
        name,
        " must be ",
        shape,
        ", got ",
        value.sizes());
    TORCH_CHECK_VALUE(
        value.device() == like.device(),
        op,
        ": ",
        name,
        " must be on ",
        like.device(),
        ", got ",
        value.device());
  }
}

// Adapts `forward(Tensors)` and `backward(grad_output, Tensors)` to what the
// dispatcher calls: functions of one parameter for each of the `count` tensors.
// So the tensors of an operator are listed once, in the aggregate Tensors.
template <size_t>
using TensorParameter = const at::Tensor&;

template <auto kernel, typename Indices>
struct Unpacked;
template <auto kernel, size_t... I>
struct Unpacked<kernel, std::index_sequence<I...>> {
  static auto forward(TensorParameter<I>... tensors) {
    return kernel({tensors...});
  }
  static auto backward(
      const at::Tensor& grad_output,
      TensorParameter<I>... tensors) {
    return kernel(grad_output, {tensors...});
  }
};

template <auto kernel, int count>
constexpr auto forward_kernel =
    &Unpacked<kernel, std::make_index_sequence<count>>::forward;
template <auto kernel, int count>
constexpr auto backward_kernel =
    &Unpacked<kernel, std::make_index_sequence<count>>::backward;

}  // namespace smd2
