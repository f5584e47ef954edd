"""Tables and a JSON file of the models' sizes; :mod:`.model_size` measures them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from spatial_mamba_d2.profiling.model_size import Analysis, analyze
from spatial_mamba_d2.system.tables import markdown_table

CONVENTIONS = """\
FLOPs: one multiply-add counts as one. *Authors'*: their formula (fvcore's counts, 7 per channel and
token for the scan and 27 for the fusion, no element-wise operations or activations); classifiers in
train mode, detectors and segmentors in eval mode. *Complete*: everything that is computed in eval
mode; the scan is 7 per channel and token (bias, softplus, two products for the input, the decay's
product and exponential, the multiply-add of the recursion), the fusion 25, one for each distinct
tap, and the observation 2; element-wise operations and activations are 1 per element,
normalisations 5, a frozen batch norm 2. Mask R-CNN: 1000 proposals in the box head and 100 of them
in the heads of masks and keypoints, as mmdetection counts; both counts leave out RoIAlign, NMS and
the pasting of masks. UPerNet: the auxiliary head has parameters, but takes no part in inference.
Memory: float32, one image. *Kept for backward*: the distinct activations that autograd keeps in
train mode, measured at batch size 2 and halved; Mask R-CNN with its 512 sampled proposals, of which
128 enter the mask head. *Peak of forward*: activations alive at once without gradients. Parameters,
losses and the kernels' own working memory come on top."""


def report(names: Sequence[str], input_px: tuple[int, int] | None, json_file: Path | None) -> None:
    """Analyse models, print the tables, and write the numbers to ``json_file`` if there is one.

    Args:
        names, input_px: see :func:`~.model_size.analyze`.
    """
    analyses = [analyze(name, input_px) for name in names]
    if json_file:
        write_json(analyses, json_file)
    print(markdown_report(analyses))


def markdown_report(analyses: Sequence[Analysis]) -> str:
    """Tables: all models next to the published figures, then each by part and by operator."""
    blocks = [f"{_summary(analyses)}\n\n{CONVENTIONS}"]
    for analysis in analyses:
        blocks += [f"## {analysis.name}", _parts(analysis), _operators(analysis)]
    return "\n\n".join(blocks)


def _summary(analyses: Sequence[Analysis]) -> str:
    header = ["model", "input", "parameters", "published", "FLOPs, authors' formula", "published"]
    header += ["difference", "FLOPs, complete", "kept for backward", "peak of forward"]
    rows = [
        (
            f"`{a.name}`",
            " x ".join(map(str, a.input_shape[2:])),
            f"{a.total.parameters:,}",
            "" if a.published_parameters_m is None else f"{a.published_parameters_m} M",
            f"{a.total.official_gflops:.2f} G",
            *_published_gflops(a),
            f"{a.total.complete_gflops:.2f} G",
            f"{a.total.saved_mib:.0f} MiB",
            f"{a.peak_mib:.0f} MiB",
        )
        for a in analyses
    ]
    return markdown_table(header, rows)


def _published_gflops(analysis: Analysis) -> tuple[str, str]:
    """The figure, and how far ours is from it."""
    if analysis.published_gflops is None:
        return "", ""
    difference = analysis.total.official_gflops / analysis.published_gflops - 1
    return f"{analysis.published_gflops:g} G", f"{difference:+.2%}"


def _parts(analysis: Analysis) -> str:
    header = ["part", "parameters", "GFLOPs, authors' formula", "GFLOPs, complete"]
    rows = [
        (
            part,
            f"{row.parameters:,}",
            f"{row.official_gflops:.3f}",
            f"{row.complete_gflops:.3f}",
            f"{row.saved_mib:.1f}",
        )
        for part, row in {**analysis.parts, "**all**": analysis.total}.items()
    ]
    return markdown_table([*header, "MiB for backward"], rows)


def _operators(analysis: Analysis) -> str:
    by_flops = sorted(analysis.operators.items(), key=lambda item: -item[1].complete_gflops)
    return markdown_table(
        ["operator", "calls", "GFLOPs, authors' formula", "GFLOPs, complete"],
        [
            (
                f"`{name}`",
                str(row.calls),
                f"{row.official_gflops:.3f}",
                f"{row.complete_gflops:.3f}",
            )
            for name, row in by_flops
        ],
    )


def write_json(analyses: Sequence[Analysis], path: Path) -> None:
    """Write all numbers, and the conventions by which they were counted."""
    content = {"conventions": CONVENTIONS, "models": [asdict(analysis) for analysis in analyses]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
