// How the scan's CUDA kernels cut a sequence, and their arguments; cuda.py,
// which launches them, follows this file.
#pragma once

#include "../cuda/types.h"

namespace smd2 {
namespace cuda {

// How a sequence is cut: into rows, and rows into segments. One warp processes
// one segment of 32 channels.
//
//            segment 0     segment 1     segment 2
//   row 0   | t t t t t | t t t t t t | t t t t t t |
//   row 1   | t t t t t | t t t t t t | t t t t t t |   tokens t in the order
//   row 2   | t t t t t | t t |                         of the recursion
//
// Segment s of a row begins at token s * step - shift of the row (segment 0 at
// token 0), and the last segment ends with the row. The rows of an image are
// those of the map. A sequence that is not an image has artificial rows.
struct Segments {
  int64_t tokens;   // number of tokens of an image
  int64_t width;    // tokens of a row; the last row may have fewer
  int64_t rows;     // number of rows of an image
  int64_t per_row;  // number of segments in a row
  int64_t step, shift;

  SMD2_DEVICE int64_t row_tokens(int64_t row) const {
    return smaller(width, tokens - row * width);
  }
  // The segment's first token, and the one after its last, counted in the
  // image.
  SMD2_DEVICE int64_t begin(int64_t row, int64_t s) const {
    const int64_t at = larger(s * step - shift, int64_t{0});
    return row * width + smaller(at, row_tokens(row));
  }
  SMD2_DEVICE int64_t end(int64_t row, int64_t s) const {
    return s + 1 == per_row ? row * width + row_tokens(row) : begin(row, s + 1);
  }
};

// Tokens of the longest segment, within which offsets take 32 bits. The adjoint
// keeps their states in shared memory (kAdjointWarps x 4 KiB in a block);
// longer segments mean fewer carries and fewer segments that run in parallel.
constexpr int kMaxSegment = 32;

// Pointers to contiguous tensors.
template <typename T>
struct ScanArgs {
  const T* u;            // [images, tokens, dim]
  const T* delta;        // [images, tokens, dim]
  const acc_t<T>* A;     // [dim]
  const acc_t<T>* B;     // [images, tokens]
  const acc_t<T>* bias;  // [dim]
  acc_t<T>* workspace;   // see Carries in scan.cuh
  Segments segments;
  int64_t images, dim;
};

template <typename T>
struct ScanForwardArgs : ScanArgs<T> {
  acc_t<T>* h;  // [images, tokens, dim]
};

template <typename T, typename Inputs = ScanArgs<T>>
struct ScanBackwardArgs : Inputs {
  const acc_t<T>* grad_h;       // [images, tokens, dim]
  acc_t<T>* adjoint_workspace;  // see Carries in scan.cuh
  T* grad_u;                    // [images, tokens, dim]
  T* grad_delta;                // [images, tokens, dim]
  acc_t<T>* grad_B;             // [channel blocks, images, tokens]
  acc_t<T>* grad_A;             // [images, rows, dim]
  acc_t<T>* grad_bias;          // [images, rows, dim]
  // For an observation y = ... + D u, which adds D grad_y to grad_u; else null:
  const T* grad_y;    // [images, tokens, dim]
  const acc_t<T>* D;  // [dim]
  acc_t<T>* grad_D;   // [images, rows, dim]
};

}  // namespace cuda
}  // namespace smd2
