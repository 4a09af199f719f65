"""Evaluate a run or an export: `python -m padst_exp.evaluate run=<folder>`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from omegaconf import DictConfig, OmegaConf

from padst_exp.cli import command_line
from padst_exp.config import Device, read_keys
from padst_exp.errors import require, require_installed

if TYPE_CHECKING:  # the command line must answer --help before torch is imported
    from torch import Tensor

    from padst_exp.data.task import Task
    from padst_exp.engine.distributed import World
    from padst_exp.engine.settings import Trainer
    from padst_exp.restore import Restored

IMAGENET = "padst_exp.data.imagenet.Imagenet1k"
VARIANT = "padst_exp.data.imagenet_variants.ImagenetVariant"
PRINTED = {"perplexity": "token_perplexity"}
"""Names of metrics as a reader takes them right, who sees those per word and byte beside them."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSchema:
    """The keys of conf/evaluate.yaml.

    Args:
        run: run directory, as printed at the end of a training; a checkpoint file; an export.
        batch_size: null takes the run's own evaluation batch size.
        device: "auto" takes the GPU where there is one.
        trust: packages other than ours whose constructors the run's config may name.
        changes: of keys of the run that change no weight, as on a command line, which may also
            have them directly: `dataset.root=/where/the/data/are/now`.
        tasks: of lm-evaluation-harness, instead of the validation data.
        include_path: folder with further tasks, YAML files.
        limit: of the documents of each task; null: all.
        variant: of ImageNet, a test set in dataset.root, instead of the validation data.
        labels: real.json for variant=real; null: a copy that is there.
        against: another run, checkpoint or export, to compare sample by sample.
    """

    run: str
    batch_size: int | None
    device: Device
    trust: str | tuple[str, ...]
    changes: tuple[str, ...]
    tasks: tuple[str, ...]
    include_path: str | None
    limit: int | None
    variant: Literal["v2", "a", "r", "real"] | None
    labels: str | None
    against: str | None

    def __post_init__(self) -> None:
        for key in ("batch_size", "limit"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "at least 1")
        folder = self.include_path
        require(folder is None or Path(folder).is_dir(), "include_path", folder, "a folder")
        alone = self.variant is None or not self.tasks
        require(alone, "variant", self.variant, "null beside tasks, which are for language models")
        no_pair = self.against is None or not self.tasks
        require(no_pair, "against", self.against, "null beside tasks")
        known = self.variant == "real" or self.labels is None
        require(known, "labels", self.labels, "null but for variant=real")


@command_line("evaluate", of_run=True)
def main(cfg: DictConfig) -> None:
    """Evaluate the best checkpoint of a run and print its metrics."""
    keys = read_keys(cfg, EvaluateSchema)

    from padst_exp.engine import distributed
    from padst_exp.messages import say

    world = distributed.start(keys.device)
    try:
        if keys.against is not None:
            found, comparison = compare(keys, keys.against, world)
        else:
            found, comparison = [(downstream if keys.tasks else evaluate)(keys, world)], []
    finally:
        world.close()
    if world.main:
        for path, metrics in found:
            say(str(path))
            for name, value in metrics.items():
                say(f"{PRINTED.get(name, name)} {value:.6g}")
        for line in comparison:
            say(line)


def evaluate(keys: EvaluateSchema, world: World) -> tuple[Path, dict[str, float]]:
    """Metrics of the best checkpoint of a run (the last one where none is the best yet).

    Where the run keeps a moving average of its weights, that is what is evaluated. Instead of a
    run it may be a checkpoint file, or the folder of an export, which is tuned for the batches.

    Returns:
        The checkpoint's path (or the export's) and the metrics.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged.
    """
    restored, metrics = _evaluated(keys, world)
    return restored.path, metrics


def compare(
    keys: EvaluateSchema, against: str, world: World
) -> tuple[list[tuple[Path, dict[str, float]]], list[str]]:
    """Evaluate two models on the same samples.

    Returns:
        What `evaluate` does of each, and how they differ, in lines.

    Raises:
        UserError: as `evaluate`; there is more than one process, or the samples are not the same.
    """
    import torch

    from padst_exp.report.statistics import compare_items

    require(world.size == 1, "against", f"{world.size} processes", "one process to compare in")
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    first, metrics = _evaluated(keys, world, ours)
    second, other = _evaluated(replace(keys, run=against), world, theirs)
    same = first.task.describe() == second.task.describe()
    require(same, "against", against, f"a model tested on the same data as {keys.run}")
    both = [(first.path, metrics), (second.path, other)]
    name = first.task.monitor[0]
    items = None
    if ours and theirs and name in other:
        items = compare_items(torch.cat(ours).numpy(), torch.cat(theirs).numpy(), name)
    if items is None:
        return both, [f"{name} is no figure of single samples that could be compared"]
    low, high = items.interval
    lines = [
        f"{name} of the first less that of the second: {items.difference:+.4g}, 95% interval "
        f"{low:+.4g} to {high:+.4g} (bootstrap over {items.n:,} samples, of these two models alone)"
    ]
    if items.only is not None:
        lines.append(
            f"only the first is right on {items.only[0]:,}, only the second on {items.only[1]:,}: "
            f"p = {items.p:.3g} (McNemar, exact)"
        )
    return both, lines


def _evaluated(
    keys: EvaluateSchema, world: World, outcomes: list[Tensor] | None = None
) -> tuple[Restored, dict[str, float]]:
    """The model with its metrics, and `outcomes` of its samples."""
    from padst_exp.data.sampler import validation_loader
    from padst_exp.engine import evaluation
    from padst_exp.restore import RestoredRun, restore

    restored = restore(
        Path(keys.run),
        world,
        trust=keys.trust,
        changes=keys.changes,
        task=lambda cfg: None if keys.variant is None else _variant(keys, cfg),
    )
    trainer = restored.trainer
    batches = validation_loader(
        restored.task,
        batch_size=_batch_size(keys, trainer),
        rank=world.rank,
        world_size=world.size,
        workers=trainer.workers,
    )
    if not isinstance(restored, RestoredRun):
        _tune(restored, batches, world)
    metrics = evaluation.evaluate(
        restored.model,
        restored.task,
        batches,
        precision=trainer.precision,
        world=world,
        outcomes=outcomes,
    )
    return restored, metrics


def _variant(keys: EvaluateSchema, cfg: DictConfig) -> Task:
    """The test set that is asked for, seen as the validation images of a run on ImageNet."""
    from padst_exp.config import build

    dataset = cfg.dataset
    found = f"one on {dataset.get('_target_')} of {dataset.get('num_classes')} classes"
    fits = (dataset.get("_target_"), dataset.get("num_classes")) == (IMAGENET, 1000)
    require(fits, "run", found, f"a run on ImageNet's 1000 classes for variant={keys.variant}")
    same = ("root", "image_size", "interpolation", "crop_pct")
    call = {"_target_": VARIANT, "variant": keys.variant, "labels": keys.labels}
    task: Task = build(OmegaConf.create({**call, **{k: dataset.get(k) for k in same}}), "dataset")
    return task


def downstream(keys: EvaluateSchema, world: World) -> tuple[Path, dict[str, float]]:
    """Results of a language model in tasks of lm-evaluation-harness, by `task/metric`.

    Returns:
        As `evaluate`.

    Raises:
        UserError: the harness is not installed, has no such task, or the run is of no text.
    """
    from padst_exp.restore import restore

    require_installed("lm_eval", "tasks", "lm-evaluation-harness", "lm-eval")
    from padst_exp.integrations.lm_eval import evaluate_tasks

    restored = restore(Path(keys.run), world, trust=keys.trust, changes=keys.changes)
    results = evaluate_tasks(
        restored,
        keys.tasks,
        include_path=keys.include_path,
        limit=keys.limit,
        batch_size=_batch_size(keys, restored.trainer),
    )
    return restored.path, results


def _batch_size(keys: EvaluateSchema, trainer: Trainer) -> int:
    """As asked for, else that of the run."""
    return keys.batch_size or trainer.eval_batch_size or trainer.micro_batch_size(1)


def _tune(export: Restored, batches: Iterable[tuple[Tensor, Tensor]], world: World) -> None:
    """Give an export the form that is fastest for such batches, and say which."""
    from padst_exp.dispatch import Backend
    from padst_exp.engine.evaluation import forward_context, to_device
    from padst_exp.inference import tune
    from padst_exp.messages import say

    precision = export.trainer.precision
    asked = export.backend
    backends = get_args(Backend) if asked in (None, "auto") else (cast(Backend, asked),)
    for batch in islice(batches, 1):  # a rank may have none
        inputs, _ = to_device(batch, world.device, precision)
        with forward_context(precision, world.device):
            report = tune(export.model, inputs, backends=backends)
        if world.main:
            say(
                f"{report.form} for batches of {len(inputs)} in {precision}: "
                f"{report.speedup:.2f}x dense on {report.device}"
            )


if __name__ == "__main__":
    main()
