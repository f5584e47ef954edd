// The forward pass of structure_aware_ssm and structure_aware_ssm_from_dt on
// the CPU. It keeps 11 rows of states in cache; h is never written to memory.
#include "rows.h"

namespace smd2 {
namespace {

// Row y of the output, y = C h' + D u, from the states around it.
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
    const SsmBlock<T, N, Full> block(a);
    vec<Acc, N> h{};
    const auto produce = [&](int64_t y, Acc* row) SMD2_LAMBDA {
      scan_row<T, N>(block.scan, y * a.width, a.width, &h, row);
    };
    const auto use = [&](int64_t y, const Window<Acc>& window) SMD2_LAMBDA {
      observe_row<T, N, Full>(a, block, window, y);
    };
    sweep_rows<Acc, N>(a.scratch, a.height, a.width, produce, use);
  }
};

// The forward pass in three stages, for more threads than there are blocks of
// channels in all images: one image of 128 channels has 8 blocks with AVX-512,
// so that 8 of 16 threads would idle.
//
// Only the second stage, Recur, depends on the order of tokens, and it is one
// multiply-add for each of them. The other two, Prepare and Observe, divide
// each block by rows among the threads. The price is that decays and states of
// whole maps are in memory. Both ways give the same bits, which
// test_more_threads_than_blocks and test_number_of_threads_changes_nothing
// check.
template <typename T>
struct StagedArgs : ForwardArgs<T> {
  // For each block of each image, `height` padded rows.
  acc_t<T>* decays;
  acc_t<T>* states;
  int64_t blocks;  // of an image
  int64_t row;     // the row that a kernel processes, in Prepare and Observe

  // The rows of this kernel's block in `maps`, which is decays or states.
  template <int N>
  __attribute__((always_inline)) PaddedRows<acc_t<T>, N> rows_of(
      acc_t<T>* maps) const {
    const int64_t map = this->image * blocks + this->block;
    const int64_t size = this->height * (this->width + 2 * kRadius) * N;
    return {maps + map * size, this->height, this->width};
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
        a.template rows_of<N>(a.decays).row(a.row),
        a.template rows_of<N>(a.states).row(a.row));
  }
};

template <typename T>
struct Recur {
  template <int N, bool Full>
  SMD2_INLINE void run(const StagedArgs<T>& a) {
    const SsmBlock<T, N, Full> block(a);
    const auto decays = a.template rows_of<N>(a.decays);
    const auto states = a.template rows_of<N>(a.states);
    vec<acc_t<T>, N> h{};
    for (int64_t y = 0; y < a.height; y++) {
      recur_row<T, N>(
          block.scan, y * a.width, a.width, &h, decays.row(y), states.row(y));
      replicate_row<acc_t<T>, N>(states.row(y), a.width);
    }
  }
};

template <typename T>
struct Observe {
  template <int N, bool Full>
  SMD2_INLINE void run(const StagedArgs<T>& a) {
    const SsmBlock<T, N, Full> block(a);
    const auto states = a.template rows_of<N>(a.states);
    const auto window = window_around<acc_t<T>, N>(states, a.row, a.height);
    observe_row<T, N, Full>(a, block, window, a.row);
  }
};

template <typename T>
void run_staged(const ForwardArgs<T>& shared, int64_t blocks) {
  StagedArgs<T> all{shared, nullptr, nullptr, blocks, 0};
  const int64_t maps = shared.images * blocks;
  const int64_t size = maps * shared.height * (shared.width + 2 * kRadius);
  const auto decays = cache_lines<acc_t<T>>(size * lanes<T>());
  const auto states = cache_lines<acc_t<T>>(size * lanes<T>());
  all.decays = decays.get();
  all.states = states.get();
  // Runs a kernel `count` times for each block, with args.row = 0 .. count - 1.
  const auto run_stage = [&](int64_t count, auto kernel) {
    parallel_for(0, maps * count, 1, [&](int64_t begin, int64_t end) {
      StagedArgs<T> args = all;
      for (int64_t i = begin; i < end; i++) {
        args.image = i / count / blocks;
        args.block = i / count % blocks;
        args.row = i % count;
        run<PerBlock<decltype(kernel)>>(args);
      }
    });
  };
  run_stage(shared.height, Prepare<T>{});
  run_stage(1, Recur<T>{});
  run_stage(shared.height, Observe<T>{});
}

}  // namespace

template <typename T>
void run_forward(const ForwardArgs<T>& shared) {
  const int64_t blocks = channel_blocks(shared.dim, lanes<T>());
  const int64_t threads = torch::stable::get_num_threads();
  if (shared.images * blocks < threads && shared.height > 1) {
    run_staged(shared, blocks);
    return;
  }
  run_blocks<Forward<T>, acc_t<T>>(
      shared, shared.images, sweep_size(shared.width, lanes<T>()));
}

template void run_forward(const ForwardArgs<double>&);
template void run_forward(const ForwardArgs<float>&);
template void run_forward(const ForwardArgs<c10::BFloat16>&);

}  // namespace smd2
