// spatial_mamba::structure_aware_ssm on the CPU; op.py documents it.
//
// Scan, fusion and observation in one pass over each block of channels. In the
// forward pass 11 rows of states stay in cache and h never reaches memory; the
// backward pass computes h again, for one block at a time.
#include "../common/tensors.h"
#include "../selective_scan/rows.h"
#include "../state_fusion/rows.h"

namespace smd2 {
namespace {

// Pointers to whole contiguous tensors; a kernel does one image and one block.
template <typename T>
struct SsmArgs {
  const T* u;
  const T* delta;
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
        a.delta + at,
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
      Window<Acc> window;
      for (int dy = -kRadius; dy <= kRadius; dy++) {
        const int64_t source =
            std::min(std::max<int64_t>(y + dy, 0), a.height - 1);
        window.rows[dy + kRadius] =
            a.scratch + source % kRows * row_size + kRadius * N;
      }
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
    const auto window = map_window<acc_t<T>, N>(map, a.row, a.height, a.width);
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
  const auto each = [&](int64_t count, auto kernel) {
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
  each(shared.height, Prepare<T>{});
  each(1, Recur<T>{});
  each(shared.height, Observe<T>{});
}

template <typename T>
struct BackwardArgs : SsmArgs<T> {
  const T* grad_y;
  T* grad_u;
  T* grad_delta;
  acc_t<T>* grad_A;     // [images, dim]
  acc_t<T>* grad_B;     // [blocks, images, tokens]
  acc_t<T>* grad_C;     // [blocks, images, tokens]
  acc_t<T>* grad_D;     // [images, dim]
  acc_t<T>* grad_bias;  // [images, dim]
  acc_t<T>* grad_taps;  // [images, 25, dim]
};

template <typename T>
struct Backward {
  // Scratch: the padded states, the gradients of the fused ones with margins,
  // one row of zeros, two rows more.
  template <int N, bool Full>
  SMD2_INLINE void run(const BackwardArgs<T>& a) {
    using Acc = acc_t<T>;
    const SsmBlock<T, N, Full> block(a);
    const int n = block_channels<N, Full>(a);
    const int64_t row_size = (a.width + 2 * kRadius) * N;
    const int64_t grad_size = (a.width + 2 * kMargin) * N;
    const int64_t partial = (a.block * a.images + a.image) * a.tokens();
    const int64_t channel = a.image * a.dim + a.block * N;
    const T* grad_y = a.grad_y + block.at;
    Acc* states = a.scratch;
    Acc* grads = states + a.height * row_size;
    Acc* zeros = grads + a.height * grad_size;
    Acc* row = zeros + grad_size;
    Acc* grad_h = row + row_size;
    std::fill(grads, row, Acc(0));

    vec<Acc, N> h{};
    for (int64_t y = 0; y < a.height; y++) {
      Acc* out = states + y * row_size + kRadius * N;
      scan_row<T, N>(block.scan, y * a.width, a.width, &h, out);
      replicate_row<Acc, N>(out, a.width);
    }

    vec<Acc, N> grad_D{}, grad_taps[kTaps]{};
    for (int64_t y = 0; y < a.height; y++) {
      const auto window = map_window<Acc, N>(states, y, a.height, a.width);
      Acc* grad_fused = grads + y * grad_size + kMargin * N;
      vec<Acc, N> row_grad_D{};
      const auto one = [&](int64_t x, auto fused) SMD2_LAMBDA {
        const int64_t t = y * a.width + x;
        const auto dy = load_channels<T, N>(grad_y + t * a.dim, n);
        const auto u = load_channels<T, N>(block.scan.u + t * a.dim, n);
        a.grad_C[partial + t] = sum<Acc, N>(dy * fused);
        row_grad_D += dy * u;
        write<Acc, N>(grad_fused + x * N, dy * block.C[t]);
      };
      fuse_row<Acc, N>(window, block.taps, a.width, one);
      grad_D += row_grad_D;
      fuse_row_grad_taps<Acc, N>(window, grad_fused, a.width, grad_taps);
    }

    ScanGradients<T, N> out{};
    out.u = a.grad_u + block.at;
    out.delta = a.grad_delta + block.at;
    out.B = a.grad_B + partial;
    vec<Acc, N> carry{};
    for (int64_t y = a.height - 1; y >= 0; y--) {
      fuse_row_grad_input<Acc, N>(
          grads, zeros, block.taps, y, a.height, a.width, row, grad_h);
      const Acc* here = states + y * row_size + kRadius * N;
      const Acc* above = here - row_size + (a.width - 1) * N;
      const auto before = y ? read<Acc, N>(above) : vec<Acc, N>{};
      scan_row_backward<T, N>(
          block.scan,
          y * a.width,
          a.width,
          here,
          before,
          grad_h,
          grad_y,
          block.D,
          &carry,
          &out);
    }
    store_channels<Acc, N>(a.grad_A + channel, out.A, n);
    store_channels<Acc, N>(a.grad_bias + channel, out.bias, n);
    store_channels<Acc, N>(a.grad_D + channel, grad_D, n);
    for (int k = 0; k < kTaps; k++) {
      store_channels<Acc, N>(
          a.grad_taps + (a.image * kTaps + k) * a.dim + a.block * N,
          grad_taps[k],
          n);
    }
  }
};

// The inputs as the kernels want them.
struct Inputs {
  at::Tensor u, delta, A, B, C, D, bias, taps;

