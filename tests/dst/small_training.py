"""A training through the real engine, small enough for a loop over methods and structures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from from_yaml import from_yaml
from padst_exp.data.task import Task
from padst_exp.dst import Algorithm
from padst_exp.engine.distributed import World
from padst_exp.engine.experiment import Experiment
from padst_exp.engine.loggers import NoLogger
from padst_exp.engine.optimizers import OptimizerBuilder
from padst_exp.engine.placement import Placement
from padst_exp.engine.state import TrainingState
from padst_exp.engine.step import Stepper
from padst_exp.permutations import NoPermutation, PermutationLearner
from padst_exp.sparsify import Report, Rule, sparsify
from padst_exp.structures import Storage, Structure

FEATURES, CLASSES, BATCH = 32, 8, 16


class Teacher(Task):
    """Classes of a fixed random teacher, read off normal inputs."""

    kind = "classification"
    monitor = ("accuracy", "max")
    model_shape: dict[str, int] = {}  # noqa: RUF012
    items_per_sample = 1

    def __init__(self) -> None:
        self.train = self.validation = range(10_000)  # type: ignore[assignment]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(logits, targets)

    def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        raise AssertionError("nothing is evaluated here")

    def summarize(self, sums: Mapping[str, Tensor | float]) -> dict[str, float]:
        raise AssertionError("nothing is evaluated here")


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(FEATURES, CLASSES, generator=generator)
    while True:
        inputs = torch.randn(BATCH, FEATURES, generator=generator)
        yield inputs, (inputs @ teacher).argmax(1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, 48), nn.GELU(), nn.Linear(48, 32), nn.GELU(), nn.Linear(32, CLASSES)
    )


def adamw(**changes: Any) -> OptimizerBuilder:
    return from_yaml(
        "optimizer/adamw", **{"lr": 0.01, "warmup": 0.0, "schedule": "constant", **changes}
    )


def sgd(**changes: Any) -> OptimizerBuilder:
    return from_yaml("optimizer/sgd", **{"warmup": 0.0, "schedule": "constant", **changes})


@dataclass
class Training:
    """What is left of a training, and what its metrics were told."""

    model: nn.Module
    report: Report
    state: TrainingState
    stepper: Stepper
    rows: list[dict[str, Any]]
    data: Iterator[tuple[Tensor, Tensor]]

    def run(self, steps: int, after: Callable[["Training"], object] | None = None) -> "Training":
        for _ in range(steps):
            self.stepper.step(self.data)
            if after is not None:
                after(self)
        self.stepper.settle()
        return self


def start(
    algorithm: Algorithm,
    structure: Structure,
    *,
    steps: int,
    density: float = 0.3,
    model: nn.Module | None = None,
    rules: Sequence[Rule] = (Rule("0"), Rule("2")),
    learner: PermutationLearner | None = None,
    optimizer: OptimizerBuilder | None = None,
    storage: Storage = "packed",
    ema_decay: float | None = None,
    low_rank: int = 0,
    world: World | None = None,
    saved: Mapping[str, Any] | None = None,
) -> Training:
    """A training of `steps` steps, none of which is taken yet, or as many as `saved` has taken."""
    model = network() if model is None else model
    learner = NoPermutation() if learner is None else learner
    report = sparsify(
        model, rules, structure=structure, density=density, learner=learner,
        algorithm=algorithm, storage=storage, low_rank=low_rank,
    )  # fmt: skip
    experiment = Experiment(
        task=Teacher(), model=model, report=report, algorithm=algorithm, learner=learner,
        optimizer=adamw() if optimizer is None else optimizer,
        trainer=from_yaml(
            "trainer/default", steps=steps, batch_size=BATCH, ema_decay=ema_decay
        ),
        logger=NoLogger(), seed=0, backend="torch",
    )  # fmt: skip
    rows = list[dict[str, Any]]()
    state = TrainingState(
        experiment, placement=Placement(world or World()), saved=saved, path=Path()
    )
    stepper = Stepper(
        experiment, state, say=lambda line: None,
        record=lambda kind, values: rows.append({"kind": kind, **values}),
    )  # fmt: skip
    data = batches()
    for _ in range(state.step):
        next(data)
    return Training(model, report, state, stepper, rows, data)
