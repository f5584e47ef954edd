// spatial_mamba::winograd_conv3x3 on the CPU; op.py documents it.
#include <algorithm>

#include "../cpu/tensors.h"
#include "tiles.h"

namespace smd2 {
namespace {

constexpr const char* kOp = "winograd_conv3x3";
constexpr int64_t kPanel = 16;   // output channels that weights are packed by
constexpr int64_t kRows = 6;     // tiles that are multiplied together
constexpr int64_t kDepth = 256;  // input channels that are transformed together
// Bytes of factors and products of a thread's tiles. They stay in the cache of
// the third level; more tiles read the weights from there less often. Tuned on
// two cores of an AMD EPYC (Zen 3) with 32 MiB of it.
constexpr int64_t kBlockBytes = 6 << 20;

constexpr int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

template <typename T>
struct ConvArgs {
  const T* x;
  const acc_t<T>* weight;  // [kProducts, padded / kPanel, dim, kPanel]
  const acc_t<T>* bias;
  T* out;
  int64_t x_stride, height, width, dim, out_dim;
  bool relu;
  acc_t<T>* scratch;
  int64_t first, last;  // tiles

  int64_t tile_rows() const {
    return (height + kTile - 1) / kTile;
  }
  int64_t tile_columns() const {
    return (width + kTile - 1) / kTile;
  }
  int64_t padded() const {  // output channels, whole pairs of panels
    return round_up(out_dim, 2 * kPanel);
  }
  int64_t depth() const {  // whole vectors
    return round_up(std::min(dim, kDepth), kPanel);
  }
  // Distance of the matrices of factors, in which the k-th ones of all tiles
  // are. Powers of two would map all of them to the same lines of the cache.
  int64_t factors_stride(int64_t tiles) const {
    return tiles * depth() + kPanel;
  }
  int64_t products_stride(int64_t tiles) const {
    return tiles * padded() + kPanel;
  }
  int64_t scratch_size(int64_t tiles) const {
    return kProducts * (factors_stride(tiles) + products_stride(tiles));
  }
};

struct Position {
  int64_t image, y, x;  // of the upper left output

  template <typename Args>
  static Position of(const Args& a, int64_t tile) {
    const int64_t columns = a.tile_columns(), rows = a.tile_rows();
    return {
        tile / (columns * rows),
        tile / columns % rows * kTile,
        tile % columns * kTile};
  }
};

template <typename T>
struct Conv {
  using Acc = acc_t<T>;
  using Args = ConvArgs<T>;

  template <int N>
  SMD2_INLINE void run(const Args& a) {
    const int64_t tiles = a.last - a.first;
    Acc* factors = a.scratch;
    Acc* products = factors + kProducts * a.factors_stride(tiles);
    for (int64_t c = 0; c < a.dim; c += kDepth) {
      const int64_t depth = std::min(a.dim - c, kDepth);
      for (int64_t t = 0; t < tiles; t++) {
        transform<N>(a, a.first + t, c, depth, factors + t * a.depth(), tiles);
      }
      multiply_all<N>(a, c, depth, factors, products, tiles);
    }
    for (int64_t t = 0; t < tiles; t++) {
      finish<N>(a, a.first + t, products + t * a.padded(), tiles);
    }
  }

  // Factors of channels [first, first + depth) of a tile.
  template <int N>
  SMD2_INLINE void transform(
      const Args& a,
      int64_t tile,
      int64_t first,
      int64_t depth,
      Acc* factors,
      int64_t tiles) {
    using V = vec<Acc, N>;
    const auto at = Position::of(a, tile);
    const T* image = a.x + at.image * a.height * a.width * a.x_stride;
    const int64_t stride = a.factors_stride(tiles);
    for_channels<N>(depth, [&](int64_t c, int n) SMD2_LAMBDA {
      V patch[kProducts], half[kProducts], out[kPatch];
      for (int i = 0; i < kPatch; i++) {
        const int64_t y = at.y + i - 1;
        const bool inside = y >= 0 && y < a.height;
        for (int j = 0; j < kPatch; j++) {
          const int64_t x = at.x + j - 1;
          patch[i * kPatch + j] =
              inside && x >= 0 && x < a.width
                  ? load_channels<T, N>(
                        image + (y * a.width + x) * a.x_stride + first + c, n)
                  : V{};
        }
      }
      for (int i = 0; i < kPatch; i++) {  // along rows
        transform_inputs<Acc, N>(patch + i * kPatch, 1, half + i * kPatch);
      }
      for (int j = 0; j < kPatch; j++) {  // along columns
        transform_inputs<Acc, N>(half + j, kPatch, out);
        for (int i = 0; i < kPatch; i++) {
          write<Acc, N>(factors + (i * kPatch + j) * stride + c, out[i]);
        }
      }
    });
  }

