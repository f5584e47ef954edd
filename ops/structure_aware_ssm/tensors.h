// The tensors of structure_aware_ssm.
#pragma once

#include "../arguments.h"
#include "../selective_scan/tensors.h"
#include "../state_fusion/taps.h"

namespace smd2 {

struct SsmTensors {
  Tensor u, delta, A, B, C, D, delta_bias, taps;

  // Raises ValueError unless they fit together. An operator that computes the
  // step sizes itself has no delta.
  void check(const char* op) const {
    SMD2_CHECK_VALUE(
        u.dim() == 4 && u.size(1) && u.size(2) && u.size(3),
        op,
        ": u must be [B, H, W, D] with H, W, D >= 1, got ",
        text(u.sizes()));
    if (delta.defined()) {
      check_arguments(op, {{"delta", delta, u.sizes()}});
    }
    const auto tokens = u.sizes().slice(0, 3);
    const auto dim = u.size(3);
    check_arguments(
        op,
        {{"A", A, {dim}},
         {"B", B, tokens},
         {"C", C, tokens},
         {"D", D, {dim}},
         {"delta_bias", delta_bias, {dim}},
         {"taps", taps, {kTaps, dim}}});
  }

  // In the dtype and layout that kernels take: u and delta in `type`, the small
  // tensors in its accumulation type, all contiguous.
  SsmTensors as(ScalarType type) const {
    const auto wide = accumulate_type(type);
    return {
        contiguous_as(u, type),
        delta.defined() ? contiguous_as(delta, type) : delta,
        contiguous_as(A, wide),
        contiguous_as(B, wide),
        contiguous_as(C, wide),
        contiguous_as(D, wide),
        contiguous_as(delta_bias, wide),
        contiguous_as(taps, wide)};
  }
};

// Gradients of all of them.
using SsmGradientTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace smd2
