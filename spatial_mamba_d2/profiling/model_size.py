"""How large the published models are: parameters, FLOPs in two ways of counting, memory.

The authors' way of counting is described in :mod:`.flops`. The complete count takes in
everything that a model computes in eval mode: each multiply-add of a convolution, matrix product,
scan and fusion is 1, and so is each other arithmetic operation or activation per element.

Only shapes are computed with, so that any machine can do it in seconds.
"""

from __future__ import annotations

import json
import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from spatial_mamba_d2 import model_zoo
from spatial_mamba_d2.profiling.flops import OFFICIAL_COUNTS

CONVENTIONS = """\
FLOPs: one multiply-add is one. *Authors'*: their formula (fvcore, the scan as 7 and the fusion as
27 per channel and token, no element-wise operation or activation); classifiers in train mode,
detectors and segmentors in eval mode. *Complete*: all that is computed in eval mode; the scan is 7
per channel and token (bias, softplus, two products for the input, the decay's product and
exponential, the multiply-add of the recursion), the fusion its 25 distinct taps, the observation 2;
element-wise operations and activations are 1 per element, normalisations 5, a frozen batch norm 2.
Mask R-CNN: 1000 proposals in the box head and 100 of them in the mask head, as mmdetection counts;
RoIAlign, NMS and the pasting of masks are left out in both. UPerNet: the auxiliary head has
parameters, but no part in inference.
Memory: float32, one image. *Kept for backward*: distinct activations that autograd keeps in train
mode, measured at batch size 2 and halved; Mask R-CNN with its 512 sampled proposals, of which 128
in the mask head. *Peak of forward*: activations alive at once without gradients. Parameters, the
losses and the kernels' own working memory come on top."""

# Beginning of a module's name -> row of the tables; the first that fits.
_PARTS = (
    (r".*\bstem\b", "stem"),
    *((rf".*\bstages\.{i}\b", f"stage {i + 1}") for i in range(4)),
    (r".*\boutput_norms\b", "output norms"),
    (r"backbone\b", "feature pyramid"),
    (r"proposal_generator\b", "proposal head"),
    (r"roi_heads\.box_", "box head"),
    (r"roi_heads\.mask_", "mask head"),
    (r"decode_head\b", "decode head"),
    (r"auxiliary_head\b", "auxiliary head"),
    (r"", "classifier head"),
)


def _per_output(output: Tensor, *_: Any) -> int:
    return output.numel()


def _per_input(output: Any, x: Tensor, *_: Any) -> int:
    return x.numel()


# Operators that only rename, move or draw data.
_FREE = frozenset(
    "_unsafe_view as_strided_ bernoulli_ cat clone detach empty new_empty new_zeros permute select "
    "slice split split_with_sizes squeeze stack t transpose unbind upsample_nearest2d view".split()
)
_COMPLETE_COUNTS: dict[str, Callable[..., int]] = {
    **OFFICIAL_COUNTS,
    **dict.fromkeys("add add_ div_ exp gelu mul neg relu relu_ silu".split(), _per_output),
    **dict.fromkeys(("mean", "sum"), _per_input),
    **dict.fromkeys(_FREE, lambda *_: 0),
    "max_pool2d_with_indices": lambda output, *_: output[0].numel(),
    "structure_aware_ssm": lambda output, u, *_: (7 + 25 + 2) * u.numel(),
    "depthwise_conv3x3": lambda output, *_: (9 + 1) * output.numel(),  # sum or SiLU
    "gated_layer_norm": lambda output, *_: (5 + 2) * output.numel(),  # SiLU, product
}


def part_of(name: str) -> str:
    """The row of the tables to which a module or parameter of this name belongs."""
    return next(part for pattern, part in _PARTS if re.match(pattern, name))


class _Position:
    """Which module of a model is at work."""

    def __init__(self, model: nn.Module):
        self._names = [""]
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name))
            module.register_forward_hook(self._leave)

    def _enter(self, name: str, *_: Any) -> None:
        self._names.append(name)

    def _leave(self, *_: Any) -> None:
        self._names.pop()

    @property
    def part(self) -> str:
        return part_of(self._names[-1])


def _own_storages(model: nn.Module) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in (*model.parameters(), *model.buffers())]


Counts = dict[tuple[str, str], list[int]]  # (part, operator) -> calls, FLOPs


