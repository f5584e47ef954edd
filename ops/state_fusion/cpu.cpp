// spatial_mamba::state_fusion on the CPU; op.py documents it.
#include "../cpu/tensors.h"
#include "rows.h"

namespace smd2 {
namespace {

// Pointers to whole contiguous tensors; a kernel does one image and one block.
template <typename T>
struct FusionArgs {
  const T* h;
  const acc_t<T>* taps;  // [25, dim]
  int64_t height, width, dim;
  int64_t image, block;
  acc_t<T>* scratch;

  template <int N>
  int64_t offset() const {
    return image * height * width * dim + block * N;
  }
};

// One row of a tensor [.., width, dim] into `out`, N values a token.
template <typename T, int N>
SMD2_INLINE void gather_row(
    const T* row,
    int64_t width,
    int64_t dim,
    int channels,
    acc_t<T>* out) {
  for (int64_t x = 0; x < width; x++) {
    write<acc_t<T>, N>(
        out + x * N, load_channels<T, N>(row + x * dim, channels));
  }
}

template <typename T>
struct ForwardArgs : FusionArgs<T> {
  acc_t<T>* out;
};

template <typename T>
struct Forward {
  // Keeps 11 padded rows in cache.
  template <int N, bool Full>
  SMD2_INLINE void run(const ForwardArgs<T>& a) {
    using Acc = acc_t<T>;
    constexpr int kRows = 2 * kRadius + 1;
    const int n = block_channels<N, Full>(a);
    const int64_t at = a.template offset<N>(), line = a.width * a.dim;
    const int64_t row_size = (a.width + 2 * kRadius) * N;
    vec<Acc, N> taps[kTaps];
    for (int k = 0; k < kTaps; k++) {
      taps[k] = load_channels<Acc, N>(a.taps + k * a.dim + a.block * N, n);
    }
    for (int64_t r = 0; r < a.height + kRadius; r++) {
      if (r < a.height) {
        Acc* row = a.scratch + r % kRows * row_size + kRadius * N;
        gather_row<T, N>(a.h + at + r * line, a.width, a.dim, n, row);
        replicate_row<Acc, N>(row, a.width);
      }
      const int64_t y = r - kRadius;
      if (y < 0) {
        continue;
      }
      const auto window =
          window_around<Acc, N>(a.scratch, kRows, y, a.height, a.width);
      Acc* out = a.out + at + y * line;
      fuse_row<Acc, N>(
          window, taps, a.width, [&](int64_t x, auto fused) SMD2_LAMBDA {
            store_channels<Acc, N>(out + x * a.dim, fused, n);
          });
    }
  }
};

template <typename T>
struct BackwardArgs : FusionArgs<T> {
  const acc_t<T>* grad_out;
  T* grad_h;
  acc_t<T>* grad_taps;  // [images, 25, dim]
};

template <typename T>
struct Backward {
  // Scratch: the padded map, the gradients with margins, one row of zeros, two
  // rows more.
  template <int N, bool Full>
  SMD2_INLINE void run(const BackwardArgs<T>& a) {
    using Acc = acc_t<T>;
    const int n = block_channels<N, Full>(a);
    const int64_t at = a.template offset<N>(), line = a.width * a.dim;
    const int64_t row_size = (a.width + 2 * kRadius) * N;
    const int64_t grad_size = (a.width + 2 * kMargin) * N;
    Acc* map = a.scratch;
    Acc* grads = map + a.height * row_size;
    Acc* zeros = grads + a.height * grad_size;
    Acc* row = zeros + grad_size;
    Acc* out = row + row_size;
    std::fill(grads, row, Acc(0));
    vec<Acc, N> taps[kTaps], grad_taps[kTaps]{};
    for (int k = 0; k < kTaps; k++) {
      taps[k] = load_channels<Acc, N>(a.taps + k * a.dim + a.block * N, n);
    }
    for (int64_t y = 0; y < a.height; y++) {
      Acc* padded = map + y * row_size + kRadius * N;
      gather_row<T, N>(a.h + at + y * line, a.width, a.dim, n, padded);
      replicate_row<Acc, N>(padded, a.width);
      gather_row<Acc, N>(
          a.grad_out + at + y * line,
          a.width,
          a.dim,
          n,
          grads + y * grad_size + kMargin * N);
    }
    for (int64_t y = 0; y < a.height; y++) {
      const auto window =
          window_around<Acc, N>(map, a.height, y, a.height, a.width);
      fuse_row_grad_taps<Acc, N>(
          window, grads + y * grad_size + kMargin * N, a.width, grad_taps);
      fuse_row_grad_input<Acc, N>(
          grads, zeros, taps, y, a.height, a.width, row, out);
      T* grad_h = a.grad_h + at + y * line;
      for (int64_t x = 0; x < a.width; x++) {
        store_channels<T, N>(grad_h + x * a.dim, read<Acc, N>(out + x * N), n);
      }
    }
    for (int k = 0; k < kTaps; k++) {
      store_channels<Acc, N>(
          a.grad_taps + (a.image * kTaps + k) * a.dim + a.block * N,
          grad_taps[k],
          n);
    }
  }
};

void check(const at::Tensor& h, const at::Tensor& taps) {
  TORCH_CHECK_VALUE(
      h.dim() == 4 && h.size(1) && h.size(2),
      "state_fusion: h must be [B, H, W, D] with H, W >= 1, got ",
      h.sizes());
  check_shape("state_fusion", "taps", taps, {kTaps, h.size(3)});
}

template <typename T>
void fill(const at::Tensor& h, const at::Tensor& taps, FusionArgs<T>* a) {
  a->h = h.const_data_ptr<T>();
  a->taps = taps.const_data_ptr<acc_t<T>>();
  a->height = h.size(1);
  a->width = h.size(2);
  a->dim = h.size(3);
}

at::Tensor state_fusion(const at::Tensor& h, const at::Tensor& taps) {
  check(h, taps);
  const auto states = h.to(kernel_type(h, h)).contiguous();
  const auto weights = small(taps, states);
  at::Tensor out = at::empty(h.sizes(), weights.options());
  SMD2_DISPATCH(states.scalar_type(), "state_fusion", [&] {
    using Acc = acc_t<scalar_t>;
    ForwardArgs<scalar_t> shared;
    fill(states, weights, &shared);
    shared.out = out.data_ptr<Acc>();
    const int64_t scratch_size =
        (2 * kRadius + 1) * (shared.width + 2 * kRadius) * lanes();
    run_blocks<Forward<scalar_t>, Acc>(shared, h.size(0), scratch_size);
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> state_fusion_backward(
    const at::Tensor& grad_output,
    const at::Tensor& h,
    const at::Tensor& taps) {
  check(h, taps);
  check_shape("state_fusion_backward", "grad_output", grad_output, h.sizes());
  const auto states = h.to(kernel_type(h, h)).contiguous();
  const auto weights = small(taps, states);
  const auto grad = small(grad_output, states);
  at::Tensor grad_h = at::empty_like(states);
  at::Tensor grad_taps =
      at::empty({h.size(0), kTaps, h.size(3)}, weights.options());
  SMD2_DISPATCH(states.scalar_type(), "state_fusion_backward", [&] {
    using Acc = acc_t<scalar_t>;
    BackwardArgs<scalar_t> shared;
    fill(states, weights, &shared);
    shared.grad_out = grad.const_data_ptr<Acc>();
    shared.grad_h = grad_h.data_ptr<scalar_t>();
    shared.grad_taps = grad_taps.data_ptr<Acc>();
    const int64_t padded = shared.width + 2 * kRadius;
    const int64_t margins = shared.width + 2 * kMargin;
    const int64_t scratch_size = lanes() * ((shared.height + 2) * padded +
                                            (shared.height + 1) * margins);
    run_blocks<Backward<scalar_t>, Acc>(shared, h.size(0), scratch_size);
  });
  return {grad_h.to(h.scalar_type()), grad_taps.sum(0).to(taps.scalar_type())};
}

TORCH_LIBRARY_IMPL(spatial_mamba, CPU, m) {
  m.impl("state_fusion", &state_fusion);
  m.impl("state_fusion_backward", &state_fusion_backward);
}

}  // namespace
}  // namespace smd2
