// The tensors of selective_scan.
#pragma once

#include "../arguments.h"

namespace smd2 {

struct ScanTensors {
  Tensor u, delta, A, B, delta_bias;

  // Raises ValueError unless they fit together.
  void check(const char* op) const {
    SMD2_CHECK_VALUE(
        u.dim() == 3 && u.size(1) && u.size(2),
        op,
        ": u must be [B, L, D] with L, D >= 1, got ",
        text(u.sizes()));
    const auto images = u.size(0), length = u.size(1), dim = u.size(2);
    check_arguments(
        op,
        {{"delta", delta, u.sizes()},
         {"A", A, {dim}},
         {"B", B, {images, length}},
         {"delta_bias", delta_bias, {dim}}});
  }

  // In the dtype and layout that kernels take: u and delta in `type`, the small
  // tensors in its accumulation type, all contiguous.
  ScanTensors as(ScalarType type) const {
    const auto wide = accumulate_type(type);
    return {
        contiguous_as(u, type),
        contiguous_as(delta, type),
        contiguous_as(A, wide),
        contiguous_as(B, wide),
        contiguous_as(delta_bias, wide)};
  }
};

// Gradients of all of them.
using ScanGradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Sets the pointers that all kernels with a scan in them have, except delta.
template <typename T, typename Tensors, typename Args>
void fill_scan(const Tensors& in, Args* a) {
  using Acc = acc_t<T>;
  a->u = in.u.template const_data_ptr<T>();
  a->A = in.A.template const_data_ptr<Acc>();
  a->B = in.B.template const_data_ptr<Acc>();
  a->bias = in.delta_bias.template const_data_ptr<Acc>();
}

}  // namespace smd2
