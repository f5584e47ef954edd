"""Less memory in training for little time: backward computes cheap activations again.

A layer whose output is cheap calls its function through :func:`recompute`. Inside a forward method
decorated with :func:`recomputes`, autograd then keeps a recipe instead of the output: the function
and its inputs, each of which is kept for other reasons or has a recipe itself. Forward computes
everything once, by calling modules; backward follows the recipes and calls no module, so that
forward hooks fire once, and weights that were replaced for the forward pass alone, as
``torch.func.functional_call`` does, are the ones that backward uses.

The mechanism is a pair of saved-tensor hooks. PyTorch applies the innermost pair only, so whatever
is really kept passes through the hooks around ours as well: ``save_on_cpu`` and
``torch.utils.checkpoint`` work. Plain computation takes over where such hooks are unavailable: when
compiling or tracing, under ``torch.func``, and before PyTorch 2.8, where the hooks around ours
cannot be found.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]  # pack, unpack


class _State(threading.local):
    enabled = True
    recorder: _Recorder | None = None


_state = _State()


def recompute(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``function(*inputs)``; inside :func:`recomputes`, backward computes it again when needed.

    Args:
        function: without side effects or random numbers. Tensors that it reads, weights included,
            are among ``inputs``.
    """
    if torch.compiler.is_compiling() or _state.recorder is None:
        return function(*inputs)
    return _state.recorder.call(function, inputs)


def recomputes(forward: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorator: autograd keeps no output of :func:`recompute` that is saved within ``forward``."""

    @wraps(forward)
    def recorded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if torch.compiler.is_compiling() or not _can_record():
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


def cast_for_autocast(x: Tensor | None) -> Tensor | None:
    """An operand of a matrix product in the dtype that autocast would convert it to.

    Autocast's own conversion is saved by the product, while backward computes this one again.
    """
    if torch.compiler.is_compiling() or _state.recorder is None or x is None:
        return x
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    dtype = torch.get_autocast_dtype(device)
    return x if x.dtype in (dtype, torch.float64) else recompute(Tensor.to, x, dtype)


# All that the mechanism needs of PyTorch beyond its public interface.


def _can_record() -> bool:
    return (
        _state.enabled
        and torch.is_grad_enabled()
        and hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
        and torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is None
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
    )


def _current_hooks() -> Hooks | None:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _backward_pass() -> int:
    """A number for each backward pass; -1 outside of them."""
    return torch._C._current_graph_task_id()


class _Value:
    """A tensor that backward gets at most once per use; held from the first to the last of them."""

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
    """A tensor itself, or what the surrounding hooks make of it."""

    def __init__(self, tensor: Tensor, hooks: Hooks | None):
        super().__init__()
        self._version = tensor._version
        self._pack, self._unpack = hooks or (None, None)
        self._kept: Any = tensor if hooks else tensor.detach()

    def use(self) -> None:
        if self._pack:
            with torch.no_grad():
                self._kept, self._pack = self._pack(self._kept), None
        super().use()

    def _compute(self) -> Tensor:
        if self._unpack:
            return self._unpack(self._kept)
        if self._kept._version != self._version:
            raise RuntimeError(
                "a tensor needed for gradient computation has been modified by an inplace "
                f"operation: {list(self._kept.shape)} is at version {self._kept._version}, "
                f"expected version {self._version}"
            )
        return self._kept


class _Recomputed(_Value):
    """The output of a function, as a recipe."""

    def __init__(self, function: Callable[..., Tensor], inputs: list[Any], output: Tensor):
        super().__init__()
        self._function, self._inputs = function, inputs
        self.version, self.dtype = output._version, output.dtype
        self.offset, self.layout = output.storage_offset(), (output.size(), output.stride())
        self._autocast = _autocast_state(output.device.type)

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
            if output.stride() != self.layout[1]:  # surrounding hooks may give dense inputs
                output = output.new_empty_strided(*self.layout).copy_(output)
        return output


def _autocast_state(device: str) -> Callable[[], AbstractContextManager]:
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    enabled = torch.is_autocast_enabled(device)
    return partial(torch.autocast, device, torch.get_autocast_dtype(device), enabled)


class _Reference:
    """What autograd or a recipe has instead of a tensor: a value, or a view of its memory."""

    __slots__ = ("_value", "_view")
    _value: _Value

    def set(self, value: _Value, view: tuple[Any, ...] | None) -> _Reference:
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
    """Knows, while a forward method runs, which tensors have a recipe."""

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
        # The graph holds on to this object, by the method that is its hook.
        self.__dict__.clear()

    def call(self, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Tensor:
        if self._saved is not None:  # within another call, whose output is all that counts
            return function(*inputs)
        self._saved = []
        try:
            output = function(*inputs)
        finally:
            saved, self._saved = self._saved, None
        if _is_plain(output) and output.requires_grad:
            self._remember(function, inputs, output)
        # Only now, because a function may save its own output.
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
        """Make ``reference`` stand for ``tensor``."""
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
    """Whether ``x`` is a tensor that has memory of its own kind: strided, and of no subclass."""
    return type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided
