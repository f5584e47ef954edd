// The fusion's CUDA launchers and their arguments, for the glue and for other
// operators. Torch-free.
#pragma once

#include "../cuda/types.h"
#include "taps.h"

namespace smd2 {
namespace cuda {

// The tile of a block of threads, in rows and columns of 32 channels. With a
// halo of kRadius on all sides it takes 63 KiB of shared memory, which is what
// fits on every architecture since 7.5. A wider tile recomputes or rereads less
// halo; a lower one has fewer warps that share it. Not tuned on a GPU.
template <typename Acc>
struct TileShape {
  static constexpr int kRows = 8;    // rows fused at once, one for each warp
  static constexpr int kWidth = 18;  // columns, at most
};
template <>
struct TileShape<double> {
  static constexpr int kRows = 4;
  static constexpr int kWidth = 8;
};

// The ring buffer of rows in shared memory.
template <typename Acc>
struct Ring {
  static constexpr int kRows = TileShape<Acc>::kRows + 2 * kRadius;
  static constexpr int kColumns = TileShape<Acc>::kWidth + 2 * kRadius;
  static constexpr int kRowSize = kColumns * kLanes;
  static constexpr size_t kBytes = sizeof(Acc) * kRows * kRowSize;
};

// How a map is cut: a block of threads processes 32 channels of one image, in a
// tile of columns, and goes down a band of rows.
struct Tiles {
  int64_t images, height, width, dim;
  int64_t tile_width, tiles;   // columns of a tile, number of tiles
  int64_t band_height, bands;  // rows of a band, number of bands

  SMD2_HOST_DEVICE int64_t channel_blocks() const {
    return blocks_of(dim, kLanes);
  }
  // Number of blocks of threads per 32 channels; each writes partial sums.
  SMD2_HOST_DEVICE int64_t parts() const {
    return images * bands * tiles;
  }
  SMD2_HOST_DEVICE int64_t blocks() const {
    return channel_blocks() * parts();
  }
};

// Bands are as high as possible while there are enough blocks for the device:
// every band computes the rows of its halo again.
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

// The same for the current device, with double or float as accumulation type.
Tiles cut_for_device(
    bool is_double,
    int64_t images,
    int64_t height,
    int64_t width,
    int64_t dim);

// Pointers to contiguous tensors.
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
