// spatial_mamba::structure_aware_ssm_from_dt_ on the CPU; op.py documents it.
//
// The forward pass of structure_aware_ssm with the output in place of u: a row
// of the output is written kRadius rows after the scan has read that row of u.
#include "../structure_aware_ssm/rows.h"

namespace smd2 {
namespace {

constexpr const char* kOp = "structure_aware_ssm_from_dt_";

// Weights [dim, rank] in the layout that kernels read, [blocks of channels,
// rank, lanes()].
at::Tensor pack_weight(const at::Tensor& weight) {
  const int64_t dim = weight.size(0), size = lanes_of(weight.scalar_type());
  const int64_t blocks = channel_blocks(dim, size);
  const bool even = dim % size == 0;
  const auto padded =
      even ? weight
           : at::constant_pad_nd(weight, {0, 0, 0, blocks * size - dim});
  return padded.view({blocks, size, weight.size(1)})
      .transpose(1, 2)
      .contiguous();
}

void structure_aware_ssm_from_dt_(
    const at::Tensor& u,
    const at::Tensor& dt,
    const at::Tensor& dt_weight,
    const at::Tensor& A,
    const at::Tensor& B,
    const at::Tensor& C,
    const at::Tensor& D,
    const at::Tensor& delta_bias,
    const at::Tensor& taps) {
  const SsmTensors inputs{u, {}, A, B, C, D, delta_bias, taps};
  inputs.check(kOp);
  const auto dim = u.size(3), rank = dt.size(-1);
  TORCH_CHECK_VALUE(
      rank >= 1,
      kOp,
      ": dt must be [B, H, W, R] with R >= 1, got ",
      dt.sizes());
  check_arguments(
      kOp,
      u,
      {{"dt", dt, {u.size(0), u.size(1), u.size(2), rank}},
       {"dt_weight", dt_weight, {dim, rank}}});
  const auto in = inputs.as(kernel_type(u, u));
  const auto steps = small(dt, in.u);
  const auto weight = pack_weight(small(dt_weight, in.u));
  SMD2_DISPATCH(in.u.scalar_type(), kOp, [&] {
    using Acc = acc_t<scalar_t>;
    ForwardArgs<scalar_t> args{};
    fill(in, &args);
    args.steps.dt = steps.const_data_ptr<Acc>();
    args.steps.weight = weight.const_data_ptr<Acc>();
    args.steps.rank = rank;
    args.y = in.u.data_ptr<scalar_t>();
    run_forward(args);
  });
  if (!in.u.is_same(u)) {
    u.copy_(in.u);
  }
}

TORCH_LIBRARY_IMPL(spatial_mamba, CPU, m) {
  m.impl(kOp, &structure_aware_ssm_from_dt_);
}

}  // namespace
}  // namespace smd2
