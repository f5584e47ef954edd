// Scan, fusion and observation of an image and one block of channels, and what
// the operators made of them share.
//
// In the forward pass 11 rows of states stay in cache and h never reaches
// memory.
#pragma once

#include "../cpu/tensors.h"
#include "../selective_scan/rows.h"
#include "../state_fusion/rows.h"

namespace smd2 {

// Pointers to whole contiguous tensors; a kernel does one image and one block.
template <typename T>
struct SsmArgs {
  const T* u;
  Steps<T> steps;
  const acc_t<T>* A;
  const acc_t<T>* B;
  const acc_t<T>* C;
  const acc_t<T>* D;
  const acc_t<T>* bias;
  const acc_t<T>* taps;  // [25, dim]
  int64_t images, height, width, dim;
  int64_t image, block;
  acc_t<T>* scratch;

  int64_t tokens() const {
    return height * width;
  }
};

// What both directions need of their block.
template <typename T, int N, bool Full>
struct SsmBlock {
  ScanBlock<T, N> scan;
  const acc_t<T>* C;
  vec<acc_t<T>, N> D, taps[kTaps];
  int64_t at;  // first value of the block in [images, tokens, dim]

  explicit __attribute__((always_inline)) SsmBlock(const SsmArgs<T>& a) {
    using Acc = acc_t<T>;
    const int64_t c = a.block * N;
    const int n = block_channels<N, Full>(a);
    at = a.image * a.tokens() * a.dim + c;
    scan = {
        a.u + at,
        a.steps.template of_block<N>(a.image * a.tokens(), a.dim, a.block),
        a.B + a.image * a.tokens(),
        a.dim,
        n,
        load_channels<Acc, N>(a.A + c, n),
        load_channels<Acc, N>(a.bias + c, n)};
    C = a.C + a.image * a.tokens();
    D = load_channels<Acc, N>(a.D + c, n);
    for (int k = 0; k < kTaps; k++) {
      taps[k] = load_channels<Acc, N>(a.taps + k * a.dim + c, n);
    }
  }
};

template <typename T>
struct ForwardArgs : SsmArgs<T> {
  T* y;
};

// Row y of the output, from the states around it.
template <typename T, int N, bool Full>
SMD2_INLINE void observe_row(
    const ForwardArgs<T>& a,
    const SsmBlock<T, N, Full>& block,
    const Window<acc_t<T>>& window,
    int64_t y) {
  const int n = block_channels<N, Full>(a);
  fuse_row<acc_t<T>, N>(
      window, block.taps, a.width, [&](int64_t x, auto fused) SMD2_LAMBDA {
        const int64_t t = y * a.width + x;
        const auto u = load_channels<T, N>(block.scan.u + t * a.dim, n);
        store_channels<T, N>(
            a.y + block.at + t * a.dim, fused * block.C[t] + block.D * u, n);
      });
}

template <typename T>
struct Forward {
  template <int N, bool Full>
  SMD2_INLINE void run(const ForwardArgs<T>& a) {
    using Acc = acc_t<T>;
    constexpr int kRows = 2 * kRadius + 1;
    const SsmBlock<T, N, Full> block(a);
    const int64_t row_size = (a.width + 2 * kRadius) * N;
    vec<Acc, N> h{};
    for (int64_t r = 0; r < a.height + kRadius; r++) {
      if (r < a.height) {
        Acc* row = a.scratch + r % kRows * row_size + kRadius * N;
        scan_row<T, N>(block.scan, r * a.width, a.width, &h, row);
        replicate_row<Acc, N>(row, a.width);
      }
      const int64_t y = r - kRadius;
      if (y < 0) {
        continue;
      }
      const auto window =
          window_around<Acc, N>(a.scratch, kRows, y, a.height, a.width);
      observe_row<T, N, Full>(a, block, window, y);
    }
  }
};

// The same in three stages, where there are fewer blocks than threads: only the
// second one, a single operation for each token, goes from token to token; rows
// of the others are shared out. Both ways give the same bits.
template <typename T>
struct StagedArgs : ForwardArgs<T> {
  // For each block of each image: rows with room for kRadius tokens around.
  acc_t<T>* decays;
  acc_t<T>* states;
  int64_t blocks, row;

