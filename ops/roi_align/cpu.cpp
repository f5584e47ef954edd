// spatial_mamba::roi_align on the CPU, forward and backward; op.py documents
// it.
//
// The mean over a bin's samples is separable: bilinear interpolation at (y, x)
// is one along y of one along x, and samples form a grid. So a row of the map
// is reduced to one value per column of bins, which is then added to the rows
// of bins that it counts for. Each pixel is read about once, however many
// samples are near it. The backward pass goes the same way back, each block of
// channels of an image in one thread, so no two threads add to a value.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../cpu/tensors.h"

namespace smd2 {
namespace {

constexpr const char* kOp = "roi_align";
constexpr int64_t kBoxValues = 5;  // image, left, top, right, bottom
// Larger coordinates, which no image has, are treated as NaN.
constexpr double kMaxCoordinate = 1e9;

// Weights of the pixels along one axis for each bin.
template <typename Acc>
struct Axis {
  struct Bin {
    int64_t first = 0, count = 0;  // pixels
    const Acc* weights = nullptr;
  };
  std::vector<Bin> bins;
  std::vector<Acc> weights;

  // Bins between `low` and `high`, in pixels of a map with `size` of them.
  void place(Acc low, Acc high, int64_t size, int64_t num_bins, int64_t ratio) {
    const Acc bin = (high - low) / num_bins;
    const int64_t samples =
        ratio > 0 ? ratio : static_cast<int64_t>(std::ceil(bin));
    bins.assign(num_bins, Bin());
    const int64_t most =
        samples > 0 ? std::min(size, static_cast<int64_t>(bin) + 3) : 0;
    weights.assign(num_bins * most, Acc(0));
    for (int64_t i = 0; i < num_bins; i++) {
      Acc* of_bin = weights.data() + i * most;
      bins[i].weights = of_bin;
      for (int64_t s = 0; s < samples; s++) {
        Acc at = low + i * bin + (s + Acc(0.5)) * bin / samples;
        if (at < -1 || at > size) {
          continue;  // such a sample is 0
        }
        at = std::max(at, Acc(0));
        const int64_t below = std::min(static_cast<int64_t>(at), size - 1);
        const int64_t above = std::min(below + 1, size - 1);
        const Acc share = above > below ? at - below : Acc(0);
        if (bins[i].count == 0) {
          bins[i].first = below;
        }
        of_bin[below - bins[i].first] += (1 - share) / samples;
        of_bin[above - bins[i].first] += share / samples;
        bins[i].count = above - bins[i].first + 1;
      }
    }
  }
};

// A box on the map: its image, and the weights of the pixels along each axis.
template <typename Acc>
struct Placed {
  int64_t image = -1;  // none, if a number is not valid
  Axis<Acc> down, across;
  int64_t first = 0, last = 0;  // rows [first, last) of the map
};

// Boxes, and how they lie on a map.
template <typename Acc>
struct Boxes {
  const Acc* boxes;  // [num, kBoxValues]
  int64_t images, height, width, rows, columns, sampling_ratio;
  Acc scale, offset;
  Acc least;  // side of a box, in pixels of the map

  void place(int64_t number, Placed<Acc>* out) const {
    const Acc* box = boxes + number * kBoxValues;
    out->image = -1;
    for (int i = 0; i < kBoxValues; i++) {
      if (!(std::abs(box[i]) <= kMaxCoordinate)) {
        return;
      }
    }
    // Of an image that is there, whatever the caller checked.
    out->image =
        std::clamp<int64_t>(static_cast<int64_t>(box[0]), 0, images - 1);
    place_along(&out->across, box[1], box[3], width, columns);
    place_along(&out->down, box[2], box[4], height, rows);
    out->first = height;
    out->last = 0;
    for (const auto& bin : out->down.bins) {
      if (bin.count > 0) {
        out->first = std::min(out->first, bin.first);
        out->last = std::max(out->last, bin.first + bin.count);
      }
    }
  }

  void place_along(
      Axis<Acc>* axis,
      Acc low,
      Acc high,
      int64_t size,
      int64_t num_bins) const {
    low = low * scale - offset;
    high = low + std::max(high * scale - offset - low, least);
    axis->place(low, high, size, num_bins, sampling_ratio);
  }
};

template <typename T>
struct RoiAlignArgs : Boxes<acc_t<T>> {
  using Acc = acc_t<T>;
  const T* x;
  T* out;
  int64_t x_stride, dim;
  Acc* scratch;  // [rows, columns, padded()]
  Placed<Acc>* placed;
  int64_t box;

