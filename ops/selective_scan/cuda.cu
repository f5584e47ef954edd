// The scan's launchers, for all dtypes.
#include "scan.cuh"

namespace smd2 {
namespace cuda {

template <typename T, typename Pass>
void launch_carries(const Pass& pass, cudaStream_t stream) {
  using Acc = acc_t<T>;
  const int64_t rows = pass.segments.rows();
  const int64_t columns = pass.channel_blocks() * pass.images;
  int warps = static_cast<int>(smaller(pass.segments.per_row, kScanWarps));
  launch(
      "reduce",
      reduce<T, Pass>,
      columns * rows,
      warps,
      warps * kLanes * sizeof(Affine<Acc>),
      stream,
      pass);
  warps = static_cast<int>(smaller(rows, kCarryWarps));
  launch(
      "carry",
      carry<Acc>,
      columns,
      warps,
      warps * kLanes * sizeof(Affine<Acc>),
      stream,
      CarryArgs<Acc>{
          pass.workspace,
          pass.segments,
          pass.images,
          pass.dim,
          Pass::kReverse});
}

template <typename T>
void scan_carries(const ScanArgs<T>& args, cudaStream_t stream) {
  launch_carries<T>(ForwardPass<T>{args}, stream);
}

template <typename T>
void scan_forward(const ScanForwardArgs<T>& args, cudaStream_t stream) {
  scan_carries<T>(args, stream);
  launch(
      "apply",
      apply<T>,
      args.channel_blocks() * args.images * args.segments.rows(),
      static_cast<int>(smaller(args.segments.per_row, kScanWarps)),
      0,
      stream,
      args);
}

template <typename T>
void scan_backward(const ScanBackwardArgs<T>& args, cudaStream_t stream) {
  AdjointPass<T> adjoint{args, args.grad_h};
  adjoint.workspace = args.adjoint_workspace;
  launch_carries<T>(adjoint, stream);
  const int warps =
      static_cast<int>(smaller(args.segments.per_row, kAdjointWarps));
  launch(
      "apply_adjoint",
      args.grad_y ? apply_adjoint<T, true> : apply_adjoint<T, false>,
      args.channel_blocks() * args.images * args.segments.rows(),
      warps,
      warps * kMaxSegment * kLanes * sizeof(acc_t<T>),
      stream,
      args);
}

#define SMD2_INSTANTIATE(T)                                            \
  template void scan_carries(const ScanArgs<T>&, cudaStream_t);        \
  template void scan_forward(const ScanForwardArgs<T>&, cudaStream_t); \
  template void scan_backward(const ScanBackwardArgs<T>&, cudaStream_t)

SMD2_FOR_EACH_DTYPE(SMD2_INSTANTIATE);

}  // namespace cuda
}  // namespace smd2