  template <int N>
  __attribute__((always_inline)) acc_t<T>* row_of(acc_t<T>* maps, int64_t y)
      const {
    const int64_t rows = (this->image * blocks + this->block) * this->height;
    const int64_t row_size = (this->width + 2 * kRadius) * N;
    return maps + (rows + y) * row_size + kRadius * N;
  }
};

template <typename T>
struct Prepare {
  template <int N, bool Full>
  SMD2_INLINE void run(const StagedArgs<T>& a) {
    const SsmBlock<T, N, Full> block(a);
    prepare_row<T, N>(
        block.scan,
        a.row * a.width,
        a.width,
        a.template row_of<N>(a.decays, a.row),
        a.template row_of<N>(a.states, a.row));
  }
};

template <typename T>
struct Recur {
  template <int N, bool Full>
  SMD2_INLINE void run(const StagedArgs<T>& a) {
    const SsmBlock<T, N, Full> block(a);
    vec<acc_t<T>, N> h{};
    for (int64_t y = 0; y < a.height; y++) {
      acc_t<T>* row = a.template row_of<N>(a.states, y);
      recur_row<T, N>(
          block.scan,
          y * a.width,
          a.width,
          &h,
          a.template row_of<N>(a.decays, y),
          row);
      replicate_row<acc_t<T>, N>(row, a.width);
    }
  }
};

template <typename T>
struct Observe {
  template <int N, bool Full>
  SMD2_INLINE void run(const StagedArgs<T>& a) {
    const SsmBlock<T, N, Full> block(a);
    const acc_t<T>* map = a.template row_of<N>(a.states, 0) - kRadius * N;
    const auto window =
        window_around<acc_t<T>, N>(map, a.height, a.row, a.height, a.width);
    observe_row<T, N, Full>(a, block, window, a.row);
  }
};

template <typename T>
void run_staged(const ForwardArgs<T>& shared, int64_t blocks) {
  StagedArgs<T> all{shared};
  all.blocks = blocks;
  const int64_t maps = shared.images * blocks;
  const int64_t size = maps * shared.height * (shared.width + 2 * kRadius);
  const auto decays = cache_lines<acc_t<T>>(size * lanes());
  const auto states = cache_lines<acc_t<T>>(size * lanes());
  all.decays = decays.get();
  all.states = states.get();
  const auto share_out = [&](int64_t count, auto kernel) {
    at::parallel_for(0, maps * count, 1, [&](int64_t begin, int64_t end) {
      StagedArgs<T> args = all;
      for (int64_t i = begin; i < end; i++) {
        args.image = i / count / blocks;
        args.block = i / count % blocks;
        args.row = i % count;
        run<PerBlock<decltype(kernel)>>(args);
      }
    });
  };
  share_out(shared.height, Prepare<T>{});
  share_out(1, Recur<T>{});
  share_out(shared.height, Observe<T>{});
}

template <typename T>
void run_forward(const ForwardArgs<T>& shared) {
  const int64_t blocks = (shared.dim + lanes() - 1) / lanes();
  if (shared.images * blocks < at::get_num_threads() && shared.height > 1) {
    run_staged(shared, blocks);
    return;
  }
  const int64_t scratch_size =
      (2 * kRadius + 1) * (shared.width + 2 * kRadius) * lanes();
  run_blocks<Forward<T>, acc_t<T>>(shared, shared.images, scratch_size);
}

// The inputs but for the step sizes, as the kernels want them; their dtype is
// `type`.
struct SsmInputs {
  at::Tensor u, A, B, C, D, bias, taps;

  SsmInputs(
      const char* op,
      at::ScalarType type,
      const at::Tensor& u_,
      const at::Tensor& A_,
      const at::Tensor& B_,
      const at::Tensor& C_,
      const at::Tensor& D_,
      const at::Tensor& bias_,
      const at::Tensor& taps_) {
    TORCH_CHECK_VALUE(
        u_.dim() == 4 && u_.size(1) && u_.size(2),
        op,
        ": u must be [B, H, W, D] with H, W >= 1, got ",
        u_.sizes());
    const auto dim = u_.size(3);
    check_shape(op, "B", B_, u_.sizes().slice(0, 3));
    check_shape(op, "C", C_, u_.sizes().slice(0, 3));
    check_shape(op, "A", A_, {dim});
    check_shape(op, "D", D_, {dim});
    check_shape(op, "delta_bias", bias_, {dim});
    check_shape(op, "taps", taps_, {kTaps, dim});
    u = u_.to(type).contiguous();
    A = small(A_, u);
    B = small(B_, u);
    C = small(C_, u);
    D = small(D_, u);
    bias = small(bias_, u);
    taps = small(taps_, u);
  }

  template <typename T>
  void fill(SsmArgs<T>* a) const {
    using Acc = acc_t<T>;
    a->u = u.const_data_ptr<T>();
    a->A = A.const_data_ptr<Acc>();
    a->B = B.const_data_ptr<Acc>();
    a->C = C.const_data_ptr<Acc>();
    a->D = D.const_data_ptr<Acc>();
    a->bias = bias.const_data_ptr<Acc>();
    a->taps = taps.const_data_ptr<Acc>();
    a->images = u.size(0);
    a->height = u.size(1);
    a->width = u.size(2);
    a->dim = u.size(3);
  }
};

}  // namespace smd2
