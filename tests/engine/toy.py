"""A training small enough for a test: a teacher's labels, two sparse layers, everything on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from from_yaml import from_yaml
from padst_exp.data.task import Task
from padst_exp.dst import DropGrow, Gradient, Magnitude
from padst_exp.engine.backends import Backend
from padst_exp.engine.distributed import World
from padst_exp.engine.loggers import NoLogger
from padst_exp.engine.loop import run
from padst_exp.engine.run_directory import TIME_FIELDS, RunDirectory
from padst_exp.engine.settings import Trainer
from padst_exp.permutations import DoublyStochastic
from padst_exp.sparsify import Report, Rule, sparsify
from padst_exp.structures import Block

STEPS = 30


class Samples:
    """Normal inputs, noisy from epoch to epoch, with the labels of a fixed linear teacher."""

    seed = 0

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(size, 24, generator=generator)
        teacher = torch.randn(24, 4, generator=torch.Generator().manual_seed(99))
        self.targets = (self.inputs @ teacher).argmax(1)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, address: tuple[int, int] | int) -> tuple[Tensor, Tensor]:
        epoch, index = address if isinstance(address, tuple) else (0, address)
        return self.inputs[index] * (1 + 0.01 * epoch), self.targets[index]


class ToyTask(Task):
    kind = "classification"
    monitor = ("accuracy", "max")
    model_shape: dict[str, int] = {}  # noqa: RUF012
    items_per_sample = 1

    def __init__(self, *, fail_at: int | None = None, nan_at: int | None = None) -> None:
        self.train, self.validation = Samples(96, 1), Samples(40, 2)
        self.fail_at, self.nan_at = fail_at, nan_at
        self.losses = 0

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.losses += 1
        if self.losses == self.fail_at:
            raise ConnectionError("power cut")
        loss = functional.cross_entropy(logits, targets)
        return loss * torch.nan if self.losses == self.nan_at else loss

    def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        loss = functional.cross_entropy(logits.double(), targets, reduction="sum")
        hits = (logits.argmax(1) == targets).double().sum()
        count = torch.tensor(len(targets), dtype=torch.float64)
        return {"loss": loss, "accuracy": hits, "count": count}

    def summarize(self, sums: Mapping[str, Tensor | float]) -> dict[str, float]:
        return {key: float(sums[key]) / float(sums["count"]) for key in ("loss", "accuracy")}

    def baselines(self) -> dict[str, float]:
        return {"chance accuracy": 0.25}


def toy_learner(**changes: Any) -> DoublyStochastic:
    settings: dict[str, Any] = {"ramp_start": 0.0, "ramp_end": 0.2, "deadline": 0.5}
    return DoublyStochastic(**settings | changes)


def toy_algorithm() -> DropGrow:
    return DropGrow(
        drop=Magnitude(), grow=Gradient(), fraction=0.3, interval=5, stop=0.75, moments="age"
    )


def toy_model(learner: DoublyStochastic, dropout: float = 0.1) -> tuple[nn.Module, Report]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(24, 32),
        nn.LayerNorm(32),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(32, 32),
        nn.GELU(),
        nn.Linear(32, 4),
    )
    return model, sparse(model, learner)


def sparse(model: nn.Module, learner: DoublyStochastic) -> Report:
    """Make all linear layers of `model` sparse but the last."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return sparsify(
        model,
        [Rule(name) for name in names[:-1]],
        structure=Block(size=4, balanced=False),
        density=0.4,
        learner=learner,
    )


def toy_trainer(**changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "steps": STEPS,
        "batch_size": 16,
        "micro_batches": 2,
        "eval_interval": 10,
        "checkpoint_interval": 4,
        "log_interval": 3,
        "clip_norm": 1.0,
        "ema_decay": 0.9,
    }
    trainer: Trainer = from_yaml("trainer/default", **settings | changes)
    return trainer


def toy_run(
    root: Path,
    *,
    name: str = "toy",
    resume: str = "auto",
    task: ToyTask | None = None,
    trainer: Trainer | None = None,
    config: dict[str, object] | None = None,
    world: World | None = None,
    dropout: float = 0.1,
    model: nn.Module | None = None,
    backend: Backend = "auto",
) -> tuple[dict[str, Any], RunDirectory, nn.Module]:
    """Run a training in `root`; its summary, folder and trained model."""
    config = config or {"optimizer": {"lr": 0.01}}
    trainer, world = trainer or toy_trainer(), world or World()
    text = "optimizer: {lr: 0.01}\n"

    def create() -> Path:
        return RunDirectory.create(
            root,
            name,
            resume=resume,
            config=config,
            config_text=text,
            overrides=[],
            device="cpu",
            keep_last=trainer.keep_last,
        ).path

    path = world.from_main(create() if world.main else None)
    assert path is not None
    directory = RunDirectory(path, config=config, config_text=text, keep_last=trainer.keep_last)
    learner = toy_learner()
    if model is None:
        model, report = toy_model(learner, dropout)
    else:
        report = sparse(model, learner)
    summary = run(
        model=model,
        task=task or ToyTask(),
        algorithm=toy_algorithm(),
        learner=learner,
        optimizer=from_yaml("optimizer/adamw", lr=0.01),
        trainer=trainer,
        report=report,
        directory=directory,
        logger=NoLogger(),
        world=world,
        seed=0,
        backend=backend,
    )
    return summary, directory, model


def timeless(value: object) -> object:
    """`value` without what tells of time."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIME_FIELDS}
    if isinstance(value, list):
        return [timeless(item) for item in value]
    return value
