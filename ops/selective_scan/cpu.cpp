// spatial_mamba::selective_scan on the CPU; op.py documents it.
#include "../cpu/tensors.h"
#include "rows.h"
#include "tensors.h"

namespace smd2 {
namespace {

constexpr const char* kOp = "selective_scan";

// Tokens of a run: their states, or in the backward pass their gradients, are
// in scratch memory together. Few enough for the first-level cache (16 KiB with
// AVX-512), many enough that the start of a run takes no noticeable time. The
// gradients of A and of the bias are summed run by run, so their last bits
// depend on the value.
constexpr int64_t kRun = 256;

// Pointers to contiguous tensors; a kernel processes one block of one image.
template <typename T>
struct ScanArgs {
  const T* u;
  const T* delta;
  const acc_t<T>* A;
  const acc_t<T>* B;
  const acc_t<T>* bias;
  int64_t images, length, dim;
  int64_t image, block;
  acc_t<T>* scratch;
};

template <typename T, int N, bool Full>
SMD2_INLINE ScanBlock<T, N> scan_block(const ScanArgs<T>& a) {
  const int64_t c = a.block * N, at = a.image * a.length * a.dim + c;
  const int n = block_channels<N, Full>(a);
  return {
      a.u + at,
      {a.delta + at, nullptr, nullptr, 0},
      a.B + a.image * a.length,
      a.dim,
      n,
      load_channels<acc_t<T>, N>(a.A + c, n),
      load_channels<acc_t<T>, N>(a.bias + c, n)};
}

template <typename T>
struct ForwardArgs : ScanArgs<T> {
  acc_t<T>* h;
};

template <typename T>
struct Forward {
  template <int N, bool Full>
  SMD2_INLINE void run(const ForwardArgs<T>& a) {
    using Acc = acc_t<T>;
    const auto block = scan_block<T, N, Full>(a);
    Acc* out = a.h + a.image * a.length * a.dim + a.block * N;
    vec<Acc, N> h{};
    for (int64_t first = 0; first < a.length; first += kRun) {
      const int64_t count = std::min(kRun, a.length - first);
      scan_row<T, N>(block, first, count, &h, a.scratch);
      for (int64_t i = 0; i < count; i++) {
        const auto state = read<Acc, N>(a.scratch + i * N);
        store_channels<Acc, N>(
            out + (first + i) * a.dim, state, block.channels);
      }
    }
  }
};

template <typename T>
struct BackwardArgs : ScanArgs<T> {
  const acc_t<T>* grad_h;
  T* grad_u;
  T* grad_delta;
  acc_t<T>* grad_A;     // [images, dim]
  acc_t<T>* grad_B;     // [blocks, images, length]
  acc_t<T>* grad_bias;  // [images, dim]
};

template <typename T>
struct Backward {
  template <int N, bool Full>
  SMD2_INLINE void run(const BackwardArgs<T>& a) {
    using Acc = acc_t<T>;
    const auto block = scan_block<T, N, Full>(a);
    const int64_t c = a.block * N, at = a.image * a.length * a.dim + c;
    Acc* states = a.scratch;
    Acc* grads = states + a.length * N;
    vec<Acc, N> h{}, carry{};
    scan_row<T, N>(block, 0, a.length, &h, states);
    ScanGradients<T, N> out{};
    out.u = a.grad_u + at;
    out.delta = a.grad_delta + at;
    out.B = a.grad_B + (a.block * a.images + a.image) * a.length;
    const int64_t last = (a.length - 1) / kRun * kRun;
    for (int64_t first = last; first >= 0; first -= kRun) {
      const int64_t count = std::min(kRun, a.length - first);
      for (int64_t i = 0; i < count; i++) {
        const Acc* grad = a.grad_h + at + (first + i) * a.dim;
        write<Acc, N>(
            grads + i * N, load_channels<Acc, N>(grad, block.channels));
      }
      const auto before =
          first ? read<Acc, N>(states + (first - 1) * N) : vec<Acc, N>{};
      const RowAdjoint<T, N> row{
          states + first * N, before, grads, nullptr, {}};
      scan_row_backward<T, N>(block, first, count, row, &carry, &out);
    }
    const int64_t channel = a.image * a.dim + c;
    store_channels<Acc, N>(a.grad_A + channel, out.A, block.channels);
    store_channels<Acc, N>(a.grad_bias + channel, out.bias, block.channels);
  }
};

template <typename T>
void fill(const ScanTensors& in, ScanArgs<T>* a) {
  fill_scan<T>(in, a);
  a->delta = in.delta.const_data_ptr<T>();
  a->images = in.u.size(0);
  a->length = in.u.size(1);
  a->dim = in.u.size(2);
}

Tensor selective_scan(const ScanTensors& inputs) {
  inputs.check(kOp);
  const auto in = inputs.as(kernel_type(inputs.u, inputs.delta));
  Tensor h = empty(in.u.sizes(), in.A);
  SMD2_DISPATCH(in.u.scalar_type(), kOp, [&] {
    ForwardArgs<scalar_t> shared{};
    fill(in, &shared);
    shared.h = h.mutable_data_ptr<acc_t<scalar_t>>();
    run_blocks<Forward<scalar_t>, acc_t<scalar_t>>(
        shared, shared.images, kRun * lanes<scalar_t>());
  });
  return as_type(h, accumulate_type(inputs.u.scalar_type()));
}

ScanGradientTensors selective_scan_backward(
    const Tensor& grad_output,
    const ScanTensors& inputs) {
  constexpr const char* op = "selective_scan_backward";
  inputs.check(op);
  check_arguments(op, {{"grad_output", grad_output, inputs.u.sizes()}});
  const auto in = inputs.as(kernel_type(inputs.u, inputs.delta));
  const auto grad = small(grad_output, in.u);
  const auto images = in.u.size(0), length = in.u.size(1), dim = in.u.size(2);
  Tensor grad_u = empty_like(in.u), grad_delta = empty_like(in.u);
  Tensor grad_A = empty({images, dim}, in.A);
  Tensor grad_bias = empty_like(grad_A);
  Tensor grad_B = empty(
      {channel_blocks(dim, lanes_of(in.A.scalar_type())), images, length},
      in.A);
  SMD2_DISPATCH(in.u.scalar_type(), op, [&] {
    using Acc = acc_t<scalar_t>;
    BackwardArgs<scalar_t> shared{};
    fill(in, &shared);
    shared.grad_h = grad.const_data_ptr<Acc>();
    shared.grad_u = grad_u.mutable_data_ptr<scalar_t>();
    shared.grad_delta = grad_delta.mutable_data_ptr<scalar_t>();
    shared.grad_A = grad_A.mutable_data_ptr<Acc>();
    shared.grad_B = grad_B.mutable_data_ptr<Acc>();
    shared.grad_bias = grad_bias.mutable_data_ptr<Acc>();
    run_blocks<Backward<scalar_t>, Acc>(
        shared, images, (length + kRun) * lanes<Acc>());
  });
  return {
      as_type(grad_u, inputs.u.scalar_type()),
      as_type(grad_delta, inputs.delta.scalar_type()),
      sum_first(grad_A, inputs.A.scalar_type()),
      sum_first(grad_B, inputs.B.scalar_type()),
      sum_first(grad_bias, inputs.delta_bias.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(spatial_mamba, CPU, m) {
  m.impl("selective_scan", TORCH_BOX((forward_kernel<selective_scan, 5>)));
  m.impl(
      "selective_scan_backward",
      TORCH_BOX((backward_kernel<selective_scan_backward, 5>)));
}

}  // namespace
}  // namespace smd2
