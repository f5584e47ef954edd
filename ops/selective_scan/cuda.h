// The scan's CUDA launchers and their arguments, for the glue and for other
// operators. Torch-free.
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
  int64_t per_row;  // number of segments in a row
  int64_t step, shift;

  SMD2_HOST_DEVICE int64_t rows() const {
    return blocks_of(tokens, width);
  }
  SMD2_HOST_DEVICE int64_t row_tokens(int64_t row) const {
    return smaller(width, tokens - row * width);
  }
  // The segment's first token, and the one after its last, counted in the
  // image.
  SMD2_HOST_DEVICE int64_t begin(int64_t row, int64_t s) const {
    const int64_t at = larger(s * step - shift, 0);
    return row * width + smaller(at, row_tokens(row));
  }
  SMD2_HOST_DEVICE int64_t end(int64_t row, int64_t s) const {
    return s + 1 == per_row ? row * width + row_tokens(row) : begin(row, s + 1);
  }
};

// Tokens of the longest segment. The adjoint keeps their states in shared
// memory (kAdjointWarps x 4 KiB in a block); longer segments mean fewer carries
// and fewer segments that run in parallel.
constexpr int kMaxSegment = 32;

// Segments of a sequence that is not an image.
inline Segments sequence_segments(int64_t length) {
  const int64_t width = smaller(length, 16 * kMaxSegment);
  return {length, width, blocks_of(width, kMaxSegment), kMaxSegment, 0};
}

// Values of the accumulation type that one pass over the segments needs: see
// Carries in scan.cuh.
inline int64_t
workspace_size(const Segments& segments, int64_t images, int64_t dim) {
  return images * segments.rows() * dim * (2 * segments.per_row + 3);
}

// Pointers to contiguous tensors.
template <typename T>
struct ScanArgs {
  const T* u;            // [images, tokens, dim]
  const T* delta;        // [images, tokens, dim]
  const acc_t<T>* A;     // [dim]
  const acc_t<T>* B;     // [images, tokens]
  const acc_t<T>* bias;  // [dim]
  acc_t<T>* workspace;   // workspace_size() values
  Segments segments;
  int64_t images, dim;

  SMD2_HOST_DEVICE int64_t channel_blocks() const {
    return blocks_of(dim, kLanes);
  }
};

template <typename T>
struct ScanForwardArgs : ScanArgs<T> {
  acc_t<T>* h;  // [images, tokens, dim]
};

template <typename T>
struct ScanBackwardArgs : ScanArgs<T> {
  const acc_t<T>* grad_h;       // [images, tokens, dim]
  acc_t<T>* adjoint_workspace;  // workspace_size() values
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

// Computes the states.
template <typename T>
void scan_forward(const ScanForwardArgs<T>& args, cudaStream_t stream);

// Leaves in the workspace what a later kernel needs to compute the states of
// any segment (see Carries in scan.cuh).
template <typename T>
void scan_carries(const ScanArgs<T>& args, cudaStream_t stream);

// Computes the gradients of the scan's inputs, and of D, from that of the
// states. The workspace is as scan_carries leaves it.
template <typename T>
void scan_backward(const ScanBackwardArgs<T>& args, cudaStream_t stream);

}  // namespace cuda
}  // namespace smd2
