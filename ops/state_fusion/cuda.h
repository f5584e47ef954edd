// How the fusion's CUDA kernels cut a map; cuda.py, which launches them,
// follows this file.
#pragma once

#include "../cuda/types.h"
#include "taps.h"

namespace smd2 {
namespace cuda {

// The tile of a block of threads, in rows and columns of 32 channels. With a
// halo of kRadius on all sides, the widest takes 63 KiB of shared memory, which
// is what fits on every architecture since 7.0. A wider tile recomputes or
// rereads less halo; a lower one has fewer warps that share it. Not tuned on a
// GPU.
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

// How a map is cut: a block of threads processes 32 channels of one image, in a
// tile of columns, and goes down a band of rows.
struct Tiles {
  int64_t images, height, width, dim;
  int64_t tile_width, tiles;   // columns of a tile, number of tiles
  int64_t band_height, bands;  // rows of a band, number of bands
};

}  // namespace cuda
}  // namespace smd2