  int64_t padded() const {
    return (dim + kLanesAvx512 - 1) / kLanesAvx512 * kLanesAvx512;
  }
};

template <typename T>
struct RoiAlign {
  using Acc = acc_t<T>;
  using Args = RoiAlignArgs<T>;

  template <int N>
  SMD2_INLINE void run(const Args& a) {
    const int64_t bins = a.rows * a.columns;
    T* out = a.out + a.box * bins * a.dim;
    const auto& placed = *a.placed;
    a.place(a.box, a.placed);
    if (placed.image < 0) {
      std::fill_n(out, bins * a.dim, std::numeric_limits<T>::quiet_NaN());
      return;
    }
    std::fill_n(a.scratch, bins * a.padded(), Acc(0));
    const T* image = a.x + placed.image * a.height * a.width * a.x_stride;
    for (int64_t y = placed.first; y < placed.last; y++) {
      const T* row = image + y * a.width * a.x_stride;
      int64_t c = 0;
      for (; c + 4 * N <= a.dim; c += 4 * N) {
        add_row<N, 4>(a, row, y, c, N);
      }
      for (; c < a.dim; c += N) {
        const int64_t rest = std::min<int64_t>(a.dim - c, N);
        add_row<N, 1>(a, row, y, c, static_cast<int>(rest));
      }
    }
    for (int64_t i = 0; i < bins; i++) {
      for_channels<N>(a.dim, [&](int64_t c, int n) SMD2_LAMBDA {
        store_channels<T, N>(
            out + i * a.dim + c,
            read<Acc, N>(a.scratch + i * a.padded() + c),
            n);
      });
    }
  }

  // Adds row y of the map, S vectors of channels from c on, to all bins.
  template <int N, int S>
  SMD2_INLINE void
  add_row(const Args& a, const T* row, int64_t y, int64_t c, int n) {
    using V = vec<Acc, N>;
    for (int64_t column = 0; column < a.columns; column++) {
      const auto& bin = a.placed->across.bins[column];
      V mean[S]{};
      for (int64_t i = 0; i < bin.count; i++) {
        const T* pixel = row + (bin.first + i) * a.x_stride + c;
        const Acc weight = bin.weights[i];
        each<S>([&](int s) SMD2_LAMBDA {
          mean[s] += weight * load_channels<T, N>(pixel + s * N, n);
        });
      }
      for (int64_t r = 0; r < a.rows; r++) {
        const auto& rows = a.placed->down.bins[r];
        if (y < rows.first || y >= rows.first + rows.count) {
          continue;
        }
        const Acc weight = rows.weights[y - rows.first];
        Acc* sum = a.scratch + (r * a.columns + column) * a.padded() + c;
        each<S>([&](int s) SMD2_LAMBDA {
          write<Acc, N>(
              sum + s * N, read<Acc, N>(sum + s * N) + weight * mean[s]);
        });
      }
    }
  }
};

template <typename T>
struct GradientArgs {
  using Acc = acc_t<T>;
  const T* grad_output;       // [num, rows, columns, dim]
  const Placed<Acc>* placed;  // [num]
  T* grad_x;                  // [images, height, width, dim]
  int64_t num, height, width, rows, columns, dim;
  int64_t image, block;
  Acc* scratch;  // [height, width, N], the gradient of a block of channels
};

template <typename T>
struct Gradient {
  template <int N, bool Full>
  SMD2_INLINE void run(const GradientArgs<T>& a) {
    using Acc = acc_t<T>;
    const int64_t c = a.block * N, pixels = a.height * a.width;
    const int n = block_channels<N, Full>(a);
    std::fill_n(a.scratch, pixels * N, Acc(0));
    for (int64_t i = 0; i < a.num; i++) {
      const auto& placed = a.placed[i];
      if (placed.image != a.image) {
        continue;
      }
      const T* grad = a.grad_output + i * a.rows * a.columns * a.dim + c;
      for (int64_t y = placed.first; y < placed.last; y++) {
        add_row<N>(a, placed, grad, y, n);
      }
    }
    T* out = a.grad_x + a.image * pixels * a.dim + c;
    for (int64_t i = 0; i < pixels; i++) {
      store_channels<T, N>(out + i * a.dim, read<Acc, N>(a.scratch + i * N), n);
    }
  }

