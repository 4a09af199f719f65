"""A training small enough for a test: a teacher's labels, two sparse layers, everything on."""

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from dst_cases import rigl
from from_yaml import from_yaml, leaf
from padst_exp.data.task import Task
from padst_exp.dst import Algorithm
from padst_exp.engine import checkpoint, distributed, loop
from padst_exp.engine.distributed import World
from padst_exp.engine.experiment import Experiment
from padst_exp.engine.loggers import NoLogger
from padst_exp.engine.optimizers import OptimizerBuilder
from padst_exp.engine.placement import Placement
from padst_exp.engine.records import read_metrics
from padst_exp.engine.run_directory import TIME_FIELDS, RunDirectory
from padst_exp.engine.settings import Trainer
from padst_exp.engine.state import TrainingState
from padst_exp.permutations import DoublyStochastic, PermutationLearner
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import Block, Storage, Structure

STEPS, MICRO_BATCHES = 30, 2


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


def toy_learner(
    learner: type[DoublyStochastic] = DoublyStochastic, **changes: Any
) -> DoublyStochastic:
    """Permutations that harden half-way, among updates of topologies."""
    settings: dict[str, Any] = {"ramp_start": 0.0, "ramp_end": 0.2, "deadline": 0.5, "interval": 5}
    call: dict[str, Any] = {**leaf("permutation/doubly_stochastic", **settings | changes)}
    return learner(**{key: value for key, value in call.items() if key != "_target_"})


def toy_trainer(**changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "steps": STEPS,
        "batch_size": 16,
        "micro_batches": MICRO_BATCHES,
        "eval_interval": 10,
        "checkpoint_interval": 4,
        "log_interval": 3,
        "clip_norm": 1.0,
        "ema_decay": 0.9,
    }
    trainer: Trainer = from_yaml("trainer/default", **settings | changes)
    return trainer


def toy_layers(dropout: float = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(24, 32),
        nn.LayerNorm(32),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(32, 32),
        nn.GELU(),
        nn.Linear(32, 4),
    )


def toy_experiment(
    *,
    task: ToyTask | None = None,
    trainer: Trainer | None = None,
    dropout: float = 0.1,
    model: nn.Module | None = None,
    algorithm: Algorithm | None = None,
    learner: PermutationLearner | None = None,
    optimizer: OptimizerBuilder | None = None,
    structure: Structure | None = None,
    storage: Storage = "packed",
    split: int = 1,
    backend: Any = "torch",
    logger: NoLogger | None = None,
) -> Experiment:
    """All linear layers but the last are sparse, their topologies and permutations learned."""
    model = toy_layers(dropout) if model is None else model
    algorithm = algorithm or rigl(fraction=0.3, interval=5, stop=0.75)
    learner = learner or toy_learner()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    report = sparsify(
        model,
        [Rule(name, split) for name in names[:-1]],
        structure=structure or Block(size=4, balanced=False),
        density=0.4,
        learner=learner,
        algorithm=algorithm,
        storage=storage,
    )
    return Experiment(
        task=task or ToyTask(),
        model=model,
        report=report,
        algorithm=algorithm,
        learner=learner,
        optimizer=optimizer or from_yaml("optimizer/adamw", lr=0.01),
        trainer=trainer or toy_trainer(),
        logger=logger or NoLogger(),
        seed=0,
        backend=backend,
    )


def toy_state(experiment: Experiment) -> TrainingState:
    """The state of a training that has just begun."""
    return TrainingState(experiment, placement=Placement(World()), saved=None, path=Path("none.pt"))


def toy_run(
    root: Path,
    *,
    name: str = "toy",
    world: World | None = None,
    pictures: bool = False,
    **changes: Any,
) -> tuple[dict[str, Any], RunDirectory, nn.Module]:
    """Run (or resume) a training in `root`; its summary, folder and trained model."""
    world, experiment = world or World(), toy_experiment(**changes)
    directory = RunDirectory.open(
        root,
        name,
        world,
        resume="auto",
        config={"optimizer": {"lr": 0.01}},
        config_text="optimizer: {lr: 0.01}\n",
        overrides=[],
    )
    # Two thirds of the time of such a run would go into them.
    with (
        nullcontext()
        if pictures
        else mock.patch.multiple(loop, plot_curves=mock.DEFAULT, plot_topologies=mock.DEFAULT)
    ):
        return loop.run(experiment, directory, world), directory, experiment.model


def double(ranks: int) -> dict[str, Any]:
    """Settings of a run in float64 that computes the same in every number of processes."""
    trainer = toy_trainer(precision="float64", micro_batches=4 // ranks)
    return {"trainer": trainer, "dropout": 0.0}


def start_ranks(
    work: Callable[..., None], *arguments: object, ranks: int = 1
) -> list[ForkServerProcess]:
    """Start `work(world, *arguments)` in processes of their own, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    # One process imports what all others inherit; it must find what is imported here.
    context.set_forkserver_preload([__name__])
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    processes = []
    for rank in range(ranks):
        environment = {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }
        process = context.Process(target=_rank, args=(environment, work, arguments))
        process.start()
        processes.append(process)
    return processes


def _rank(
    environment: Mapping[str, str], work: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    world = distributed.start("cpu")
    work(world, *arguments)
    world.close()


def timeless(value: object) -> object:
    """`value` without what tells of time."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIME_FIELDS}
    if isinstance(value, list):
        return [timeless(item) for item in value]
    return value


def assert_same_run(one: Path, other: Path) -> None:
    """Everything but times is equal, bit by bit: metrics, summary, all that a checkpoint holds."""
    assert timeless(read_metrics(one / "metrics.jsonl")) == timeless(
        read_metrics(other / "metrics.jsonl")
    )
    summaries = [json.loads((path / "summary.json").read_text()) for path in (one, other)]
    assert timeless(summaries[0]) == timeless(summaries[1])
    for name in ("last.pt", "best.pt"):
        first, second = (checkpoint.read(path / "checkpoints" / name) for path in (one, other))
        # It says how the runs are called, too.
        assert_equal(first | {"config_text": ""}, second | {"config_text": ""}, name)


def assert_equal(one: Any, other: Any, where: str) -> None:
    """Two nested containers hold the same tensors, bit by bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for position, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}.{position}")
    else:
        assert one == other, where
