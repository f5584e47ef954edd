// The fusion's launchers, for all dtypes.
#include "fusion.cuh"

namespace smd2 {
namespace cuda {

Tiles cut_for_device(
    bool is_double,
    int64_t images,
    int64_t height,
    int64_t width,
    int64_t dim) {
  return (
      is_double ? cut<double>
                : cut<float>)(images, height, width, dim, multiprocessors());
}

template <typename T>
void fusion_forward(const FusionForwardArgs<T>& args, cudaStream_t stream) {
  launch_fuse(
      "fuse_tiles",
      FuseArgs<acc_t<T>, LoadRows<T>, StoreFused<T>>{
          args.tiles, args.taps, {args.h}, {args.out}},
      stream);
}

template <typename T>
void fusion_backward(const FusionBackwardArgs<T>& args, cudaStream_t stream) {
  using Acc = acc_t<T>;
  launch_grad_input(
      GradInputArgs<Acc, LoadGradient<Acc>, T>{
          args.tiles, args.taps, {args.grad_out, nullptr}, args.grad_h},
      stream);
  launch_fuse(
      "fuse_tiles, gradient of the taps",
      FuseArgs<Acc, LoadRows<T>, GradTaps<T>>{
          args.tiles, args.taps, {args.h}, {args.grad_out, args.grad_taps}},
      stream);
}

#define SMD2_INSTANTIATE(T)                                                \
  template void fusion_forward(const FusionForwardArgs<T>&, cudaStream_t); \
  template void fusion_backward(const FusionBackwardArgs<T>&, cudaStream_t)

SMD2_FOR_EACH_DTYPE(SMD2_INSTANTIATE);

}  // namespace cuda
}  // namespace smd2
