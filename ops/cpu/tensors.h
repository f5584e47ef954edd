// What the CPU code of all operators shares: conversion of tensors, and running
// a kernel in parallel.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "../arguments.h"
#include "multiversion.h"

namespace smd2 {

// Contiguous, in the accumulation type of `like`: for small tensors, such as
// weights, B and C.
inline Tensor small(const Tensor& x, const Tensor& like) {
  return contiguous_as(x, accumulate_type(like.scalar_type()));
}

// A dtype that kernels are compiled for and that holds the values of two
// floating-point tensors.
inline ScalarType kernel_type(const Tensor& x, const Tensor& y) {
  const auto type = x.scalar_type(), other = y.scalar_type();
  if (type == other && type != ScalarType::Half) {
    return type;
  }
  return type == ScalarType::Double || other == ScalarType::Double
             ? ScalarType::Double
             : ScalarType::Float;
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
inline int lanes_of(ScalarType type) {
  return type == ScalarType::Double ? lanes<double>() : lanes<float>();
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
  parallel_for(0, images * blocks, 1, [&](int64_t begin, int64_t end) {
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
  parallel_for(0, num_parts(count, size), 1, [&](int64_t begin, int64_t end) {
    Args args = shared;
    for (args.part = begin; args.part < end; args.part++) {
      args.first = args.part * size;
      args.last = std::min(count, args.first + size);
      run<Kernel>(args);
    }
  });
}

// Whether x, [..., D], has dense channels and evenly spaced tokens: the address
// of a token is its number times token_stride(x).
inline bool has_even_tokens(const Tensor& x) {
  bool even = x.stride(-1) == 1;
  for (int64_t i = x.dim() - 3; i >= 0 && even; i--) {
    even = x.stride(i) == x.stride(i + 1) * x.size(i + 1);
  }
  return even;
}

// x or a copy with even tokens.
inline Tensor even_tokens(const Tensor& x) {
  return has_even_tokens(x) ? x : torch::stable::contiguous(x);
}

inline int64_t token_stride(const Tensor& x) {
  return x.is_contiguous() ? x.size(-1) : x.stride(-2);
}

// Memory for a map that x is to become: x itself if it has this type and even
// tokens that do not overlap, else new memory; copy_back copies it to x.
inline Tensor memory_for(const Tensor& x, ScalarType type) {
  const bool direct = x.scalar_type() == type && has_even_tokens(x) &&
                      token_stride(x) >= x.size(-1);
  return direct ? x : torch::stable::new_empty(x, x.sizes(), type);
}
inline void copy_back(const Tensor& x, const Tensor& memory) {
  if (memory.const_data_ptr() != x.const_data_ptr()) {
    Tensor out = x;
    torch::stable::copy_(out, memory);
  }
}

// Raises ValueError unless `written` has the shape and the dtype of x.
inline void check_written(
    const char* op,
    const char* name,
    const Tensor& written,
    const Tensor& x) {
  check_arguments(op, {{name, written, x.sizes()}});
  SMD2_CHECK_VALUE(
      written.scalar_type() == x.scalar_type(),
      op,
      ": ",
      name,
      " must be ",
      x.scalar_type(),
      ", got ",
      written.scalar_type());
}

}  // namespace smd2

// Runs the code with `scalar_t` set to the C++ type of TYPE, one of the dtypes
// that CPU kernels are compiled for; SMD2_DISPATCH_WIDE is for accumulation
// types alone.
#define SMD2_DISPATCH(TYPE, NAME, ...)                      \
  THO_DISPATCH_SWITCH(                                      \
      TYPE,                                                 \
      NAME,                                                 \
      THO_DISPATCH_CASE(ScalarType::BFloat16, __VA_ARGS__)  \
          THO_DISPATCH_CASE(ScalarType::Float, __VA_ARGS__) \
              THO_DISPATCH_CASE(ScalarType::Double, __VA_ARGS__))
#define SMD2_DISPATCH_WIDE(TYPE, NAME, ...)             \
  THO_DISPATCH_SWITCH(                                  \
      TYPE,                                             \
      NAME,                                             \
      THO_DISPATCH_CASE(ScalarType::Float, __VA_ARGS__) \
          THO_DISPATCH_CASE(ScalarType::Double, __VA_ARGS__))
