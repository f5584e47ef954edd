// The CUDA launchers of structure_aware_ssm and their arguments, for the glue.
// Torch-free.
#pragma once

#include "../selective_scan/cuda.h"
#include "../state_fusion/cuda.h"

namespace smd2 {
namespace cuda {

// Segments of an image: the rows are those of the map, and each tile of the
// fusion has a segment, which begins at the tile's left halo.
inline Segments image_segments(const Tiles& tiles) {
  return {
      tiles.height * tiles.width,
      tiles.width,
      tiles.tiles,
      tiles.tile_width,
      kRadius};
}

// Pointers to contiguous tensors.
template <typename T>
struct SsmForwardArgs {
  ScanArgs<T> scan;  // with image_segments()
  Tiles tiles;
  const acc_t<T>* C;     // [images, height, width]
  const acc_t<T>* D;     // [dim]
  const acc_t<T>* taps;  // [25, dim]
  T* y;                  // [images, height, width, dim]
};

template <typename T>
struct SsmBackwardArgs {
  // scan.grad_h is scratch memory, which the fusion's backward pass writes.
  ScanBackwardArgs<T> scan;
  Tiles tiles;
  const acc_t<T>* C;     // [images, height, width]
  const acc_t<T>* taps;  // [25, dim]
  acc_t<T>* grad_h;      // the same memory as scan.grad_h
  acc_t<T>* grad_C;      // [channel blocks, images, height, width]
  acc_t<T>* grad_taps;   // [parts, 25, dim]
};

template <typename T>
void ssm_forward(const SsmForwardArgs<T>& args, cudaStream_t stream);

template <typename T>
void ssm_backward(const SsmBackwardArgs<T>& args, cudaStream_t stream);

}  // namespace cuda
}  // namespace smd2
