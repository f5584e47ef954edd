// What the CPU code of all operators shares: conversion of tensors, and running
// a kernel in parallel.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <memory>
#include <new>

#include "../arguments.h"
#include "multiversion.h"

namespace smd2 {

// Contiguous, in the accumulation type of `like`: for small tensors, such as
// weights, B and C.
inline at::Tensor small(const at::Tensor& x, const at::Tensor& like) {
  return contiguous_as(x, accumulate_type(like.scalar_type()));
}

// A dtype that kernels are compiled for and that holds both tensors' values.
inline at::ScalarType kernel_type(const at::Tensor& x, const at::Tensor& y) {
  const auto type = at::promote_types(x.scalar_type(), y.scalar_type());
  return type == at::kHalf ? at::kFloat : type;
}

struct FreeCacheLines {
  template <typename T>
  void operator()(T* p) const {
    ::operator delete[](p, kCacheLine);
  }
  static constexpr std::align_val_t kCacheLine{64};  // bytes
};

// Uninitialized memory that starts at a cache line, so that no vector straddles
// two lines.
template <typename T>
std::unique_ptr<T[], FreeCacheLines> cache_lines(int64_t count) {
  const auto bytes = count * sizeof(T);
  return std::unique_ptr<T[], FreeCacheLines>(
      static_cast<T*>(::operator new[](bytes, FreeCacheLines::kCacheLine)));
}

// lanes() of kernels whose sums and states have this type.
inline int lanes_of(at::ScalarType type) {
  return type == at::kDouble ? lanes<double>() : lanes<float>();
}

// Number of blocks of `lanes` channels; the last one may have fewer.
inline int64_t channel_blocks(int64_t dim, int lanes) {
  return (dim + lanes - 1) / lanes;
}

// Runs Kernel for every image and block of channels, in parallel. Each call
// gets a copy of `shared` with args.image, args.block and args.scratch set:
// that is `scratch_size` values, zero at first, for every thread.
template <typename Kernel, typename Acc, typename Args>
void run_blocks(const Args& shared, int64_t images, int64_t scratch_size) {
  const int64_t blocks = channel_blocks(shared.dim, lanes<Acc>());
  at::parallel_for(0, images * blocks, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = cache_lines<Acc>(scratch_size);
    std::fill_n(scratch.get(), scratch_size, Acc(0));
    Args args = shared;
    args.scratch = scratch.get();
    for (int64_t i = begin; i < end; i++) {
      args.image = i / blocks;
      args.block = i % blocks;
      run<PerBlock<Kernel>>(args);
    }
  });
}

// Number of parts of `size` rows or tokens; the last one may have fewer.
inline int64_t num_parts(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

// Runs Kernel for every part of `size` of the `count` rows or tokens, in
// parallel. Each call gets a copy of `shared` with args.part set, and
// args.first and args.last, the part's first row or token and the one after its
// last. The parts do not depend on the number of threads, so sums over a part
// do not either.
template <typename Kernel, typename Args>
void run_parts(const Args& shared, int64_t count, int64_t size) {
  at::parallel_for(
      0, num_parts(count, size), 1, [&](int64_t begin, int64_t end) {
        Args args = shared;
        for (args.part = begin; args.part < end; args.part++) {
          args.first = args.part * size;
          args.last = std::min(count, args.first + size);
          run<Kernel>(args);
        }
      });
}

// x, [..., D], or a copy, with dense channels and evenly spaced tokens: the
// address of a token is its number times token_stride(x).
inline at::Tensor even_tokens(const at::Tensor& x) {
  bool even = x.stride(-1) == 1;
  for (int64_t i = x.dim() - 3; i >= 0 && even; i--) {
    even = x.stride(i) == x.stride(i + 1) * x.size(i + 1);
  }
  return even ? x : x.contiguous();
}

inline int64_t token_stride(const at::Tensor& x) {
  return x.is_contiguous() ? x.size(-1) : x.stride(-2);
}

}  // namespace smd2

// Runs the code with `scalar_t` set to the C++ type of TYPE, one of the dtypes
// that CPU kernels are compiled for.
#define SMD2_DISPATCH(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, TYPE, NAME, __VA_ARGS__)
