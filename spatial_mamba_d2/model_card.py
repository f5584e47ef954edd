"""Model cards for the Hugging Face Hub, from what the model zoo and the model itself know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from huggingface_hub import ModelCardData

from spatial_mamba_d2 import model_zoo
from spatial_mamba_d2.models.timm_backbone import PREFIX
from spatial_mamba_d2.system.tables import markdown_table

PAPER = "https://arxiv.org/abs/2410.15091"
_PIPELINES = {
    "classification": "image-classification",
    "detection": "object-detection",
    "segmentation": "image-segmentation",
}
_TITLES = {
    "classification": "image classifier",
    "detection": "detector",
    "segmentation": "UPerNet for semantic segmentation",
}
_TIMM = """\
import spatial_mamba_d2.models  # registers the models in timm
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True)  # or "hf-hub:REPOSITORY"
```

or

```python
"""
_MAX_NAMES = 20  # of classes, in a card


@dataclass(frozen=True)
class Facts:
    """What a card says about a model.

    Attributes:
        task: a key of ``model_zoo.TASKS``.
        backbone: ``spatial_mamba_tiny`` and so on, ``spatial_mamba`` for other widths and depths,
            or ``timm/NAME``.
        num_parameters: exact number.
        num_classes: outputs of the last layer; 0 for none.
        label_names: names of the classes, if known.
    """

    task: str
    backbone: str
    num_parameters: int
    num_classes: int
    label_names: tuple[str, ...] | None = None

    @property
    def is_spatial_mamba(self) -> bool:
        return not self.backbone.startswith(PREFIX)


def write(
    facts: Facts, zoo_name: str | None = None, scores: Mapping[str, float] | None = None
) -> str:
    """The text of a ``README.md`` for the Hub.

    Args:
        facts: about the model.
        zoo_name: the published model that this is, with the authors' weights.
        scores: ``{name: value}`` of other weights.

    Raises:
        ValueError: no such published model, or one of another task or size.
    """
    entry = model_zoo.get_entry(zoo_name) if zoo_name is not None else None
    if entry and (entry.task, entry.parameters) != (facts.task, facts.num_parameters):
        raise ValueError(
            f"zoo_name must be that of the model, which is for {facts.task} and has "
            f"{facts.num_parameters} parameters, got {zoo_name!r}, which is for {entry.task} and "
            f"has {entry.parameters}"
        )
    ours = ["spatial-mamba", "state-space-model"] if facts.is_spatial_mamba else []
    data = ModelCardData(
        license=model_zoo.LICENSE.lower() if entry else None,  # of other weights: their owner's
        library_name="timm" if facts.task == "classification" else "spatial_mamba_d2",
        pipeline_tag=_PIPELINES[facts.task],
        tags=["vision", *ours],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {entry.name if entry else facts.backbone}",
        _description(facts),
        f"## Scores\n\n{_scores(entry, scores)}",
        f"## Use\n\n{_usage(facts)}",
    ]
    return "\n\n".join(parts) + "\n"


def _description(facts: Facts) -> str:
    same = [
        e for e in map(model_zoo.get_entry, model_zoo.list_models(facts.task))
        if e.parameters == facts.num_parameters
    ]  # fmt: skip
    rows = [
        ("model", f"{_TITLES[facts.task]}, backbone `{facts.backbone}`"),
        ("parameters", f"{facts.num_parameters:,}"),
    ]
    if same:
        height, width = model_zoo.TASKS[facts.task].input_shape[2:]
        flops = f"{same[0].published_gflops:g} G at {height} x {width}, by the authors' formula"
        rows.append(("FLOPs", flops))
    if facts.num_classes:
        names = facts.label_names or ()
        listed = ", ".join(names[:_MAX_NAMES]) + (", ..." if len(names) > _MAX_NAMES else "")
        rows.append(("classes", f"{facts.num_classes}{': ' if names else ''}{listed}"))
    if facts.is_spatial_mamba:
        rows += [("paper", PAPER), ("authors' code", f"{model_zoo.SOURCE} ({model_zoo.LICENSE})")]
    return markdown_table(("", ""), rows)


def _scores(entry: model_zoo.Entry | None, scores: Mapping[str, float] | None) -> str:
    texts = []
    if entry:
        task = model_zoo.TASKS[entry.task]
        table = markdown_table(task.metrics, [tuple(map(str, entry.scores))])
        texts.append(f"Published by the authors: {task.title}, {task.protocol}.\n\n{table}")
    if scores:
        values = tuple(f"{value:.4g}" for value in scores.values())
        texts.append("Of these weights:\n\n" + markdown_table(tuple(scores), [values]))
    return "\n\n".join(texts) or "Not stated."


def _usage(facts: Facts) -> str:
    timm = _TIMM if facts.task == "classification" else ""
    return (
        f"```python\n{timm}from spatial_mamba_d2 import hub\n\n"
        'model = hub.from_pretrained("FOLDER")  # or a repository\n```'
    )