  // Adds the gradients of a box's bins to row y of the map.
  template <int N>
  SMD2_INLINE void add_row(
      const GradientArgs<T>& a,
      const Placed<acc_t<T>>& placed,
      const T* grad,
      int64_t y,
      int n) {
    using Acc = acc_t<T>;
    for (int64_t column = 0; column < a.columns; column++) {
      vec<Acc, N> sum{};
      for (int64_t r = 0; r < a.rows; r++) {
        const auto& rows = placed.down.bins[r];
        if (y >= rows.first && y < rows.first + rows.count) {
          const T* bin = grad + (r * a.columns + column) * a.dim;
          sum += rows.weights[y - rows.first] * load_channels<T, N>(bin, n);
        }
      }
      const auto& bin = placed.across.bins[column];
      Acc* pixel = a.scratch + (y * a.width + bin.first) * N;
      for (int64_t i = 0; i < bin.count; i++, pixel += N) {
        write<Acc, N>(pixel, read<Acc, N>(pixel) + bin.weights[i] * sum);
      }
    }
  }
};

template <typename Acc>
Boxes<Acc> boxes_of(
    const Tensor& boxes,
    const Tensor& x,
    int64_t height,
    int64_t width,
    double scale,
    int64_t sampling_ratio,
    bool aligned) {
  return {
      boxes.const_data_ptr<Acc>(),
      x.size(0),
      x.size(1),
      x.size(2),
      height,
      width,
      sampling_ratio,
      static_cast<Acc>(scale),
      aligned ? Acc(0.5) : Acc(0),
      aligned ? Acc(0) : Acc(1)};
}

Tensor roi_align(
    const Tensor& x,
    const Tensor& boxes,
    int64_t height,
    int64_t width,
    double scale,
    int64_t sampling_ratio,
    bool aligned) {
  const int64_t num = boxes.size(0), dim = x.size(3);
  check_arguments(kOp, {{"boxes", boxes, {num, kBoxValues}}});
  const auto in = even_tokens(as_type(x, kernel_type(x, x)));
  const auto corners = small(boxes, in);
  Tensor out = empty({num, height, width, dim}, in);
  SMD2_DISPATCH(in.scalar_type(), kOp, [&] {
    using Acc = acc_t<scalar_t>;
    const RoiAlignArgs<scalar_t> shared{
        boxes_of<Acc>(
            corners, x, height, width, scale, sampling_ratio, aligned),
        in.const_data_ptr<scalar_t>(),
        out.mutable_data_ptr<scalar_t>(),
        token_stride(in),
        dim,
        nullptr,
        nullptr,
        0};
    parallel_for(0, num, 1, [&](int64_t begin, int64_t end) {
      const auto scratch = cache_lines<Acc>(height * width * shared.padded());
      Placed<Acc> placed;
      auto args = shared;
      args.scratch = scratch.get();
      args.placed = &placed;
      for (args.box = begin; args.box < end; args.box++) {
        run<RoiAlign<scalar_t>>(args);
      }
    });
  });
  return as_type(out, x.scalar_type());
}

std::tuple<Tensor, Tensor> roi_align_backward(
    const Tensor& grad_output,
    const Tensor& x,
    const Tensor& boxes,
    int64_t height,
    int64_t width,
    double scale,
    int64_t sampling_ratio,
    bool aligned) {
  const int64_t num = boxes.size(0), dim = x.size(3);
  check_arguments(
      kOp,
      {{"boxes", boxes, {num, kBoxValues}},
       {"grad_output", grad_output, {num, height, width, dim}}});
  const auto type = kernel_type(x, x);
  const auto grad = contiguous_as(grad_output, type);
  const auto corners = small(boxes, grad);
  Tensor grad_x = empty(x.sizes(), grad);
  SMD2_DISPATCH(type, kOp, [&] {
    using Acc = acc_t<scalar_t>;
    const auto all = boxes_of<Acc>(
        corners, x, height, width, scale, sampling_ratio, aligned);
    std::vector<Placed<Acc>> placed(num);
    parallel_for(0, num, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        all.place(i, &placed[i]);
      }
    });
    const GradientArgs<scalar_t> shared{
        grad.template const_data_ptr<scalar_t>(),
        placed.data(),
        grad_x.mutable_data_ptr<scalar_t>(),
        num,
        x.size(1),
        x.size(2),
        height,
        width,
        dim,
        0,
        0,
        nullptr};
    run_blocks<Gradient<scalar_t>, Acc>(
        shared, x.size(0), x.size(1) * x.size(2) * lanes<scalar_t>());
  });
  return {
      as_type(grad_x, x.scalar_type()),
      torch::stable::new_zeros(boxes, boxes.sizes())};
}

STABLE_TORCH_LIBRARY_IMPL(spatial_mamba, CPU, m) {
  m.impl("roi_align", TORCH_BOX(&roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&roi_align_backward));
}

}  // namespace
}  // namespace smd2
