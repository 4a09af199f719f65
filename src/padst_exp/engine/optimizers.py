"""Optimizers, their schedules and the roles of parameters: targets of conf/optimizer/*.yaml."""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import nn

from padst_exp.engine.adamw import AgeAwareAdamW
from padst_exp.engine.muon import SparseMuon, hidden_matrices
from padst_exp.errors import require
from padst_exp.layers import SparseWeight, sparse_weights
from padst_exp.soft import Soft

# How a learning rate falls: by name, or in steps (from which share of training on, what factor).
Fall = Literal["cosine", "linear", "constant"] | tuple[tuple[float, float], ...]

Role = Literal["packed", "weight", "bias", "norm", "embedding"]
DECAYED: tuple[Role, ...] = ("packed", "weight")

# Of torch's optimizers, those in which entries of one row or column share something.
_BY_MATRIX = ("Adafactor", "Muon")

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


class Schedule(Protocol):
    """What the loop needs of a schedule; timm's schedulers have it."""

    def step_update(self, num_updates: int) -> None:
        """Set the learning rates for the step that follows `num_updates` completed ones."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""


def parameter_roles(model: nn.Module) -> dict[str, tuple[Role, nn.Parameter]]:
    """Return role and parameter of every trained parameter of `model`, by name, each once.

    "packed": the values of a `SparseWeight`; "weight": a dense weight; "bias"; "norm": scales of
    normalisation layers; "embedding": tables, tokens and other bare parameters. Soft choices
    are left out: their learner brings an optimizer of its own.
    """
    roles: dict[str, tuple[Role, nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, Soft):
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                roles[name] = (_role(module, name.rpartition(".")[2], parameter), parameter)
    return roles


def _role(module: nn.Module, name: str, parameter: nn.Parameter) -> Role:
    if isinstance(module, SparseWeight):
        return "packed"
    if name.endswith("bias"):
        return "bias"
    # One number for each feature is a scale, whoever wrote its layer (`LlamaRMSNorm`).
    if isinstance(module, _NORMS) or (name.endswith("weight") and parameter.ndim < 2):
        return "norm"
    if isinstance(module, nn.Embedding) or not name.endswith("weight"):
        return "embedding"
    return "weight"


def _parameter_groups(
    model: nn.Module, weight_decay: float, *, lr_by_density: bool
) -> list[dict[str, Any]]:
    groups: dict[Role, list[nn.Parameter]] = {}
    for role, parameter in parameter_roles(model).values():
        groups.setdefault(role, []).append(parameter)
    # A group for each sparse weight; schedules multiply by its scale.
    scaled: list[dict[str, Any]] = [
        {"role": "packed", "params": [weight.values], "lr_scale": lr_scale(weight)}
        for weight in sparse_weights(model).values()
        if lr_by_density
    ]
    if scaled:
        del groups["packed"]
    plain: list[dict[str, Any]] = [
        {"role": role, "params": parameters} for role, parameters in groups.items()
    ]
    return [
        {**group, "weight_decay": weight_decay if group["role"] in DECAYED else 0.0}
        for group in [*plain, *scaled]
    ]


def lr_scale(weight: SparseWeight) -> float:
    """The factor of the learning rate of a weight of this density, 1 / density (SMET)."""
    return 1 / weight.topology().density


def require_entrywise(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer that takes packed values, `[N, E]`, for the rows of a matrix.

    Raises:
        UserError: it is one of torch's that do, and has packed values of `model`.
    """
    packed = {weight.values for weight in sparse_weights(model).values()}
    matrix = tuple(getattr(torch.optim, name) for name in _BY_MATRIX if hasattr(torch.optim, name))
    mixes = isinstance(optimizer, matrix) and any(
        parameter in packed for group in optimizer.param_groups for parameter in group["params"]
    )
    wanted = "optimizer=muon or one that updates entry by entry, since packed values are no matrix"
    require(not mixes, "optimizer", type(optimizer).__name__, wanted)


