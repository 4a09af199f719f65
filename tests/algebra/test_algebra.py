"""Counts that move or shrink, rows in another order, soft selections: all through the engine."""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend

from algebra.algorithms import (
    Dwindling,
    NearDiagonal,
    Reordering,
    Roaming,
    Seniority,
    SoftTopK,
    WeightAndGradient,
)
from dst_cases import rigl, set_algorithm
from engine.toy import (
    ToyTask,
    assert_same_run,
    start_ranks,
    toy_experiment,
    toy_learner,
    toy_run,
    toy_trainer,
)
from from_yaml import from_yaml
from layers.reference import assert_close, expected, run
from padst_exp.data.sampler import train_loader
from padst_exp.dst import Algorithm
from padst_exp.engine import checkpoint
from padst_exp.engine.distributed import World
from padst_exp.engine.experiment import Experiment
from padst_exp.engine.placement import Placement
from padst_exp.engine.state import TrainingState
from padst_exp.engine.step import Stepper
from padst_exp.inference import pack
from padst_exp.layers import SparseWeight, permutations, sparse_layers, sparse_weights
from padst_exp.permutations import RandomPermutation
from padst_exp.soft import soft_choices
from structure_cases import STRUCTURES

STEPS = 16
ALGORITHMS: dict[str, Callable[[], Algorithm]] = {
    "roaming": Roaming,
    "dwindling": Dwindling,
    "reordering": Reordering,
    "soft": SoftTopK,
}


