// spatial_mamba::low_rank_structure_aware_ssm_ on the CPU; op.py documents it.
//
// A row of the output takes the place of one whose step has been made: the scan
// is kRadius rows ahead.
#include "../structure_aware_ssm/rows.h"

namespace smd2 {
namespace {

constexpr const char* kOp = "low_rank_structure_aware_ssm_";

// Weights [dim, rank] as the kernels read them, [blocks of channels, rank,
// lanes()].
at::Tensor pack_weight(const at::Tensor& weight) {
  const int64_t dim = weight.size(0), size = lanes();
  const int64_t blocks = (dim + size - 1) / size;
  const bool even = dim % size == 0;
  const auto padded =
      even ? weight
           : at::constant_pad_nd(weight, {0, 0, 0, blocks * size - dim});
  return padded.view({blocks, size, weight.size(1)})
      .transpose(1, 2)
      .contiguous();
}

void low_rank_structure_aware_ssm_(
    const at::Tensor& u,
    const at::Tensor& dt_,
    const at::Tensor& dt_weight,
    const at::Tensor& A,
    const at::Tensor& B,
    const at::Tensor& C,
    const at::Tensor& D,
    const at::Tensor& delta_bias,
    const at::Tensor& taps) {
  const SsmInputs in(kOp, kernel_type(u, u), u, A, B, C, D, delta_bias, taps);
  const auto dim = u.size(3), rank = dt_.size(-1);
  TORCH_CHECK_VALUE(
      rank >= 1,
      kOp,
      ": dt must be [B, H, W, R] with R >= 1, got ",
      dt_.sizes());
  check_shape(kOp, "dt", dt_, {u.size(0), u.size(1), u.size(2), rank});
  check_shape(kOp, "dt_weight", dt_weight, {dim, rank});
  const auto dt = small(dt_, in.u);
  const auto weight = pack_weight(small(dt_weight, in.u));
  SMD2_DISPATCH(in.u.scalar_type(), kOp, [&] {
    using Acc = acc_t<scalar_t>;
    ForwardArgs<scalar_t> args{};
    in.fill(&args);
    args.steps.dt = dt.const_data_ptr<Acc>();
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
  m.impl(kOp, &low_rank_structure_aware_ssm_);
}

}  // namespace
}  // namespace smd2
