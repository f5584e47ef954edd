// spatial_mamba::roi_align on the CPU; op.py documents it.
//
// The mean over a bin's samples is separable: bilinear interpolation at (y, x)
// is one along y of one along x, and samples form a grid. So a row of the map
// is reduced to one value per column of bins, which is then added to the rows
// of bins that it counts for. Each pixel is read about once, however many
// samples are near it.
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

template <typename T>
struct RoiAlignArgs {
  using Acc = acc_t<T>;
  const T* x;
  const Acc* boxes;  // [num, kBoxValues]
  T* out;
  int64_t x_stride, images, height, width, dim, rows, columns, sampling_ratio;
  Acc scale, offset;
  Acc least;     // side of a box, in pixels of the map
  Acc* scratch;  // [rows, columns, padded()]
  Axis<Acc>*down, *across;
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
    const Acc* box = a.boxes + a.box * kBoxValues;
    for (int i = 0; i < kBoxValues; i++) {
      if (!(std::abs(box[i]) <= kMaxCoordinate)) {
        std::fill_n(out, bins * a.dim, std::numeric_limits<T>::quiet_NaN());
        return;
      }
    }
    // Of an image that is there, whatever the caller checked.
    const int64_t number =
        std::clamp<int64_t>(static_cast<int64_t>(box[0]), 0, a.images - 1);
    place(a, box);
    std::fill_n(a.scratch, bins * a.padded(), Acc(0));
    int64_t first = a.height, last = 0;
    for (const auto& bin : a.down->bins) {
      if (bin.count > 0) {
        first = std::min(first, bin.first);
        last = std::max(last, bin.first + bin.count);
      }
    }
    const T* image = a.x + number * a.height * a.width * a.x_stride;
    for (int64_t y = first; y < last; y++) {
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

  static void place(const Args& a, const Acc* box) {
    const auto along = [&](Axis<Acc>* axis,
                           Acc low,
                           Acc high,
                           int64_t size,
                           int64_t num_bins) {
      low = low * a.scale - a.offset;
      high = low + std::max(high * a.scale - a.offset - low, a.least);
      axis->place(low, high, size, num_bins, a.sampling_ratio);
    };
    along(a.across, box[1], box[3], a.width, a.columns);
    along(a.down, box[2], box[4], a.height, a.rows);
  }

  // Adds row y of the map, S vectors of channels from c on, to all bins.
  template <int N, int S>
  SMD2_INLINE void
  add_row(const Args& a, const T* row, int64_t y, int64_t c, int n) {
    using V = vec<Acc, N>;
    for (int64_t column = 0; column < a.columns; column++) {
      const auto& bin = a.across->bins[column];
      V mean[S]{};
      for (int64_t i = 0; i < bin.count; i++) {
        const T* pixel = row + (bin.first + i) * a.x_stride + c;
        const Acc weight = bin.weights[i];
        each<S>([&](int s) SMD2_LAMBDA {
          mean[s] += weight * load_channels<T, N>(pixel + s * N, n);
        });
      }
      for (int64_t r = 0; r < a.rows; r++) {
        const auto& rows = a.down->bins[r];
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
        in.const_data_ptr<scalar_t>(),
        corners.const_data_ptr<Acc>(),
        out.mutable_data_ptr<scalar_t>(),
        token_stride(in),
        x.size(0),
        x.size(1),
        x.size(2),
        dim,
        height,
        width,
        sampling_ratio,
        static_cast<Acc>(scale),
        aligned ? Acc(0.5) : Acc(0),
        aligned ? Acc(0) : Acc(1),
        nullptr,
        nullptr,
        nullptr,
        0};
    parallel_for(0, num, 1, [&](int64_t begin, int64_t end) {
      const auto scratch = cache_lines<Acc>(height * width * shared.padded());
      Axis<Acc> down, across;
      auto args = shared;
      args.scratch = scratch.get();
      args.down = &down;
      args.across = &across;
      for (args.box = begin; args.box < end; args.box++) {
        run<RoiAlign<scalar_t>>(args);
      }
    });
  });
  return as_type(out, x.scalar_type());
}

STABLE_TORCH_LIBRARY_IMPL(spatial_mamba, CPU, m) {
  m.impl("roi_align", TORCH_BOX(&roi_align));
}

}  // namespace
}  // namespace smd2
