"""The model card of an export, for the hub of whichever library reads it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import cast

from omegaconf import OmegaConf

from padst_exp.errors import UserError
from padst_exp.report.choices import nearest_option, structure_label
from padst_exp.restore import RestoredRun
from padst_exp.transforms import NoTransform

CARD = """---
library_name: {library}
pipeline_tag: {task}
tags: [sparse, padst]
---
# {architecture}, {structure}, density {density:.4g}

Trained sparse by `padst_exp` (choices below in the words of its command line), {storage}.

```python
{program}
```

| | |
|---|---|
{facts}

| scope | density | weights kept | of |
|---|---|---|---|
{scopes}

{speed}
"""
NOT_MEASURED = (
    "Speed was not measured for this card; `padst_exp.inference.tune` measures it where the model "
    "runs."
)
DENSE = "stored dense, with zeros where there are no weights"
METRICS = ("perplexity", "top1", "top5")


def is_original(restored: RestoredRun) -> bool:
    """Whether the model of a run is what its constructor makes, and no transform of it."""
    return bool(restored.config.transform._target_.endswith(f".{NoTransform.__name__}"))


def require_no_transform(restored: RestoredRun, library: str) -> None:
    """Refuse a run whose model was made another one than `library` has.

    Raises:
        UserError: in one line.
    """
    if not is_original(restored):
        transform = restored.config.transform._target_
        raise UserError(
            f"format: expected packed or dense for a model with transform {transform}, which "
            f"{library} does not have, got {library}"
        )


def model_card(
    restored: RestoredRun,
    metrics: Mapping[str, float],
    *,
    architecture: str,
    library: str,
    task: str,
    storage: str,
    program: str,
    speed: str | None = None,
) -> str:
    """Its text.

    Args:
        restored: the model, as it is exported.
        metrics: of the checkpoint, by name.
        architecture: as the library calls it.
        library, task: of the hub.
        storage: how weights lie in the file, in words.
        program: that loads it.
        speed: what was measured, and where, in words; None: nothing.
    """
    report = restored.report
    config = cast(dict[str, object], OmegaConf.to_container(restored.config, resolve=True))
    structure = structure_label(config["structure"])
    facts = {
        "structure": structure,
        **{
            group: nearest_option(group, config[group])
            for group in ("permutation", "dst", "dataset")
        },
        "optimizer steps": restored.step,
        **{
            name: f"{value:.4g}"
            for name, value in metrics.items()
            if any(kind in name for kind in METRICS)
        },
    }
    counts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for layer in report.layers:
        # The name of a weight is <layer>.weights.<part>; layers of all blocks are one scope.
        name = ".".join(
            "*" if part.isdecimal() else part
            for part in layer.name.split(".weights.")[0].split(".")
        )
        counts[name][0] += layer.parameters
        counts[name][1] += layer.shape[0] * layer.shape[1]
    scopes = [
        f"| `{name}` | {kept / total:.4g} | {kept:,.0f} | {total:,.0f} |"
        for name, (kept, total) in counts.items()
    ]
    scopes += [
        f"| all {scope} | {report.density(scope):.4g} | | |" for scope in ("layers", "model")
    ]
    return CARD.format(
        library=library,
        task=task,
        architecture=architecture,
        storage=storage,
        program=program,
        speed=speed or NOT_MEASURED,
        structure=structure,
        density=report.density("layers"),
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        scopes="\n".join(scopes),
    )
