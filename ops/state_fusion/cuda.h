// What the glue and other operators know of the fusion's CUDA kernels.
// Torch-free.
#pragma once

#include "../cuda/types.h"

namespace smd2 {
namespace cuda {

constexpr int kRadius = 5;
constexpr int kTaps = 25;

// What a block of threads keeps in shared memory: a ring of rows of 32
// channels, with a halo on all sides. 63 KiB, so that it fits every
// architecture since 7.5.
template <typename Acc>
struct TileShape {
  static constexpr int kRows = 8;    // that are fused at once, a warp each
  static constexpr int kWidth = 18;  // columns, at most
};
template <>
struct TileShape<double> {
  static constexpr int kRows = 4;
  static constexpr int kWidth = 8;
};

template <typename Acc>
struct Ring {
  static constexpr int kRows = TileShape<Acc>::kRows + 2 * kRadius;
  static constexpr int kColumns = TileShape<Acc>::kWidth + 2 * kRadius;
  static constexpr int kRowSize = kColumns * kLanes;
  static constexpr size_t kBytes = sizeof(Acc) * kRows * kRowSize;
};

// How a map is cut: a block of threads treats one image, 32 channels, a tile of
// columns, and goes down a band of rows.
struct Tiles {
  int64_t images, height, width, dim;
  int64_t tile_width, tiles;
  int64_t band_height, bands;

  SMD2_HOST_DEVICE int64_t channel_blocks() const {
    return blocks_of(dim, kLanes);
  }
  // Blocks of threads per 32 channels; each has partial sums of its own.
  SMD2_HOST_DEVICE int64_t parts() const {
    return images * bands * tiles;
  }
  SMD2_HOST_DEVICE int64_t blocks() const {
    return channel_blocks() * parts();
  }
};

// Bands are as high as the device allows while it has blocks enough: a band
// computes the rows of its halo anew.
template <typename Acc>
Tiles cut(
    int64_t images,
    int64_t height,
    int64_t width,
    int64_t dim,
    int multiprocessors) {
  constexpr int kRows = TileShape<Acc>::kRows;
  constexpr int64_t kBlocksPerMultiprocessor = 3;
  Tiles t{images, height, width, dim, 0, 0, 0, 0};
  t.tiles = blocks_of(width, TileShape<Acc>::kWidth);
  t.tile_width = blocks_of(width, t.tiles);
  const int64_t columns = images * t.tiles * t.channel_blocks();
  const int64_t wanted =
      blocks_of(multiprocessors * kBlocksPerMultiprocessor, larger(columns, 1));
  t.band_height = larger(blocks_of(height, wanted), 2 * kRows);
  t.band_height = blocks_of(t.band_height, kRows) * kRows;
  t.bands = blocks_of(height, t.band_height);
  return t;
}

// The same for the current device, of a map whose accumulation type is double
// or float.
Tiles cut_for_device(
    bool is_double,
    int64_t images,
    int64_t height,
    int64_t width,
    int64_t dim);

// Pointers to whole contiguous tensors.
template <typename T>
struct FusionArgs {
  const T* h;            // [images, height, width, dim]
  const acc_t<T>* taps;  // [25, dim]
  Tiles tiles;
};

template <typename T>
struct FusionForwardArgs : FusionArgs<T> {
  acc_t<T>* out;  // [images, height, width, dim]
};

template <typename T>
struct FusionBackwardArgs : FusionArgs<T> {
  const acc_t<T>* grad_out;  // [images, height, width, dim]
  T* grad_h;                 // [images, height, width, dim]
  acc_t<T>* grad_taps;       // [parts, 25, dim]
};

template <typename T>
void fusion_forward(const FusionForwardArgs<T>& args, cudaStream_t stream);

template <typename T>
void fusion_backward(const FusionBackwardArgs<T>& args, cudaStream_t stream);

}  // namespace cuda
}  // namespace smd2
