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
Tensor pack_weight(const Tensor& weight) {
  const int64_t dim = weight.size(0), rank = weight.size(1);
  const int64_t size = lanes_of(weight.scalar_type());
  Tensor packed = zeros({channel_blocks(dim, size), rank, size}, weight);
  SMD2_DISPATCH_WIDE(weight.scalar_type(), "pack_weight", [&] {
    const auto* from = weight.const_data_ptr<scalar_t>();
    auto* to = packed.mutable_data_ptr<scalar_t>();
    for (int64_t c = 0; c < dim; c++) {
      scalar_t* lane = to + c / size * rank * size + c % size;
      for (int64_t k = 0; k < rank; k++) {
        lane[k * size] = from[c * rank + k];
      }
    }
  });
  return packed;
}

void structure_aware_ssm_from_dt_(
    const Tensor& u,
    const Tensor& dt,
    const Tensor& dt_weight,
    const Tensor& A,
    const Tensor& B,
    const Tensor& C,
    const Tensor& D,
    const Tensor& delta_bias,
    const Tensor& taps) {
  const SsmTensors inputs{u, {}, A, B, C, D, delta_bias, taps};
  inputs.check(kOp);
  const auto dim = u.size(3), rank = dt.size(-1);
  SMD2_CHECK_VALUE(
      rank >= 1,
      kOp,
      ": dt must be [B, H, W, R] with R >= 1, got ",
      text(dt.sizes()));
  check_arguments(
      kOp,
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
    args.y = in.u.mutable_data_ptr<scalar_t>();
    run_forward(args);
  });
  copy_back(u, in.u);
}

STABLE_TORCH_LIBRARY_IMPL(spatial_mamba, CPU, m) {
  m.impl(kOp, TORCH_BOX(&structure_aware_ssm_from_dt_));
}

}  // namespace
}  // namespace smd2
