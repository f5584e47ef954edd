// The operators' schemas, one per line, for schemas.cpp and _extension.py.
// `<name>_backward` returns the gradients of all tensors of `<name>`, in order.
R"(
add_bias_(Tensor(a!) x, Tensor bias, Tensor? residual, bool relu) -> ()
depthwise_conv3x3(Tensor x, Tensor weight, Tensor bias, bool residual) -> Tensor
depthwise_conv3x3_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor bias, bool residual) -> (Tensor, Tensor, Tensor)
depthwise_conv3x3_gradients_(Tensor(a!) grad_x, Tensor grad_output, Tensor x, Tensor weight, Tensor bias, bool residual) -> (Tensor, Tensor)
depthwise_conv3x3_layer_norm(Tensor x, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, float eps) -> (Tensor, Tensor)
depthwise_conv3x3_stride2(Tensor x, Tensor weight, Tensor bias) -> Tensor
depthwise_conv3x3_stride2_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor, Tensor)
gated_layer_norm(Tensor y, Tensor z, Tensor weight, Tensor bias, float eps) -> Tensor
gated_layer_norm_backward(Tensor grad_output, Tensor y, Tensor z, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)
gated_layer_norm_gradients_(Tensor(a!) grad_z, Tensor grad_output, Tensor y, Tensor z, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)
gelu_gradients(Tensor grad_output, Tensor x) -> (Tensor, Tensor, Tensor)
layer_norm_gradients(Tensor grad_output, Tensor residual, Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)
quantize_uint8(Tensor x, float scale, int zero_point) -> Tensor
roi_align(Tensor x, Tensor boxes, int height, int width, float scale, int sampling_ratio, bool aligned) -> Tensor
roi_align_backward(Tensor grad_output, Tensor x, Tensor boxes, int height, int width, float scale, int sampling_ratio, bool aligned) -> (Tensor, Tensor)
selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor delta_bias) -> Tensor
selective_scan_backward(Tensor grad_output, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor delta_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)
state_fusion(Tensor h, Tensor taps) -> Tensor
state_fusion_backward(Tensor grad_output, Tensor h, Tensor taps) -> (Tensor, Tensor)
structure_aware_ssm(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor delta_bias, Tensor taps) -> Tensor
structure_aware_ssm_backward(Tensor grad_output, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor delta_bias, Tensor taps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)
structure_aware_ssm_from_dt(Tensor u, Tensor dt, Tensor dt_weight, Tensor A, Tensor B, Tensor C, Tensor D, Tensor delta_bias, Tensor taps) -> Tensor
structure_aware_ssm_from_dt_backward(Tensor grad_output, Tensor u, Tensor dt, Tensor dt_weight, Tensor A, Tensor B, Tensor C, Tensor D, Tensor delta_bias, Tensor taps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)
structure_aware_ssm_from_dt_(Tensor(a!) u, Tensor dt, Tensor dt_weight, Tensor A, Tensor B, Tensor C, Tensor D, Tensor delta_bias, Tensor taps) -> ()
winograd_conv3x3(Tensor x, Tensor weight, Tensor bias, bool relu) -> Tensor
)"
