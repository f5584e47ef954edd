// What the glue knows of the fused operator's CUDA kernels. Torch-free.
#pragma once

#include "../selective_scan/cuda.h"
#include "../state_fusion/cuda.h"

namespace smd2 {
namespace cuda {

// Segments of an image: a row of the map is a row, and a segment begins where
// a tile with its halo does.
inline Segments image_segments(const Tiles& tiles) {
  return {
      tiles.height * tiles.width,
      tiles.width,
      tiles.tiles,
      tiles.tile_width,
      kRadius};
}

// Pointers to whole contiguous tensors.
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
  // Its grad_h is scratch, which the fusion's backward pass writes.
  ScanBackwardArgs<T> scan;
  Tiles tiles;
  const acc_t<T>* C;     // [images, height, width]
  const acc_t<T>* taps;  // [25, dim]
  acc_t<T>* grad_h;      // the same scratch as scan.grad_h
  acc_t<T>* grad_C;      // [channel blocks, images, height, width]
  acc_t<T>* grad_taps;   // [parts, 25, dim]
};

template <typename T>
void ssm_forward(const SsmForwardArgs<T>& args, cudaStream_t stream);

template <typename T>
void ssm_backward(const SsmBackwardArgs<T>& args, cudaStream_t stream);

}  // namespace cuda
}  // namespace smd2
