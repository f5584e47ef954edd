// Operators' tensor arguments: how they arrive from the dispatcher, how they
// are checked and converted.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "accumulate.h"
#include "stable.h"

// Raises ValueError, with the other arguments as its text, unless `condition`.
#define SMD2_CHECK_VALUE(condition, ...) \
  do {                                   \
    if (!(condition)) {                  \
      raise_value_error(__VA_ARGS__);    \
    }                                    \
  } while (false)

namespace smd2 {

// "[2, 3]"
inline std::string text(Shape shape) {
  std::ostringstream out;
  for (size_t i = 0; i < shape.size(); i++) {
    out << (i ? ", " : "[") << shape[i];
  }
  out << (shape.empty() ? "[]" : "]");
  return out.str();
}

template <typename... Parts>
[[noreturn]] void raise_value_error(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  throw std::invalid_argument(out.str());
}

// acc_t at run time.
inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor as_type(const Tensor& x, ScalarType type) {
  return x.scalar_type() == type ? x : torch::stable::to(x, type);
}

inline Tensor contiguous_as(const Tensor& x, ScalarType type) {
  const auto y = as_type(x, type);
  return y.is_contiguous() ? y : torch::stable::contiguous(y);
}

// In the dtype and on the device of `like`.
inline Tensor empty(Shape shape, const Tensor& like) {
  return torch::stable::new_empty(like, shape);
}
inline Tensor zeros(Shape shape, const Tensor& like) {
  return torch::stable::new_zeros(like, shape);
}

// Sum over the first axis, as `type`.
inline Tensor sum_first(const Tensor& x, ScalarType type) {
  constexpr int64_t kFirst[] = {0};
  return as_type(torch::stable::sum(x, Shape(kFirst, 1)), type);
}

// A copy of one row, as `type`.
inline Tensor copy_row(const Tensor& x, int64_t row, ScalarType type) {
  return as_type(torch::stable::clone(torch::stable::select(x, 0, row)), type);
}

struct Argument {
  const char* name;
  const Tensor& value;
  Shape shape;
};

// Raises ValueError unless all arguments have the shapes given here. All are on
// the CPU, because the dispatcher would not lead here otherwise.
inline void check_arguments(
    const char* op,
    const std::vector<Argument>& arguments) {
  for (const auto& [name, value, shape] : arguments) {
    SMD2_CHECK_VALUE(
        value.sizes() == shape,
        op,
        ": ",
        name,
        " must be ",
        text(shape),
        ", got ",
        text(value.sizes()));
  }
}

// Adapts `forward(Tensors)` and `backward(grad_output, Tensors)` to what the
// dispatcher calls: functions of one parameter for each of the `count` tensors.
// So the tensors of an operator are listed once, in the aggregate Tensors.
template <size_t>
using TensorParameter = const Tensor&;

template <auto kernel, typename Indices>
struct Unpacked;
template <auto kernel, size_t... I>
struct Unpacked<kernel, std::index_sequence<I...>> {
  static auto forward(TensorParameter<I>... tensors) {
    return kernel({tensors...});
  }
  static auto backward(
      const Tensor& grad_output,
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
