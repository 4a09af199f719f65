"""Everything that changes while training, which is what a checkpoint holds."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from padst_exp.engine import checkpoint
from padst_exp.engine.distributed import own_part
from padst_exp.engine.ema import Average
from padst_exp.engine.experiment import Experiment
from padst_exp.engine.placement import Placement
from padst_exp.engine.tracker import Births, TopologyTracker
from padst_exp.errors import UserError
from padst_exp.layers import sparse_layers, sparse_weights
from padst_exp.seeds import seed_generators, seed_of
from padst_exp.soft import choices


class TrainingState:
    """A model in training, fresh or as a checkpoint left it.

    Args:
        experiment: its model is fresh, on its device and in its dtype.
        placement: of parameters over the ranks.
        saved: a checkpoint's contents, or None to start afresh.
        path: of the checkpoint, for messages.
        prepare: called once the model is what it was, before its parameters are laid out.

    Attributes:
        world: of this process.
        placement: of parameters over the ranks.
        step: completed steps.
        best: best value of the monitored metric so far, and its step.
        losses: of the steps since the last row of metrics; `norms` of their gradients alike.
        births: when each active unit was grown; None where the algorithm does not ask.
    """

    def __init__(
        self,
        experiment: Experiment,
        *,
        placement: Placement,
        saved: Mapping[str, Any] | None,
        path: Path,
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        self.model = model = experiment.model.train()
        self.learners = experiment.learners
        self.placement, self.world = placement, placement.world
        self.step = 0
        self.best: tuple[float, int] | None = None
        self.losses: list[float] = []
        self.norms: list[float] = []
        self._random: Sequence[Mapping[str, Any]] | None = None
        # The fresh model has the initial topology, whatever the checkpoint holds.
        self.tracker = TopologyTracker(sparse_weights(model))
        if saved is not None:
            checkpoint.load_weights(model, self.placement.loadable(model, saved["model"]), path)
        prepare()
        self.births = None
        if "age" in experiment.algorithm.needs:
            self.births = Births(sparse_weights(model))
        decay = experiment.trainer.ema_decay
        self.average = None if decay is None else Average(model, decay)
        if saved is not None:
            self._restore_average(saved["average"], path)
        # Only now is it known which choices are still soft.
        layers = sparse_layers(model).values()
        frozen = {module for layer in layers if layer.frozen for module in layer.modules()}
        found = {n: c for n, c in choices(model).items() if c.soft or c not in frozen}
        for learner in self.learners:
            learner.start({n: c for n, c in found.items() if isinstance(c, learner.kind)})
        there: Mapping[str, Any] = {"model": None, "average": None} if saved is None else saved
        placement.place(model, there["model"], path)
        if self.average is not None:
            placement.place(self.average.model, there["average"], path)
            self.average.pair(model)
        self.optimizer, self.schedule = experiment.optimizer.create(
            model, experiment.total_steps, self.placement.trained
        )
        if saved is not None:
            self._restore(saved, path)

    def payload(self) -> dict[str, Any]:
        """Return the contents of a checkpoint. A collective: all ranks call it."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.model.state_dict(),
            "optimizer": self.placement.optimizer_state(self.optimizer),
            "schedule": self.schedule.state_dict(),
            "learners": [learner.state_dict() for learner in self.learners],
            "topology": self.tracker.state_dict(),
            "births": None if self.births is None else self.births.state_dict(),
            "best": self.best,
            "losses": self.losses,
            "norms": self.norms,
            "random": self.world.gather(checkpoint.random_state()),
        }

    def start_generators(self, seed: int) -> None:
        """Set the global generators of this rank; the last thing to do before the first step."""
        if self._random is None:
            # Dropout differs between ranks, and owes nothing to how the model was initialised.
            seed_generators(seed_of("dropout", seed, self.world.rank))
        elif len(self._random) != self.world.size:
            # Those of other ranks than there were, which also differ from all that they had.
            seed_generators(seed_of("dropout", seed, self.world.size, self.step, self.world.rank))
        else:
            with checkpoint.restoring(self._path, "random"):
                checkpoint.restore_random_state(self._random[self.world.rank])
            self._random = None

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return all parameters but those of soft choices."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def is_finite(self) -> bool:
        """Whether all weights are finite numbers, on all ranks. A collective."""
        norms = torch._foreach_norm([own_part(p.detach()) for p in self.model.parameters()])
        return not self.world.largest(int(not torch.stack(norms).isfinite().all()))

    def _restore_average(self, saved: Mapping[str, Tensor] | None, path: Path) -> None:
        if (saved is None) != (self.average is None):
            raise UserError(f"{path}: written with another trainer.ema_decay")
        if self.average is not None and saved is not None:
            model = self.average.model
            checkpoint.load_weights(model, self.placement.loadable(model, saved), path)

    def _restore(self, saved: Mapping[str, Any], path: Path) -> None:
        self._random, self._path = saved["random"], path
        with checkpoint.restoring(path, "optimizer"):
            _load_optimizer(
                self.optimizer, self.placement.fitting(self.optimizer, saved["optimizer"])
            )
        with checkpoint.restoring(path, "learners"):
            for learner, state in zip(self.learners, saved["learners"], strict=True):
                learner.load_state_dict(state)
        with checkpoint.restoring(path, "schedule"):
            if saved["schedule"].keys() != self.schedule.state_dict().keys():
                raise KeyError(*(self.schedule.state_dict().keys() ^ saved["schedule"].keys()))
            self.schedule.load_state_dict(saved["schedule"])
        with checkpoint.restoring(path, "topology"):
            self.tracker.load_state_dict(saved["topology"])
        if self.births is not None:
            with checkpoint.restoring(path, "births"):
                self.births.load_state_dict(saved["births"])
        self.step = saved["step"]
        with checkpoint.restoring(path, "best"):
            if saved["best"] is not None:
                self.best = float(saved["best"][0]), int(saved["best"][1])
        for name, values in (("losses", self.losses), ("norms", self.norms)):
            with checkpoint.restoring(path, name):
                values.extend(float(value) for value in saved[name])


def _load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state of which torch itself checks the number of parameters alone.

    Raises:
        ValueError: it lacks a setting, or what it keeps of a parameter is not shaped like it.
    """
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        if group.keys() != saved.keys():
            raise ValueError(f"its groups have other settings, {group.keys() ^ saved.keys()}")
    optimizer.load_state_dict(dict(state))
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if not isinstance(value, torch.Tensor) or value.ndim != parameter.ndim:
                continue
            # Of every entry, or of every row.
            wanted, found = list(parameter.shape), list(value.shape)
            if found not in (wanted, [*wanted[:1], *(1 for _ in wanted[1:])]):
                raise ValueError(f"{name} of a parameter {wanted} is {found}")