class Steps:
    """A learning rate that rises linearly, then changes at certain steps only.

    Args:
        optimizer: every group starts from its own learning rate, times its `lr_scale`.
        factors: of that learning rate, by the step from which on they hold.
        warmup_steps: over which it rises.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, factors: Mapping[int, float], warmup_steps: int
    ) -> None:
        self.optimizer = optimizer
        self.factors = dict(sorted(factors.items()))
        self.warmup_steps = warmup_steps
        self.rates = [group["lr"] for group in optimizer.param_groups]

    def step_update(self, num_updates: int) -> None:
        """Set the learning rates for the step that follows `num_updates` completed ones."""
        first = 1 / max(1, self.warmup_steps)
        factor = min(1.0, first + (1 - first) * num_updates * first)
        for step, value in self.factors.items():
            factor = value if num_updates >= step else factor
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor * group.get("lr_scale", 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the number of completed steps says all."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore nothing."""


@dataclass(frozen=True, kw_only=True)
class OptimizerBuilder(abc.ABC):
    """What the builders below share: the schedule and the checks.

    Args:
        lr: the highest learning rate.
        weight_decay: of packed and dense weights; biases, norms and embeddings have none.
        warmup: fraction of the training over which the learning rate rises linearly.
        schedule: how it falls afterwards, down to `min_lr`; or in steps, such as ((0.5, 0.1),) for
            a tenth of it in the second half of training.
        min_lr: the final learning rate.
        lr_by_density: whether the learning rate of a sparse weight is over its density (SMET).
    """

    lr: float
    weight_decay: float
    warmup: float
    schedule: Fall
    min_lr: float
    lr_by_density: bool

    def __post_init__(self) -> None:
        _require(self.lr > 0, "lr", self.lr, "positive")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        wanted = "a fraction of training in [0, 1)"
        _require(0 <= self.warmup < 1, "warmup", self.warmup, wanted)
        wanted = f"from 0 to optimizer.lr={self.lr}"
        _require(0 <= self.min_lr <= self.lr, "min_lr", self.min_lr, wanted)
        if not isinstance(self.schedule, str):
            valid = all(0 < share < 1 and factor > 0 for share, factor in self.schedule)
            wanted = "pairs of a share of training in (0, 1) and a positive factor"
            _require(valid, "schedule", self.schedule, wanted)

    def create(
        self,
        model: nn.Module,
        total_steps: int,
        trained: Callable[[nn.Parameter], nn.Parameter] = lambda parameter: parameter,
    ) -> tuple[torch.optim.Optimizer, Schedule]:
        """Return an optimizer of all but the soft choices of `model`, and its schedule.

        Args:
            model: on its device already.
            total_steps: of the training.
            trained: what of a parameter this process trains.
        """
        groups = _parameter_groups(model, self.weight_decay, lr_by_density=self.lr_by_density)
        for group in groups:
            group["params"] = [trained(parameter) for parameter in group["params"]]
        optimizer = self._optimizer(groups, model)
        require_entrywise(optimizer, model)
        return optimizer, self._schedule(optimizer, total_steps)

    @abc.abstractmethod
    def _optimizer(self, groups: list[dict[str, Any]], model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of these parameter groups of `model`."""

    def _schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> Schedule:
        from timm.scheduler.cosine_lr import CosineLRScheduler
        from timm.scheduler.poly_lr import PolyLRScheduler
        from timm.scheduler.step_lr import StepLRScheduler

        warmup_steps = round(self.warmup * total_steps)
        decay_steps = max(1, total_steps - warmup_steps)
        # The first step must not be lost to a learning rate of zero.
        start = self.lr / max(1, warmup_steps)
        common: dict[str, Any] = {
            "warmup_t": warmup_steps,
            "warmup_lr_init": start,
            "warmup_prefix": True,
            "t_in_epochs": False,
        }
        made: object
        if not isinstance(self.schedule, str):
            factors = {round(share * total_steps): factor for share, factor in self.schedule}
            made = Steps(optimizer, factors, warmup_steps)
        elif self.schedule == "constant":
            made = StepLRScheduler(optimizer, decay_t=2 * total_steps, decay_rate=1.0, **common)
        elif self.schedule == "linear":
            made = PolyLRScheduler(
                optimizer, t_initial=decay_steps, power=1.0, lr_min=self.min_lr, **common
            )
        else:
            made = CosineLRScheduler(optimizer, t_initial=decay_steps, lr_min=self.min_lr, **common)
        scheduler = cast(Schedule, made)
        scheduler.step_update(0)
        return scheduler


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerBuilder):
    """Builds an `AgeAwareAdamW`.

    Args:
        betas: decays of the two moments.
        eps: added to the root of the second moment.
        regrowth_warmup: steps over which the learning rate of what is grown rises linearly (SMET
            takes 100); 0: at once.
        lr, weight_decay, warmup, schedule, min_lr, lr_by_density: as in `OptimizerBuilder`.
    """

    betas: tuple[float, float]
    eps: float
    regrowth_warmup: int

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = all(0 <= beta < 1 for beta in self.betas)
        _require(valid, "betas", self.betas, "two numbers of at least 0 and below 1")
        _require(self.eps > 0, "eps", self.eps, "positive")
        steps = self.regrowth_warmup
        _require(steps >= 0, "regrowth_warmup", steps, "at least 0 steps")

    def _optimizer(self, groups: list[dict[str, Any]], model: nn.Module) -> torch.optim.Optimizer:
        return AgeAwareAdamW(groups, **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        # One kernel for each parameter, on a CPU as on a GPU.
        return {
            "lr": self.lr,
            "betas": self.betas,
            "eps": self.eps,
            "fused": True,
            "regrowth_warmup": self.regrowth_warmup,
        }


@dataclass(frozen=True, kw_only=True)
class Muon(AdamW):
    """Builds a `SparseMuon`: hidden matrices by Muon, all else by AdamW.

    Args:
        adamw_lr: the highest learning rate of what AdamW trains; it rises and falls as `lr` does.
        momentum: decay of the average of gradients.
        nesterov: whether to look ahead; needs momentum.
        ns_steps: rounds of Newton-Schulz.
        betas, eps: of AdamW.
        regrowth_warmup, lr, weight_decay, warmup, schedule, min_lr, lr_by_density: as in `AdamW`.
    """

    adamw_lr: float
    momentum: float
    nesterov: bool
    ns_steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.adamw_lr > 0, "adamw_lr", self.adamw_lr, "positive")
        _require_momentum(self.momentum, self.nesterov)
        # As torch has it: more would be no approximation.
        _require(1 <= self.ns_steps < 100, "ns_steps", self.ns_steps, "from 1 to 99 rounds")

    def _optimizer(self, groups: list[dict[str, Any]], model: nn.Module) -> torch.optim.Optimizer:
        hidden = hidden_matrices(model)
        parts = [
            {**group, "muon": muon, "params": [p for p in group["params"] if (p in hidden) == muon]}
            for group in groups
            for muon in (True, False)
        ]
        return SparseMuon(
            [part for part in parts if part["params"]],
            weights=sparse_weights(model).values(),
            adamw_lr=self.adamw_lr / self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.ns_steps,
            **self._arguments(),
        )


@dataclass(frozen=True, kw_only=True)
class SGD(OptimizerBuilder):
    """Builds a `torch.optim.SGD`.

    Args:
        momentum: decay of the momentum buffer.
        nesterov: whether to look ahead; needs momentum.
        lr, weight_decay, warmup, schedule, min_lr, lr_by_density: as in `OptimizerBuilder`.
    """

    momentum: float
    nesterov: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_momentum(self.momentum, self.nesterov)

    def _optimizer(self, groups: list[dict[str, Any]], model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


def _require(valid: bool, key: str, value: object, wanted: str) -> None:
    require(valid, f"optimizer.{key}", value, wanted)


def _require_momentum(momentum: float, nesterov: bool) -> None:
    _require(0 <= momentum < 1, "momentum", momentum, "at least 0 and below 1")
    _require(not nesterov or momentum > 0, "nesterov", nesterov, "false without optimizer.momentum")