class _Layout(TorchDispatchMode):
    """Convolutions of channels-last tensors give such, as on CPUs and GPUs, on ``meta`` too.

    There PyTorch forgets the layout of a slice, and the layers that follow would make copies.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and output.is_meta:
            if args[0].stride(1) == 1:
                return torch.empty_like(output, memory_format=torch.channels_last)
        return output


class _Recorder(_Layout):
    """Counts operators, and follows the memory of what they return."""

    def __init__(self, model: nn.Module, rules: dict[str, Callable[..., int]], complete: bool):
        super().__init__()
        self.position, self.rules, self.complete = _Position(model), rules, complete
        self.counts: Counts = defaultdict(lambda: [0, 0])
        self.live_bytes = self.peak_bytes = 0
        self._storages = WeakIdKeyDictionary()
        for storage in _own_storages(model):
            self._storages[storage] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__
        if self.complete and name not in self.rules:
            raise NotImplementedError(f"no rule counts the operator {name}")
        if name in self.rules:
            count = self.counts[self.position.part, name]
            count[0] += 1
            count[1] += self.rules[name](output, *args)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return output

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self._storages:
            return
        size = self._storages[storage] = storage.nbytes()
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live_bytes -= size


def count_operators(
    model: nn.Module, run: Callable[[], Any], *, complete: bool
) -> tuple[Counts, int]:
    """Count what ``run()`` does with ``model`` without gradients, by the complete or official rule.

    Returns:
        ``(part, operator)`` -> calls and FLOPs; the largest memory of activations alive, in bytes.

    Raises:
        NotImplementedError: a complete count met an operator that it has no rule for.
    """
    rules = _COMPLETE_COUNTS if complete else OFFICIAL_COUNTS
    recorder = _Recorder(model, rules, complete)
    with torch.no_grad(), recorder:
        run()
    return dict(recorder.counts), recorder.peak_bytes


def saved_bytes(model: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """Bytes of the distinct tensors that autograd keeps of ``run()`` for backward, by part.

    Parameters and buffers do not count.
    """
    position = _Position(model)
    # Holding on to the storages keeps their identities apart.
    seen = {id(storage): storage for storage in _own_storages(model)}
    found: dict[str, int] = defaultdict(int)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in seen:
            seen[id(storage)] = storage
            found[position.part] += storage.nbytes()
        return tensor

    with torch.enable_grad(), _Layout(), saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return dict(found)


@dataclass
class Size:
    """A row of the tables: a part of a model, an operator, or the whole.

    Attributes:
        parameters: their number; None for an operator.
        calls: of an operator.
        official_gflops, complete_gflops: see :data:`CONVENTIONS`.
        saved_mib: activations kept for backward, for each image; None for an operator.
    """

    parameters: int | None = None
    calls: int = 0
    official_gflops: float = 0.0
    complete_gflops: float = 0.0
    saved_mib: float | None = None


@dataclass
class Analysis:
    """What :func:`analyze` found, beside what was published.

    Attributes:
        name: see :func:`~.model_zoo.list_models`.
        input_shape: ``[B, 3, H, W]`` of the FLOPs and the peak.
        total: of the whole model.
        peak_mib: of a forward pass without gradients.
        parts, operators: by name.
    """

    name: str
    input_shape: tuple[int, ...]
    published_parameters_m: int
    published_gflops: float
    total: Size
    peak_mib: float
    parts: dict[str, Size]
    operators: dict[str, Size]


def analyze(name: str, input_px: tuple[int, int] | None = None) -> Analysis:
    """Count a published model.

    Args:
        name: see :func:`~.model_zoo.list_models`.
        input_px: height and width; by default those of the published FLOPs.

    Raises:
        ValueError: no such model, or an input without pixels.
        ImportError: Detectron2, which detectors need, is not installed.
    """
    entry = model_zoo.get_entry(name)
    shape = model_zoo.TASKS[entry.task].input_shape
    if input_px is not None:
        if min(input_px) < 1:
            raise ValueError(f"input_px must be at least 1 x 1, got {input_px}")
        shape = (*shape[:2], *input_px)
    classifier = entry.task == "classification"

    official, _ = count_operators(*_prepare(name, shape, train=classifier), complete=False)
    complete, peak_bytes = count_operators(*_prepare(name, shape), complete=True)
    model, run = _prepare(name, (2, *shape[1:]), train=True)
    saved = saved_bytes(model, run)

    rows: dict[str, Size] = {part: Size(parameters=0, saved_mib=0.0) for _, part in _PARTS}
    operators: dict[str, Size] = defaultdict(Size)
    for parameter_name, parameter in model.named_parameters():
        row = rows[part_of(parameter_name)]
        row.parameters = (row.parameters or 0) + parameter.numel()
    for part, size in saved.items():
        rows[part].saved_mib = size / 2 / 2**20
    for (part, operator), (_, flops) in official.items():
        rows[part].official_gflops += flops / 1e9
        operators[operator].official_gflops += flops / 1e9
    for (part, operator), (calls, flops) in complete.items():
        rows[part].calls += calls
        rows[part].complete_gflops += flops / 1e9
        operators[operator].calls += calls
        operators[operator].complete_gflops += flops / 1e9
    parts = {part: row for part, row in rows.items() if row.parameters}
    return Analysis(
        name,
        shape,
        entry.published_parameters_m,
        entry.published_gflops,
        _total(parts.values()),
        peak_bytes / 2**20,
        parts,
        {name: row for name, row in operators.items() if name not in _FREE},
    )


def _prepare(
    name: str, shape: Sequence[int], *, train: bool = False
) -> tuple[nn.Module, Callable[[], Any]]:
    """A model that computes with shapes only, and a call of it on images of ``shape``."""
    model = model_zoo.build(name).to("meta").train(train)
    images = torch.empty(tuple(shape), device="meta")
    if model_zoo.ENTRIES[name].task != "detection":
        return model, lambda: model(images)
    from spatial_mamba_d2.profiling.detector_layers import run_parts

    sampled = {"proposals": 512, "detections": 128} if train else {}
    return model, lambda: run_parts(model, images, **sampled)


def _total(rows: Iterable[Size]) -> Size:
    rows = list(rows)
    return Size(
        sum(row.parameters or 0 for row in rows),
        sum(row.calls for row in rows),
        sum(row.official_gflops for row in rows),
        sum(row.complete_gflops for row in rows),
        sum(row.saved_mib or 0.0 for row in rows),
    )


def markdown_report(analyses: Sequence[Analysis]) -> str:
    """Tables: all models beside the published figures, then each by part and by operator."""
    lines = [*_summary(analyses), "", *CONVENTIONS.splitlines()]
    for analysis in analyses:
        lines += ["", f"## {analysis.name}", "", *_parts(analysis), "", *_operators(analysis)]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{' --- |' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _summary(analyses: Sequence[Analysis]) -> Iterator[str]:
    header = ["model", "input", "parameters", "published", "FLOPs, authors' way", "published"]
    header += ["difference", "FLOPs, complete", "kept for backward", "peak of forward"]
    yield from _table(
        header,
        (
            (
                f"`{a.name}`",
                " x ".join(map(str, a.input_shape[2:])),
                f"{a.total.parameters:,}",
                f"{a.published_parameters_m} M",
                f"{a.total.official_gflops:.2f} G",
                f"{a.published_gflops:g} G",
                f"{a.total.official_gflops / a.published_gflops - 1:+.2%}",
                f"{a.total.complete_gflops:.2f} G",
                f"{a.total.saved_mib:.0f} MiB",
                f"{a.peak_mib:.0f} MiB",
            )
            for a in analyses
        ),
    )


def _parts(analysis: Analysis) -> Iterator[str]:
    header = ["part", "parameters", "GFLOPs, authors' way", "GFLOPs, complete", "MiB for backward"]
    rows = {**analysis.parts, "**all**": analysis.total}
    yield from _table(
        header,
        (
            (
                part,
                f"{row.parameters:,}",
                f"{row.official_gflops:.3f}",
                f"{row.complete_gflops:.3f}",
                f"{row.saved_mib:.1f}",
            )
            for part, row in rows.items()
        ),
    )


def _operators(analysis: Analysis) -> Iterator[str]:
    rows = sorted(analysis.operators.items(), key=lambda item: -item[1].complete_gflops)
    yield from _table(
        ["operator", "calls", "GFLOPs, authors' way", "GFLOPs, complete"],
        (
            (
                f"`{name}`",
                str(row.calls),
                f"{row.official_gflops:.3f}",
                f"{row.complete_gflops:.3f}",
            )
            for name, row in rows
        ),
    )


def write_json(analyses: Sequence[Analysis], path: Path) -> None:
    """Write all numbers, with the conventions behind them."""
    content = {"conventions": CONVENTIONS, "models": [asdict(analysis) for analysis in analyses]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
