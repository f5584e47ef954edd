"""Less memory in training for little time: backward computes cheap activations again.

A layer whose output is cheap calls its function through :func:`recompute`. Inside a forward method
decorated with :func:`keeps_recipes`, autograd then keeps a recipe instead of the output: the
function and its inputs, which are kept for other reasons or have recipes themselves. Forward calls
every module and computes everything once. Backward follows the recipes and calls no module, so that
forward hooks fire once, and it uses the weights of the forward pass even if they were replaced for
that pass alone, as by ``torch.func.functional_call``.

The mechanism is a pair of saved-tensor hooks. PyTorch applies only the innermost pair, so ours pass
what is really kept to the pair around them; this makes ``save_on_cpu`` and
``torch.utils.checkpoint`` work as usual. ``torch.compile`` traces no such hooks: there the forward
method is a selective checkpoint. Everything is computed plainly in exported and traced graphs,
under ``torch.func``, and for forward-mode derivatives, which hooks would lose.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import Proxy
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.weak import WeakIdKeyDictionary

from spatial_mamba_d2.ops.cuda.kernels import run_on

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]  # pack, unpack
# products -> position of the weight among their arguments
_PRODUCTS = {
    torch.ops.aten.convolution.default: 1,  # weight is [O, I / groups, h, w]
    torch.ops.aten.mm.default: 1,  # weight is [I, O]
    torch.ops.aten.addmm.default: 2,
}


class _State(threading.local):
    enabled = True
    recorder: _Recorder | None = None


_state = _State()


def recompute(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``function(*inputs)``, which backward computes again if this is inside :func:`keeps_recipes`.

    Args:
        function: a function without side effects and random numbers. All tensors that it reads,
            including weights, are among ``inputs``.
    """
    if torch.compiler.is_compiling() or _state.recorder is None:
        return function(*inputs)
    return _state.recorder.call(function, inputs)


def keeps_recipes(forward: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorator: autograd keeps recipes for what ``forward`` computes through :func:`recompute`."""

    @wraps(forward)
    def recorded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if torch.compiler.is_compiling():
            return _compiled(forward, args, kwargs)
        if not _can_record() or any(isinstance(x, Proxy) for x in args):
            return forward(*args, **kwargs)
        with _Recorder():
            return forward(*args, **kwargs)

    return recorded


@contextmanager
def recomputation(enabled: bool) -> Iterator[None]:
    """Context in which this thread's forward passes use recomputation or, if disabled, do not.

    Training without it is faster and takes more memory.
    """
    previous, _state.enabled = _state.enabled, enabled
    try:
        yield
    finally:
        _state.enabled = previous


def is_recording(x: Tensor) -> bool:
    """Whether autograd keeps recipes at present, and would for ``x``."""
    return not torch.compiler.is_compiling() and _state.recorder is not None and _is_plain(x)


def cast_for_autocast(*operands: Tensor | None) -> tuple[Any, ...]:
    """Convert the operands of a matrix product as autocast would, but through :func:`recompute`.

    Autograd would keep what autocast itself converts.
    """
    if torch.compiler.is_compiling() or _state.recorder is None:
        return operands
    return tuple(None if x is None else _cast_for_autocast(x) for x in operands)


def as_under_autocast(*operands: Tensor) -> tuple[Tensor, ...]:
    """The same of a product inside an operator, which autocast does not see: always converted."""
    return tuple(map(_cast_for_autocast, operands))


def _cast_for_autocast(x: Tensor) -> Tensor:
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    dtype = torch.get_autocast_dtype(device)
    return x if x.dtype in (dtype, torch.float64) else recompute(Tensor.to, x, dtype)


def _compiled(forward: Callable[..., Result], args: Any, kwargs: Any) -> Result:
    """``forward`` in a graph that is being compiled, which keeps about what eager mode keeps."""
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return forward(*args, **kwargs)
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=_selective_checkpoint_contexts,
        **kwargs,
    )


def _selective_checkpoint_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_checkpoint_policy)


def _checkpoint_policy(
    context: Any, operator: torch._ops.OpOverload, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    """Keep random numbers, on a GPU the output of the SSM, and all but cheap products.

    Cheap for the size of the output are depthwise convolutions and products whose output is at
    least 8 times as wide as the input: ``dt_proj`` and the expansion in front of a downsampling.
    """
    if operator in _PRODUCTS:
        weight = args[_PRODUCTS[operator]]
        outputs, inputs = weight.shape[:2] if weight.dim() == 4 else weight.shape[::-1]
        keep = outputs < 8 * inputs
    else:
        ssms = torch.ops.spatial_mamba
        is_ssm = operator in (
            ssms.structure_aware_ssm.default,
            ssms.structure_aware_ssm_from_dt.default,
        )
        is_slow = is_ssm and run_on(args[0])
        keep = is_slow or torch.Tag.nondeterministic_seeded in operator.tags
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


# The next four functions are all that use private parts of PyTorch.


def _can_record() -> bool:
    return (
        _state.enabled
        and torch.is_grad_enabled()
        and hooks_are_possible()
        and not torch.jit.is_tracing()
    )


def hooks_are_possible() -> bool:
    """Whether saved-tensor hooks, and checkpointing, may be used and lose no derivative."""
    if torch.compiler.is_compiling():
        return True
    return (
        torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is None
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _current_hooks() -> Hooks | None:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _backward_pass() -> int:
    """Number of the backward pass that is running; -1 if none is."""
    return torch._C._current_graph_task_id()


class _Value:
    """Tensor that a backward pass gets once per use, and that is held until the last of them."""

    def __init__(self) -> None:
        self._num_uses = self._num_left = 0
        self._pass: int | None = None
        self._held: Tensor | None = None

    def use(self) -> None:
        self._num_uses += 1

    def get(self) -> Tensor:
        current = _backward_pass()
        if self._pass != current:
            self._pass, self._num_left, self._held = current, self._num_uses, None
        tensor = self._held
        if tensor is None:
            tensor = self._compute()
        self._num_left -= 1
        self._held = tensor if self._num_left > 0 else None
        return tensor

    def _compute(self) -> Tensor:
        raise NotImplementedError


class _Kept(_Value):
    """Tensor that is kept as it is, or as the surrounding hooks pack it."""

    def __init__(self, tensor: Tensor, hooks: Hooks | None):
        super().__init__()
        owner = tensor if tensor._base is None else tensor._base
        if isinstance(owner, nn.Parameter):  # as for _KeptParameter
            hooks = None
        self._version = tensor._version
        self._pack: Callable[[Tensor], Any] | None = hooks and hooks[0]
        self._unpack: Callable[[Any], Tensor] | None = hooks and hooks[1]
        self._kept: Any = tensor if hooks else tensor.detach()

    def use(self) -> None:
        if self._pack:
            with torch.no_grad():
                self._kept, self._pack = self._pack(self._kept), None
        super().use()

    def _compute(self) -> Tensor:
        if self._unpack:
            return self._unpack(self._kept)
        return _unchanged(self._kept, self._version)


class _KeptParameter:
    """A parameter, which no hooks pack: it is in memory anyway.

    Checkpointing would compute everything up to it again. Most saved tensors are parameters.
    """

    __slots__ = ("_parameter", "_version")

    def __init__(self, parameter: nn.Parameter):
        # Not the parameter, whose ``data`` may be replaced
        self._parameter, self._version = parameter.detach(), parameter._version

    def use(self) -> None:
        pass

    def get(self) -> Tensor:
        return _unchanged(self._parameter, self._version)


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    if tensor._version != version:
        raise RuntimeError(
            "a tensor needed for gradient computation has been modified by an inplace "
            f"operation: {list(tensor.shape)} is at version {tensor._version}, "
            f"expected version {version}"
        )
    return tensor


class _Recomputed(_Value):
    """Output of a function, kept as a recipe."""

    def __init__(self, function: Callable[..., Tensor], inputs: list[Any], output: Tensor):
        super().__init__()
        self._function, self._inputs = function, inputs
        self.version, self.dtype = output._version, output.dtype
        self.offset, self.layout = output.storage_offset(), (output.size(), output.stride())
        self._autocast = autocast_state(output.device.type)

    def use(self) -> None:
        if not self._num_uses:
            for x in self._inputs:
                if isinstance(x, _Reference):
                    x.use()
        super().use()

    def _compute(self) -> Tensor:
        with torch.no_grad(), self._autocast():
            inputs = (x.get() if isinstance(x, _Reference) else x for x in self._inputs)
            output = self._function(*inputs)
            if output.stride() != self.layout[1]:  # hooks may return inputs of other strides
                output = output.new_empty_strided(*self.layout).copy_(output)
        return output


def without_autocast(device: str) -> AbstractContextManager:
    """Context in which autocast is off, for devices that may have none."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def autocast_state(device: str) -> Callable[[], AbstractContextManager]:
    """What enters the present state of autocast again."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    enabled = torch.is_autocast_enabled(device)
    return partial(torch.autocast, device, torch.get_autocast_dtype(device), enabled)


class _Reference:
    """What autograd or a recipe keeps instead of a tensor: a value, or a view of its memory."""

    __slots__ = ("_value", "_view")
    _value: _Value | _KeptParameter

    def set(self, value: _Value | _KeptParameter, view: tuple[Any, ...] | None) -> _Reference:
        self._value, self._view = value, view
        return self

    def use(self) -> None:
        self._value.use()

    def get(self) -> Tensor:
        tensor = self._value.get()
        if self._view is None:
            return tensor
        size, stride, offset = self._view
        return tensor.as_strided(size, stride, tensor.storage_offset() + offset)


class _Recorder:
    """Saved-tensor hooks for one call of a forward method, and the recipes of its tensors."""

    def __init__(self) -> None:
        self._hooks = _current_hooks()
        self._recomputed = WeakIdKeyDictionary()  # storage -> _Recomputed
        self._kept = WeakIdKeyDictionary()  # storage -> {version and layout: _Kept}
        self._saved: list[tuple[_Reference, Tensor]] | None = None

    def __enter__(self) -> None:
        self._previous, _state.recorder = _state.recorder, self
        self._context = saved_tensors_hooks(self._pack, _Reference.get)
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
        _state.recorder = self._previous
        # The graph holds a reference to this object, through the method that is its hook.
        self.__dict__.clear()

    def call(self, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Tensor:
        if self._saved is not None:  # nested: the recipe of the outer call covers this one
            return function(*inputs)
        self._saved = []
        try:
            output = function(*inputs)
        finally:
            saved, self._saved = self._saved, None
        if _is_plain(output) and output.requires_grad:
            self._remember(function, inputs, output)
        # Not before the output has its recipe, because functions such as ReLU save their output.
        for reference, tensor in saved:
            self._refer(tensor, reference).use()
        return output

    def _remember(self, function: Callable[..., Tensor], inputs: Any, output: Tensor) -> None:
        storage = output.untyped_storage()
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        shares_memory = any(_is_plain(x) and x.untyped_storage() is storage for x in tensors)
        if shares_memory or storage.nbytes() != output.nbytes:
            return
        inputs = [self._refer(x, _Reference()) if isinstance(x, Tensor) else x for x in inputs]
        self._recomputed[storage] = _Recomputed(function, inputs, output)

    def _pack(self, tensor: Tensor) -> _Reference:
        reference = _Reference()
        if self._saved is None:
            self._refer(tensor, reference).use()
        else:
            self._saved.append((reference, tensor))
        return reference

    def _refer(self, tensor: Tensor, reference: _Reference) -> _Reference:
        """Let ``reference`` point to the recipe of ``tensor`` or, if it has none, to itself."""
        if type(tensor) is nn.Parameter:
            return reference.set(_KeptParameter(tensor), None)
        if not _is_plain(tensor):
            return reference.set(_Kept(tensor, self._hooks), None)
        storage, version = tensor.untyped_storage(), tensor._version
        layout = (tensor.size(), tensor.stride())
        recomputed = self._recomputed.get(storage)
        if recomputed and (recomputed.version, recomputed.dtype) == (version, tensor.dtype):
            offset = tensor.storage_offset() - recomputed.offset
            is_all = layout == recomputed.layout
            return reference.set(recomputed, None if is_all else (*layout, offset))
        kept = self._kept.setdefault(storage, {})
        key = (version, tensor.dtype, tensor.storage_offset(), layout)
        if key not in kept:
            kept[key] = _Kept(tensor, self._hooks)
        return reference.set(kept[key], None)


def _is_plain(x: Any) -> bool:
    """Whether ``x`` is a strided tensor, and of no subclass that may lay out memory otherwise."""
    return type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided
