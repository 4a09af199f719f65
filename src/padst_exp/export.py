"""Export a trained model: `python -m padst_exp.export run=<run directory> [format=...]`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import DictConfig, OmegaConf

from padst_exp.cli import command_line
from padst_exp.config import Device, read_keys
from padst_exp.errors import UserError, require
from padst_exp.files import require_no_link

if TYPE_CHECKING:  # the command line must answer --help before torch is imported
    from torch import Tensor, nn

    from padst_exp.engine.distributed import World
    from padst_exp.restore import RestoredRun

# Largest relative difference between the logits of the two models in one forward pass.
TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class ExportSchema:
    """The keys of conf/export.yaml.

    Args:
        run: run directory, as printed at the end of a training, or a checkpoint file.
        format: "packed" for `padst_exp.inference`, "transformers" for that and for transformers
            with `padst_exp.integrations.transformers`, "dense" for any reader of tensors, and for
            plain transformers, "timm" for plain timm, dense too.
        out: folder to write; null is `export`, or `export-<format>` if not packed, in the run.
        overwrite: whether an earlier export there may be replaced.
        measure: whether the model card says how fast a forward pass of these samples is here,
            beside dense.
        batch_size: of the validation samples with which the export is compared with the run.
        device: "auto" takes the GPU where there is one.
        trust: packages other than ours whose constructors the run's config may name.
        changes: of keys of the run that change no weight, as on a command line, which may also
            have them directly: `dataset.root=/where/the/data/are/now`.
    """

    run: str
    format: Literal["packed", "dense", "timm", "transformers"]
    out: str | None
    overwrite: bool
    measure: bool
    batch_size: int
    device: Device
    trust: str | tuple[str, ...]
    changes: tuple[str, ...]

    def __post_init__(self) -> None:
        require(self.out != "", "out", repr(self.out), "a folder")
        cards = "true with format=transformers, whose card says so"
        require(not self.measure or self.format == "transformers", "measure", self.measure, cards)
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")


@command_line("export", of_run=True)
def main(cfg: DictConfig) -> None:
    """Export the best checkpoint of a run and say where it is."""
    keys = read_keys(cfg, ExportSchema)

    from padst_exp.engine import distributed
    from padst_exp.messages import say

    world = distributed.start(keys.device)
    try:
        folder, description = export(keys, world)
    finally:
        world.close()
    for name in description["source"]["hardened"]:
        say(f"{name} was still soft, the nearest hard choice took its place")
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    say(
        f"{size:.1f} MB, density of layers {description['density_of_layers']:.4f}, logits within "
        f"{description['largest_difference']:.1g} of the trained model's"
    )
    say(f"exported to {folder}")


def export(keys: ExportSchema, world: World) -> tuple[Path, dict[str, Any]]:
    """Export the best checkpoint of a run, as `keys` say.

    Choices that are still soft become the nearest hard ones. Before anything is written, the
    exported model computes the first validation samples like the trained one (hardened), both in
    plain PyTorch.

    Returns:
        The folder and the description that stands in it.

    Raises:
        UserError: there is no such run, it is damaged or diverged, or the folder is in use.
    """
    from padst_exp import dispatch
    from padst_exp.inference import files, pack
    from padst_exp.inference.packing import dense_state, harden
    from padst_exp.integrations.hub_files import (
        hub_files,
        is_language_model,
        require_language_model,
    )
    from padst_exp.integrations.timm import not_of_timm, timm_files, timm_model
    from padst_exp.restore import plain_model, restore_run

    if world.size > 1:
        raise UserError(f"export: one process is enough, torchrun started {world.size}")
    source = Path(keys.run)
    folder = _folder(keys)
    files.require_free(folder, overwrite=keys.overwrite)
    restored = restore_run(source, world, trust=keys.trust, changes=keys.changes)
    model = restored.model.eval()
    plain = None
    if keys.format == "transformers":
        require_language_model(restored)
    elif keys.format == "timm":
        plain = timm_model(restored)
    elif keys.format == "dense":
        plain = plain_model(restored.config, restored.task)
    dispatch.forced(model, "torch", world.device)
    hardened = harden(model)
    samples = _samples(restored, keys.batch_size)
    expected = _logits(model, samples)
    if not expected.isfinite().all():
        raise UserError(f"run: {restored.path} computes logits that are not finite")

    layers, metrics = pack(model), _metrics(restored)
    state, extra = model.state_dict(), {}
    if keys.format == "transformers":
        speed = _speed(model, samples) if keys.measure else None
        extra = hub_files(restored, layers, metrics, speed)
        state |= files.guards(layers)
    if plain is not None:
        # Copies: a plain load_state_dict wants tied weights under each of their names.
        copies = {name: tensor.clone() for name, tensor in dense_state(model, plain).items()}
        plain.load_state_dict(copies, assign=True)
        model, layers = plain.to(world.device, restored.trainer.dtype).eval(), {}
        state = model.state_dict()
        if keys.format == "timm":
            extra = timm_files(restored, model, metrics)
        elif is_language_model(restored):
            extra = hub_files(restored, None, metrics)
    found = _logits(model, samples)
    largest = dispatch.difference(found, expected)
    if keys.format == "timm" and not largest <= TOLERANCE:
        raise not_of_timm(restored.config.model.name, "the model of timm computes something else")
    if not largest <= TOLERANCE:
        raise RuntimeError(f"the exported model differs by {largest:.2g}")
    description = {
        "kind": keys.format,
        "model": _constructor(restored),
        "layers": layers,
        "density_of_layers": restored.report.density("layers"),
        "density_of_model": restored.report.density("model"),
        "sparsification": [asdict(layer) for layer in restored.report.layers],
        "largest_difference": largest,
        "metrics_of_checkpoint": metrics,
        "source": {
            "run": None if restored.run is None else str(restored.run.resolve()),
            "checkpoint": restored.path.name,
            "step": restored.step,
            "averaged": restored.averaged,
            "hardened": hardened,
        },
        "config": OmegaConf.to_yaml(restored.config, resolve=True),
    }
    files.write(folder, state, description, extra=extra, overwrite=keys.overwrite)
    return folder, description


def _folder(keys: ExportSchema) -> Path:
    if keys.out is not None:
        return Path(keys.out)
    source = Path(keys.run)
    name = "export" if keys.format == "packed" else f"export-{keys.format}"
    inside = source.with_name(f"{source.stem}-{name}") if source.is_file() else source / name
    require_no_link("out", inside)
    return inside


def _constructor(restored: RestoredRun) -> dict[str, Any]:
    """What builds the dense model, with all arguments, those from the data set too."""
    from padst_exp.train import run_settings

    config, shape = restored.config, restored.task.model_shape
    model = _call(config.model, **shape)
    transform = _call(config.transform)
    if transform["_target_"].endswith(".NoTransform"):
        return model
    run = run_settings(config)
    return {
        "_target_": "padst_exp.transforms.rebuild",
        "arguments": {
            "model": model,
            "transform": transform,
            "rules": [asdict(rule) for rule in run.sparse],
            "sparsity": run.sparsity,
            "shape": dict(shape),
        },
    }


def _call(node: DictConfig, **more: object) -> dict[str, Any]:
    """A constructor call as plain data."""
    plain = OmegaConf.to_container(node, resolve=True)
    assert isinstance(plain, dict)
    target = plain.pop("_target_")
    return {"_target_": target, "arguments": {**plain, **more}}


def _speed(model: nn.Module, samples: Tensor) -> str:
    """How fast a copy of a packed model is here, once tuned, beside the dense one, in words."""
    import copy

    import torch

    from padst_exp.inference import tune

    report = tune(copy.deepcopy(model), samples)
    shape = " x ".join(map(str, samples.shape))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    threads = f", threads: {torch.get_num_threads()}" if samples.device.type == "cpu" else ""
    return (
        f"A forward pass of {shape} took {1e3 * report.seconds[report.form]:.3g} ms in the form "
        f"that `padst_exp.inference.tune` picked ({report.form}), {report.speedup:.2f} times as "
        f"fast as the dense model beside it: {dtype}, {report.device}{threads}."
    )


def _samples(restored: RestoredRun, batch_size: int) -> Tensor:
    """The first validation samples, where the model is."""
    from padst_exp.data.sampler import validation_loader
    from padst_exp.engine.evaluation import to_device

    device = next(restored.model.parameters()).device
    loader = validation_loader(
        restored.task, batch_size=batch_size, rank=0, world_size=1, workers=0
    )
    samples, _ = to_device(next(iter(loader)), device, restored.trainer.precision)
    return samples


def _logits(model: nn.Module, samples: Tensor) -> Tensor:
    import torch

    with torch.no_grad():
        return model(samples).double()


def _metrics(restored: RestoredRun) -> dict[str, float]:
    """What the run measured when it wrote the checkpoint; before soft permutations hardened."""
    from padst_exp.engine.records import read_metrics

    rows = [] if restored.run is None else read_metrics(restored.run / "metrics.jsonl")
    for row in rows:
        if row.get("kind") == "eval" and row["step"] == restored.step:
            return {name: value for name, value in row.items() if isinstance(value, float)}
    return {}


if __name__ == "__main__":
    main()
