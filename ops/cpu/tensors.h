// Checks and layouts that the glue of all operators shares.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <memory>
#include <new>

#include "multiversion.h"

namespace smd2 {

inline at::ScalarType accumulate_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Small tensors (weights, B, C): contiguous, in the accumulation type of
// `like`.
inline at::Tensor small(const at::Tensor& x, const at::Tensor& like) {
  return x.to(accumulate_type(like)).contiguous();
}

// The dtype that kernels are compiled for which holds both tensors' values.
inline at::ScalarType kernel_type(const at::Tensor& x, const at::Tensor& y) {
  const auto type = at::promote_types(x.scalar_type(), y.scalar_type());
  return type == at::kHalf ? at::kFloat : type;
}

inline void check_shape(
    const char* op,
    const char* name,
    const at::Tensor& x,
    at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(
      x.sizes() == shape,
      op,
      ": ",
      name,
      " must be ",
      shape,
      ", got ",
      x.sizes());
}

struct FreeCacheLines {
  template <typename T>
  void operator()(T* p) const {
    ::operator delete[](p, kCacheLine);
  }
  static constexpr std::align_val_t kCacheLine{64};  // bytes
};

// Memory that starts a line of the cache, so that no vector straddles two.
template <typename T>
std::unique_ptr<T[], FreeCacheLines> cache_lines(int64_t count) {
  const auto bytes = count * sizeof(T);
  return std::unique_ptr<T[], FreeCacheLines>(
      static_cast<T*>(::operator new[](bytes, FreeCacheLines::kCacheLine)));
}

// Runs Kernel for every image and block of channels, in parallel. `shared` has
// what all of them have in common; `scratch_size` values belong to a thread.
template <typename Kernel, typename Acc, typename Args>
void run_blocks(const Args& shared, int64_t images, int64_t scratch_size) {
  const int64_t blocks = (shared.dim + lanes() - 1) / lanes();
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

// Runs Kernel for runs of `size` of the `count` rows or tokens, in parallel; in
// `shared` it finds its own as args.first, args.last and args.part. The parts
// are the same for every number of threads.
template <typename Kernel, typename Args>
void run_parts(const Args& shared, int64_t count, int64_t size) {
  at::parallel_for(
      0, (count + size - 1) / size, 1, [&](int64_t begin, int64_t end) {
        Args args = shared;
        for (args.part = begin; args.part < end; args.part++) {
          args.first = args.part * size;
          args.last = std::min(count, args.first + size);
          run<Kernel>(args);
        }
      });
}

// The same values as tokens with dense channels, each token as far from the
// one before: [..., D] itself where it is so, else a copy.
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

// Runs the code with `scalar_t` set to a dtype that kernels are compiled for.
#define SMD2_DISPATCH(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, TYPE, NAME, __VA_ARGS__)