  Inputs(
      const at::Tensor& u_,
      const at::Tensor& delta_,
      const at::Tensor& A_,
      const at::Tensor& B_,
      const at::Tensor& C_,
      const at::Tensor& D_,
      const at::Tensor& bias_,
      const at::Tensor& taps_) {
    const char* op = "structure_aware_ssm";
    TORCH_CHECK_VALUE(
        u_.dim() == 4 && u_.size(1) && u_.size(2),
        op,
        ": u must be [B, H, W, D] with H, W >= 1, got ",
        u_.sizes());
    const auto dim = u_.size(3);
    check_shape(op, "delta", delta_, u_.sizes());
    check_shape(op, "B", B_, u_.sizes().slice(0, 3));
    check_shape(op, "C", C_, u_.sizes().slice(0, 3));
    check_shape(op, "A", A_, {dim});
    check_shape(op, "D", D_, {dim});
    check_shape(op, "delta_bias", bias_, {dim});
    check_shape(op, "taps", taps_, {kTaps, dim});
    const auto type = kernel_type(u_, delta_);
    u = u_.to(type).contiguous();
    delta = delta_.to(type).contiguous();
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
    a->delta = delta.const_data_ptr<T>();
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

at::Tensor structure_aware_ssm(
    const at::Tensor& u,
    const at::Tensor& delta,
    const at::Tensor& A,
    const at::Tensor& B,
    const at::Tensor& C,
    const at::Tensor& D,
    const at::Tensor& delta_bias,
    const at::Tensor& taps) {
  const Inputs in(u, delta, A, B, C, D, delta_bias, taps);
  at::Tensor y = at::empty_like(in.u);
  SMD2_DISPATCH(in.u.scalar_type(), "structure_aware_ssm", [&] {
    using Acc = acc_t<scalar_t>;
    ForwardArgs<scalar_t> shared;
    in.fill(&shared);
    shared.y = y.data_ptr<scalar_t>();
    const int64_t blocks = (shared.dim + lanes() - 1) / lanes();
    if (shared.images * blocks < at::get_num_threads() && shared.height > 1) {
      run_staged(shared, blocks);
      return;
    }
    const int64_t scratch_size =
        (2 * kRadius + 1) * (shared.width + 2 * kRadius) * lanes();
    run_blocks<Forward<scalar_t>, Acc>(shared, shared.images, scratch_size);
  });
  return y.to(u.scalar_type());
}

std::tuple<
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor,
    at::Tensor>
structure_aware_ssm_backward(
    const at::Tensor& grad_y,
    const at::Tensor& u,
    const at::Tensor& delta,
    const at::Tensor& A,
    const at::Tensor& B,
    const at::Tensor& C,
    const at::Tensor& D,
    const at::Tensor& delta_bias,
    const at::Tensor& taps) {
  const Inputs in(u, delta, A, B, C, D, delta_bias, taps);
  check_shape("structure_aware_ssm_backward", "grad_y", grad_y, u.sizes());
  const auto grad = grad_y.to(in.u.scalar_type()).contiguous();
  const auto images = in.u.size(0), height = in.u.size(1);
  const auto width = in.u.size(2), dim = in.u.size(3);
  const auto blocks = (dim + lanes() - 1) / lanes();
  const auto options = in.A.options();
  at::Tensor grad_u = at::empty_like(in.u), grad_delta = at::empty_like(in.u);
  at::Tensor grad_A = at::empty({images, dim}, options);
  at::Tensor grad_D = at::empty_like(grad_A);
  at::Tensor grad_bias = at::empty_like(grad_A);
  at::Tensor grad_B = at::empty({blocks, images, height, width}, options);
  at::Tensor grad_C = at::empty_like(grad_B);
  at::Tensor grad_taps = at::empty({images, kTaps, dim}, options);
  SMD2_DISPATCH(in.u.scalar_type(), "structure_aware_ssm_backward", [&] {
    using Acc = acc_t<scalar_t>;
    BackwardArgs<scalar_t> shared;
    in.fill(&shared);
    shared.grad_y = grad.const_data_ptr<scalar_t>();
    shared.grad_u = grad_u.data_ptr<scalar_t>();
    shared.grad_delta = grad_delta.data_ptr<scalar_t>();
    shared.grad_A = grad_A.data_ptr<Acc>();
    shared.grad_B = grad_B.data_ptr<Acc>();
    shared.grad_C = grad_C.data_ptr<Acc>();
    shared.grad_D = grad_D.data_ptr<Acc>();
    shared.grad_bias = grad_bias.data_ptr<Acc>();
    shared.grad_taps = grad_taps.data_ptr<Acc>();
    const int64_t scratch_size =
        lanes() * ((height + 2) * (width + 2 * kRadius) +
                   (height + 1) * (width + 2 * kMargin));
    run_blocks<Backward<scalar_t>, Acc>(shared, images, scratch_size);
  });
  return {
      grad_u.to(u.scalar_type()),
      grad_delta.to(delta.scalar_type()),
      grad_A.sum(0).to(A.scalar_type()),
      grad_B.sum(0).to(B.scalar_type()),
      grad_C.sum(0).to(C.scalar_type()),
      grad_D.sum(0).to(D.scalar_type()),
      grad_bias.sum(0).to(delta_bias.scalar_type()),
      grad_taps.sum(0).to(taps.scalar_type())};
}

TORCH_LIBRARY_IMPL(spatial_mamba, CPU, m) {
  m.impl("structure_aware_ssm", &structure_aware_ssm);
  m.impl("structure_aware_ssm_backward", &structure_aware_ssm_backward);
}

}  // namespace
}  // namespace smd2