  // products (+)= factors weights, for each of the kProducts positions.
  template <int N>
  SMD2_INLINE void multiply_all(
      const Args& a,
      int64_t first,
      int64_t depth,
      const Acc* factors,
      Acc* products,
      int64_t tiles) {
    const int64_t panel = a.dim * kPanel, padded = a.padded();
    for (int64_t k = 0; k < kProducts; k++) {
      const Acc* weight = a.weight + k * padded * a.dim + first * kPanel;
      const Acc* from = factors + k * a.factors_stride(tiles);
      Acc* to = products + k * a.products_stride(tiles);
      for (int64_t o = 0; o < padded; o += 2 * N) {
        const Acc* b0 = weight + o / kPanel * panel + o % kPanel;
        const Acc* b1 = weight + (o + N) / kPanel * panel + (o + N) % kPanel;
        const auto rows = [&](auto count, int64_t t) SMD2_LAMBDA {
          multiply<Acc, N, decltype(count)::value>(
              from + t * a.depth(),
              a.depth(),
              b0,
              b1,
              kPanel,
              depth,
              to + t * padded + o,
              padded,
              first > 0);
        };
        int64_t t = 0;
        for (; t + kRows <= tiles; t += kRows) {
          rows(std::integral_constant<int, kRows>(), t);
        }
        for (; t < tiles; t++) {
          rows(std::integral_constant<int, 1>(), t);
        }
      }
    }
  }

  // The outputs of a tile.
  template <int N>
  SMD2_INLINE void
  finish(const Args& a, int64_t tile, const Acc* products, int64_t tiles) {
    using V = vec<Acc, N>;
    const auto at = Position::of(a, tile);
    const int64_t stride = a.products_stride(tiles);
    T* image = a.out + at.image * a.height * a.width * a.out_dim;
    const int64_t height = std::min<int64_t>(kTile, a.height - at.y);
    const int64_t width = std::min<int64_t>(kTile, a.width - at.x);
    for_channels<N>(a.out_dim, [&](int64_t o, int n) SMD2_LAMBDA {
      V sums[kProducts], half[kTile * kPatch], out[kTile];
      for (int k = 0; k < kProducts; k++) {
        sums[k] = read<Acc, N>(products + k * stride + o);
      }
      for (int j = 0; j < kPatch; j++) {  // along columns
        transform_products<Acc, N>(sums + j, kPatch, out);
        for (int i = 0; i < kTile; i++) {
          half[i * kPatch + j] = out[i];
        }
      }
      const V bias = load_channels<Acc, N>(a.bias + o, n);
      for (int i = 0; i < height; i++) {  // along rows
        transform_products<Acc, N>(half + i * kPatch, 1, out);
        T* row = image + ((at.y + i) * a.width + at.x) * a.out_dim + o;
        for (int j = 0; j < width; j++) {
          const V y = out[j] + bias;
          // NaN is not less than 0, and stays.
          store_channels<T, N>(row + j * a.out_dim, a.relu ? relu<N>(y) : y, n);
        }
      }
    });
  }

  template <int N>
  SMD2_INLINE vec<Acc, N> relu(vec<Acc, N> y) {
    const vec<Acc, N> zero{};
    return y < zero ? zero : y;
  }
};

Tensor winograd_conv3x3(
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias,
    bool relu) {
  const int64_t dim = x.size(3), out_dim = bias.size(0);
  const int64_t panels = round_up(out_dim, 2 * kPanel) / kPanel;
  check_arguments(kOp, {{"weight", weight, {kProducts, panels, dim, kPanel}}});
  const auto in = even_tokens(as_type(x, kernel_type(x, x)));
  const auto packed = small(weight, in), offset = small(bias, in);
  Tensor out = empty({x.size(0), x.size(1), x.size(2), out_dim}, in);
  SMD2_DISPATCH(in.scalar_type(), kOp, [&] {
    using Acc = acc_t<scalar_t>;
    const ConvArgs<scalar_t> shared{
        in.const_data_ptr<scalar_t>(),
        packed.const_data_ptr<Acc>(),
        offset.const_data_ptr<Acc>(),
        out.mutable_data_ptr<scalar_t>(),
        token_stride(in),
        x.size(1),
        x.size(2),
        dim,
        out_dim,
        relu,
        nullptr,
        0,
        0};
    const int64_t tiles =
        x.size(0) * shared.tile_rows() * shared.tile_columns();
    const int64_t most = kBlockBytes / (shared.scratch_size(1) * sizeof(Acc));
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t equal = round_up((tiles + threads - 1) / threads, kRows);
    const int64_t block =
        std::clamp(most / kRows * kRows, kRows, std::max(equal, kRows));
    parallel_for(
        0, num_parts(tiles, block), 1, [&](int64_t begin, int64_t end) {
          const auto scratch = cache_lines<Acc>(shared.scratch_size(block));
          auto args = shared;
          args.scratch = scratch.get();
          for (int64_t part = begin; part < end; part++) {
            args.first = part * block;
            args.last = std::min(tiles, args.first + block);
            run<Conv<scalar_t>>(args);
          }
        });
  });
  return as_type(out, x.scalar_type());
}

STABLE_TORCH_LIBRARY_IMPL(spatial_mamba, CPU, m) {
  m.impl("winograd_conv3x3", TORCH_BOX(&winograd_conv3x3));
}

}  // namespace
}  // namespace smd2
