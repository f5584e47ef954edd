"""Linear layers over the channels of a map, in the way that is fastest on the device.

On CPUs PyTorch uses MKL for linear layers and oneDNN for convolutions. A linear layer over
``Tensor[B, H, W, C]`` is a 1x1 convolution of the same memory, so either can compute it. oneDNN is
twice as fast on AMD's processors with AVX-512; on Intel's it is faster on large maps and slower on
small ones. Which kind of processor this is, a measurement says
(:mod:`spatial_mamba_d2.system.matrix_rates`).

A convolution takes longer to start than a linear layer, and reads the weight once for each image.
So the images of a batch become one where maps are small, and the smallest products are linear
layers everywhere. The limits were measured on one and two threads of an Intel Xeon with AVX-512, by
``--task grid`` of the benchmark.
"""

from __future__ import annotations

import copy

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from spatial_mamba_d2.models.recompute import cast_for_autocast, recompute
from spatial_mamba_d2.system.matrix_rates import linear_layers_keep_up

_ONEDNN_DTYPES = (torch.float32, torch.bfloat16) if torch.backends.mkldnn.is_available() else ()
#: Multiplications up to which a linear layer in float32 is one.
LINEAR_PRODUCTS = 2**20
#: Tokens up to which a linear layer in bfloat16 is one: oneDNN computes both.
LINEAR_TOKENS = 1024
#: The same in float32, where linear layers keep up with convolutions. On a single thread PyTorch
#: hands 1x1 convolutions to MKL as well, and takes longer around it.
LINEAR_TOKENS_FLOAT32 = 4096
#: Outputs below which a layer is linear on maps of any size where linear layers keep up, which they
#: do in bfloat16: oneDNN's convolutions compute 16 outputs at once.
CONVOLVED_OUTPUTS = 16
#: Tokens per image up to which the images of a batch become one.
MERGED_TOKENS = 1024


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` of a map: ``Tensor[B, H, W, I]`` -> ``Tensor[B, H, W, O]``.

    Args:
        weight: ``Tensor[O, I]``.
        bias: ``Tensor[O]``.
    """
    if torch.jit.is_scripting():
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling() and _has_choice(x, weight):  # shapes may be unknown
        return _convolved(x, weight, bias)
    if not _has_choice(x, weight) or _is_fastest_as_linear(x, weight):
        return F.linear(x, weight, bias)
    if not _is_fastest_merged(x):
        return _convolved(x, weight, bias)
    return _convolved(_merged(x), weight, bias).unflatten(1, x.shape[:2]).squeeze(0)


def pointwise_grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x of :func:`pointwise`, from that of its output, in the same dtype."""
    if not _has_choice(grad, weight) or _is_fastest_as_linear(grad, weight):
        return grad @ weight
    grads = _merged(grad) if _is_fastest_merged(grad) else grad
    x = grad.new_empty(*grads.shape[:3], weight.shape[1])  # its values are not read
    grad_x, _ = _convolution_gradients(grads, x, weight, of_input=True)
    return grad_x.reshape(*grad.shape[:3], -1)


def pointwise_grad_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The same of the weight, ``Tensor[O, I]``. Only the shape of ``weight`` matters."""
    weight = weight.to(x.dtype)
    if not _has_choice(x, weight) or _is_fastest_as_linear(x, weight):
        return grad.flatten(0, 2).T @ x.flatten(0, 2)
    if _is_fastest_merged(x):
        grad, x = _merged(grad), _merged(x)
    return _convolution_gradients(grad, x, weight, of_input=False)[1].flatten(1)


def _convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, of_input: bool
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2),
        x.permute(0, 3, 1, 2),
        weight[:, :, None, None],
        None,
        stride=[1, 1],
        padding=[0, 0],
        dilation=[1, 1],
        transposed=False,
        output_padding=[0, 0],
        groups=1,
        output_mask=[of_input, not of_input, False],
    )
    return grad_x.permute(0, 2, 3, 1) if of_input else grad_x, grad_weight


def _has_choice(x: Tensor, weight: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in _ONEDNN_DTYPES and not _is_composed(weight)


def _is_fastest_merged(x: Tensor) -> bool:
    """Whether the images of a batch are convolved as one."""
    return len(x) > 1 and x.shape[1:3].numel() <= MERGED_TOKENS


def _merged(x: Tensor) -> Tensor:
    return x.flatten(0, 1)[None]


def _is_fastest_as_linear(x: Tensor, weight: Tensor) -> bool:
    num_tokens = x.shape[:3].numel()
    is_narrow = len(weight) < CONVOLVED_OUTPUTS
    if weight.dtype != torch.float32:
        return is_narrow or num_tokens <= LINEAR_TOKENS
    if num_tokens * weight.numel() <= LINEAR_PRODUCTS:
        return True
    if not linear_layers_keep_up():
        return False
    is_small = num_tokens <= LINEAR_TOKENS_FLOAT32
    return is_narrow or is_small or torch.get_num_threads() == 1


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = F.conv2d(x.permute(0, 3, 1, 2), weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1)


def _is_composed(x: Tensor) -> bool:
    """Whether ``x`` consists of other tensors: quantised or sharded, with few operators."""
    return hasattr(x, "__tensor_flatten__")


torch.fx.wrap("pointwise")  # which operator it calls depends on what tracing does not know


class Pointwise(nn.Linear):
    """``torch.nn.Linear`` for maps: ``Tensor[B, H, W, I]`` -> ``Tensor[B, H, W, O]``.

    Args:
        recompute_output: compute the output again in backward instead of keeping it, for an output
            that is much wider than the input.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, recompute_output: bool = False
    ):
        super().__init__(in_features, out_features, bias)
        self.recompute_output = recompute_output

    def forward(self, x: Tensor) -> Tensor:
        operands = cast_for_autocast(x, self.weight, self.bias)
        return recompute(pointwise, *operands) if self.recompute_output else pointwise(*operands)


def with_plain_linear_layers(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose linear layers are ``torch.nn.Linear`` and no subclass of it.

    It computes the same, slower on CPUs. ``torch.ao.quantization.quantize_dynamic`` and FLOP
    counters such as thop choose layers by their exact type, and pass over subclasses in silence.
    """
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is Pointwise:
                setattr(parent, name, plain_linear(layer))
    return model


def plain_linear(layer: Pointwise) -> nn.Linear:
    """A ``torch.nn.Linear`` with the weights of ``layer``, which computes the same."""
    plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain.train(layer.training)
