// The launchers of structure_aware_ssm, for all dtypes.
#include "ssm.cuh"

namespace smd2 {
namespace cuda {

template <typename T>
void ssm_forward(const SsmForwardArgs<T>& args, cudaStream_t stream) {
  scan_carries(args.scan, stream);
  launch_fuse(
      "fuse_tiles, of a scan",
      FuseArgs<acc_t<T>, ScanRows<T, 4>, Observe<T>>{
          args.tiles,
          args.taps,
          {args.scan},
          {args.scan.u, args.C, args.D, args.y}},
      stream);
}

template <typename T>
void ssm_backward(const SsmBackwardArgs<T>& args, cudaStream_t stream) {
  using Acc = acc_t<T>;
  scan_carries<T>(args.scan, stream);
  launch_fuse(
      "fuse_tiles, gradients of taps and C",
      FuseArgs<Acc, ScanRows<T, 2>, GradObserved<T>>{
          args.tiles,
          args.taps,
          {args.scan},
          {args.scan.grad_y, args.C, args.grad_C, args.grad_taps}},
      stream);
  launch_grad_input(
      GradInputArgs<Acc, LoadGradient<T>, Acc>{
          args.tiles, args.taps, {args.scan.grad_y, args.C}, args.grad_h},
      stream);
  scan_backward(args.scan, stream);
}

#define SMD2_INSTANTIATE(T)                                          \
  template void ssm_forward(const SsmForwardArgs<T>&, cudaStream_t); \
  template void ssm_backward(const SsmBackwardArgs<T>&, cudaStream_t)

SMD2_FOR_EACH_DTYPE(SMD2_INSTANTIATE);

}  // namespace cuda
}  // namespace smd2
