// LibTorch's stable ABI, and nothing else of PyTorch: one library works with
// every PyTorch from TORCH_TARGET_VERSION on, which setup.py sets.
#pragma once

#if !defined(TORCH_TARGET_VERSION)
#error "TORCH_TARGET_VERSION must be set, see setup.py"
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch.h>

namespace smd2 {

using torch::headeronly::ScalarType;
using torch::stable::empty_like;
using torch::stable::parallel_for;
using torch::stable::Tensor;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

}  // namespace smd2