def fitting(name: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Every structure: its number, its name and what else varies with it."""
    for number, structure in enumerate(STRUCTURES):
        settings: dict[str, Any] = {
            "structure": STRUCTURES[structure],
            # Where selections are soft, permutations are so too.
            "learner": toy_learner(side="both") if number % 2 else RandomPermutation(side="both"),
            "optimizer": (
                from_yaml("optimizer/sgd", lr=0.05)
                if number % 3 == 2
                else from_yaml("optimizer/adamw", lr=0.01)
            ),
        }
        yield number, structure, settings


class Trained:
    """A short training by the real engine, in float64, with an average of the weights."""

    def __init__(self, algorithm: Algorithm, *, compile: bool = False, **settings: Any) -> None:
        trainer = toy_trainer(steps=STEPS, precision="float64", micro_batches=1, compile=compile)
        self.experiment: Experiment = toy_experiment(
            trainer=trainer, algorithm=algorithm, dropout=0.0, **settings
        )
        self.model = self.experiment.model.double()
        self.weights = sparse_weights(self.model)
        self.state = TrainingState(
            self.experiment, placement=Placement(World()), saved=None, path=Path()
        )
        self.rows: list[tuple[str, Mapping[str, Any]]] = []
        self.stepper = Stepper(
            self.experiment,
            self.state,
            record=lambda kind, values: self.rows.append((kind, values)),
            say=lambda line: None,
        )
        self.batches = iter(
            train_loader(
                self.experiment.task, batch_size=16, micro_batches=1, start_step=0,
                total_steps=STEPS, seed=0, rank=0, world_size=1, workers=0,
            )
        )  # fmt: skip

    def run(self, check: Callable[["Trained"], None]) -> "Trained":
        for _ in range(self.experiment.total_steps):
            self.stepper.step(self.batches)
            check(self)
        self.stepper.settle()
        return self


def entries(weights: Mapping[str, SparseWeight]) -> list[int]:
    return [weight.topology().num_entries for weight in weights.values()]


def check_roaming(trained: Trained) -> None:
    """As many units as at the start, in other pools."""
    for name, weight in trained.weights.items():
        assert len(weight.active) == int(weight.target.sum()), name


def check_dwindling(trained: Trained) -> None:
    """Never more than before; dense at the start, at the density asked in the end."""
    step, report = trained.state.step, trained.experiment.report
    size = sum(weight.topology().size for weight in trained.weights.values())
    assert report.density("layers") == pytest.approx(sum(entries(trained.weights)) / size)
    for weight in trained.weights.values():
        counts = weight.topology().counts()
        assert bool((counts >= weight.target).all()) or step < 4
        assert step < 12 or torch.equal(counts, weight.target)
        assert step >= 4 or int(counts.sum()) > int(weight.target.sum())


def check_reordering(trained: Trained) -> None:
    for name, weight in trained.weights.items():
        assert torch.equal(weight.topology().counts(), weight.target), name
        assert (weight.row_order is None) == (trained.state.step < 4)


def check_soft(trained: Trained) -> None:
    """All of what started is weighed, then only what was chosen is there."""
    average = trained.state.average
    assert average is not None
    averaged = sparse_weights(average.model)
    parameters = {id(parameter) for parameter in trained.state.trained_parameters()}
    for name, weight in trained.weights.items():
        if trained.state.step <= 11:
            selection, mean = weight.selection, averaged[name].selection
            assert selection is not None and mean is not None and selection.soft
            # Trained by its learner alone; the average weighs as sharply.
            assert id(selection.logits) not in parameters
            assert torch.equal(mean.temperature, selection.temperature)
            assert (float(selection.temperature) < 0.1) == (trained.state.step > 3)
        else:
            assert weight.selection is None
            assert torch.equal(weight.topology().counts(), weight.target)


CHECKS = {
    "roaming": check_roaming,
    "dwindling": check_dwindling,
    "reordering": check_reordering,
    "soft": check_soft,
}


def as_dense(weight: SparseWeight, tensor: Tensor) -> Tensor:
    """What is shaped like the values, at its places in the weight."""
    if weight.storage == "masked":
        return tensor
    twin = copy.deepcopy(weight)
    twin.values.data.copy_(tensor.expand_as(twin.values))
    return twin.matrix().detach()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_packed_and_masked_storage_train_alike_on_every_structure(name: str) -> None:
    moved = 0
    for _, structure, settings in fitting(name):
        packed, masked = (
            Trained(ALGORITHMS[name](), storage=storage, **copy.deepcopy(settings)).run(
                CHECKS[name]
            )
            for storage in ("packed", "masked")
        )
        where = f"{name} {structure}"
        first, second = torch.tensor(packed.state.losses), torch.tensor(masked.state.losses)
        torch.testing.assert_close(first, second, atol=1e-9, rtol=0, msg=where)
        assert [kind for kind, _ in packed.rows] == [kind for kind, _ in masked.rows], where
        for (_, ours), (_, theirs) in zip(packed.rows, masked.rows, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(
                theirs[k] == (pytest.approx(v, abs=1e-7) if isinstance(v, float) else v)
                for k, v in ours.items()
            ), (where, ours, theirs)
        assert sum(packed.state.losses[-3:]) < sum(packed.state.losses[:3]), where
        for key, weight in packed.weights.items():
            other = masked.weights[key]
            assert torch.equal(weight.active, other.active), where
            moved += int(not torch.equal(weight.topology().counts(), weight.target.cpu()))
            averages = (
                sparse_weights(trained.state.average.model)[key]  # type: ignore[union-attr]
                for trained in (packed, masked)
            )
            for ours, theirs in ((weight, other), averages):
                torch.testing.assert_close(
                    ours.matrix(), theirs.matrix(), atol=1e-8, rtol=0, msg=f"{where} {key}"
                )
            # What the optimizer knows of the values has followed them.
            state = packed.state.optimizer.state[weight.values]
            twin = masked.state.optimizer.state[other.values]
            assert state.keys() == twin.keys(), where
            for part in state.keys() & {"exp_avg", "exp_avg_sq", "momentum_buffer"}:
                assert state[part].shape == weight.values.shape, where
                torch.testing.assert_close(
                    as_dense(weight, state[part]), as_dense(other, twin[part]),
                    atol=1e-8, rtol=0, msg=f"{where} {part}",
                )  # fmt: skip
        assert not soft_choices(packed.model), where
        for permutation in permutations(packed.model).values():
            assert torch.equal(permutation.index.sort().values, torch.arange(permutation.size))
        check_gradients_and_export(packed, where)
    assert moved > 0 or name != "roaming", "no count moved on any structure"


def check_gradients_and_export(trained: Trained, where: str) -> None:
    """Layers are what their definition says, by every backend; packed layers compute the same."""
    model = copy.deepcopy(trained.model).float().eval()
    averaged = copy.deepcopy(trained.state.average.model).float()  # type: ignore[union-attr]
    for layer in sparse_layers(model).values():
        x, dy = torch.randn(5, layer.in_features), torch.randn(5, layer.out_features)
        layer.requires_grad_()
        wanted = expected(layer, x, dy)
        for backend in layer.backends(torch.device("cpu")):
            layer.use_backend(backend)
            assert_close(run(layer, x, dy), wanted, f"{where} {backend}")
    inputs = torch.randn(7, 24)
    for exported in (model, averaged):
        with torch.no_grad():
            y = exported(inputs)
            pack(exported)
            torch.testing.assert_close(exported(inputs), y, atol=1e-5, rtol=1e-5, msg=where)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_that_was_cut_off_ends_bitwise_like_a_straight_one(name: str, tmp_path: Path) -> None:
    turn = list(ALGORITHMS).index(name)
    for number, structure, settings in fitting(name):
        # Each structure once, cut off before, between and after what changes.
        if number % len(ALGORITHMS) != turn:
            continue
        trainer = toy_trainer(steps=STEPS, micro_batches=1, eval_interval=STEPS)

        def attempt(kind: str, fail_at: int | None = None) -> Path:
            settled = copy.deepcopy(settings)  # noqa: B023
            _, directory, _ = toy_run(
                tmp_path / structure, name=kind, trainer=trainer, task=ToyTask(fail_at=fail_at),  # noqa: B023
                algorithm=ALGORITHMS[name](), **settled,
            )  # fmt: skip
            return directory.path

        straight = attempt("straight")
        for step in (7, 15):
            with pytest.raises(ConnectionError):
                attempt(f"cut-{step}", fail_at=step)
            resumed = attempt(f"cut-{step}")
            assert_same_run(straight, resumed)


RANKED = {"dwindling": "fan-in-1", "reordering": "nm-16"}


def ranked_runs(world: World, root: Path) -> None:
    """Two algorithms; the micro-batches are the same for every number of processes."""
    trainer = toy_trainer(
        steps=STEPS, precision="float64", micro_batches=4 // world.size, eval_interval=STEPS,
        checkpoint_interval=None, log_interval=STEPS,
    )  # fmt: skip
    for name, structure in RANKED.items():
        toy_run(
            root, name=name, world=world, trainer=trainer, dropout=0.0,
            algorithm=ALGORITHMS[name](), structure=STRUCTURES[structure],
        )  # fmt: skip


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    processes = start_ranks(ranked_runs, tmp_path / "two", ranks=2)
    ranked_runs(World(), tmp_path / "one")
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    for name in RANKED:
        one, two = (
            checkpoint.read(tmp_path / number / name / "checkpoints" / "last.pt")
            for number in ("one", "two")
        )
        for part in ("model", "average"):
            assert one[part].keys() == two[part].keys()
            for key, tensor in one[part].items():
                torch.testing.assert_close(two[part][key], tensor, rtol=0, atol=1e-9, msg=name)
        assert one["topology"]["replaced"] == two["topology"]["replaced"]


def test_scores_may_ask_for_weight_gradients_ages_and_coordinates() -> None:
    algorithms = {
        "weight gradient": lambda: rigl(drop=WeightAndGradient(weight=0.5), interval=4),
        "age": lambda: set_algorithm(drop=Seniority(), interval=4),
        "coordinates": lambda: set_algorithm(grow=NearDiagonal(), interval=4),
    }
    for name, make in algorithms.items():
        for structure in ("block-4", "fan-in-1"):
            packed, masked = (
                Trained(make(), storage=storage, structure=STRUCTURES[structure]).run(
                    lambda trained: None
                )
                for storage in ("packed", "masked")
            )
            for key, weight in packed.weights.items():
                assert torch.equal(weight.active, masked.weights[key].active), (name, structure)
                assert packed.state.tracker.replaced[key] > 0
            torch.testing.assert_close(
                torch.tensor(packed.state.losses), torch.tensor(masked.state.losses),
                atol=1e-9, rtol=0,
            )  # fmt: skip
            if name == "age":
                births = packed.state.births
                assert births is not None
                for key, weight in packed.weights.items():
                    assert births.steps[key].shape == weight.active.shape
                    # A share of the oldest left at each of four updates: nobody is as old as that.
                    assert int(births.steps[key].max()) == 12


def test_compiled_blocks_follow_a_changing_number_of_entries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(24), nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            return x + nn.functional.gelu(self.linear(self.norm(x)))

    graphs, losses = [], []

    def traced(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        # All of tracing and of differentiation; code for the machine is no matter here.
        return lookup_backend("aot_eager")(graph, inputs)

    compile_module = partialmethod(nn.Module.compile, backend=traced, fullgraph=True)
    monkeypatch.setattr(nn.Module, "compile", compile_module)
    for compiled in (False, True):
        torch.manual_seed(0)
        blocks = nn.Sequential(Block(), Block())
        trained = Trained(
            Dwindling(),
            model=nn.Sequential(nn.Linear(24, 24), blocks, nn.Linear(24, 4)),
            structure=STRUCTURES["unstructured"],
            learner=RandomPermutation(side="in"),
            compile=compiled,
        ).run(check_dwindling)
        losses.append(torch.tensor(trained.state.losses))
    densities = {values["density"] for kind, values in trained.rows if kind == "rewire"}
    torch.testing.assert_close(losses[0], losses[1], atol=1e-9, rtol=0)
    # One graph for each number of entries, which both blocks share.
    assert len(graphs) == len(densities | {1.0}) == 4
