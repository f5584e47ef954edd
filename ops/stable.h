// LibTorch's stable ABI, and nothing else of PyTorch, so that one library works
// with every PyTorch from this version on. It is the first with parallel_for;
// setup.py and _extension.py read it here.
#pragma once

#define TORCH_TARGET_VERSION ((2ULL << 56) | (10ULL << 48))

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
