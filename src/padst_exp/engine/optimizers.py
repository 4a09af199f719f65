"""Optimizers, their schedules and the roles of parameters: targets of conf/optimizer/*.yaml."""

import abc
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, cast, overload

import torch
from torch import Tensor, nn

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
    wanted = "one that updates entry by entry, since packed values are no matrix"
    require(not mixes, "optimizer", type(optimizer).__name__, wanted)


class AgeAwareAdamW(torch.optim.AdamW):
    """AdamW in which entries that were born late have a bias correction of their own.

    Where the state of a parameter holds `birth` (integers, broadcastable to the parameter: which of
    the steps in its vector `births` an entry was born at, 0 for original ones), an entry's step
    count is step - births[birth]. A grown weight then moves exactly as under a fresh AdamW started
    at its birth; with the global count its first step would be 3.2 times the learning rate at
    beta2 = 0.999.

    Args:
        groups, arguments: as in `torch.optim.AdamW`.
        regrowth_warmup: steps after its birth over which the learning rate of an entry rises
            linearly; 0: at once.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, regrowth_warmup: int = 0, **arguments: Any
    ) -> None:
        super().__init__(groups, **arguments)
        self.regrowth_warmup = regrowth_warmup

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; torch makes all of it floating point, as the parameters are."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "birth" in state:
                state["birth"] = state["birth"].to(birth_dtype(state["births"]))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = super().step(closure)
        for group in self.param_groups:
            grown = [
                parameter
                for parameter in group["params"]
                if parameter.grad is not None and "birth" in self.state[parameter]
            ]
            if grown:
                states = [self.state[parameter] for parameter in grown]
                _correct_bias(grown, states, group, self.regrowth_warmup)
        return loss


def birth_dtype(births: Tensor) -> torch.dtype:
    """Two bytes an entry tell where in `births` its own is, unless rewirings are very many."""
    return torch.int16 if len(births) <= 1 << 15 else torch.int32


def _correct_bias(
    parameters: list[Tensor],
    states: list[Mapping[str, Tensor]],
    group: dict[str, Any],
    warmup: int,
) -> None:
    """Replace the update that AdamW just made by the one of each entry's own age.

    With c_i = 1 - beta_i^age, AdamW moves by -lr * mean * (sqrt(c_2) / c_1) / (root + eps *
    sqrt(c_2)), root being that of the second moment.
    """
    beta1, beta2 = group["betas"]
    births = [state["birth"] for state in states]
    roots = torch._foreach_sqrt([state["exp_avg_sq"] for state in states])

    def factors(ages: Tensor, ramp: Tensor | None = None) -> tuple[Tensor, ...]:
        # All weights at once: one number for each birth is little work, but many calls.
        correction = (1 - beta2**ages).sqrt()
        scale = correction / (1 - beta1**ages)
        scale = scale if ramp is None else scale * ramp
        denominators = torch._foreach_add(roots, _in_shape(correction * group["eps"], births))
        return torch._foreach_div(_in_shape(scale, births), denominators)

    # As long as the births, so that original entries cancel to exactly zero.
    born = torch.cat([state["births"][state["birth"].flatten().int()] for state in states])
    counts = [
        state["step"].to(state["births"]).expand(birth.numel())
        for state, birth in zip(states, births, strict=True)
    ]
    steps = torch.cat(counts)
    ages = steps - born
    ramp = torch.where(born > 0, (ages / warmup).clamp(max=1), 1) if warmup else None
    difference = torch._foreach_sub(factors(steps), factors(ages, ramp))
    means = [state["exp_avg"] for state in states]
    torch._foreach_addcmul_(parameters, means, difference, value=float(group["lr"]))


def _in_shape(flat: Tensor, births: list[Tensor]) -> list[Tensor]:
    """Cut `flat` into tensors with the shapes of `births`."""
    parts = flat.split([birth.numel() for birth in births])
    return [part.view_as(birth) for part, birth in zip(parts, births, strict=True)]


class Steps:
    """A learning rate that rises linearly, then changes at certain steps only.

    Args:
        optimizer: every group starts from its own learning rate.
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
            group["lr"] = rate * factor

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the number of completed steps says all."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore nothing."""


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

    Attributes:
        regrowth_warmup: steps over which the learning rate of what is grown rises.
    """

    regrowth_warmup: int = 0

    def __init__(
        self,
        *,
        lr: float,
        weight_decay: float,
        warmup: float,
        schedule: Fall,
        min_lr: float,
        lr_by_density: bool,
    ) -> None:
        require(lr > 0, "optimizer.lr", lr, "positive")
        require(weight_decay >= 0, "optimizer.weight_decay", weight_decay, "at least 0")
        require(0 <= warmup < 1, "optimizer.warmup", warmup, "a fraction of training in [0, 1)")
        require(0 <= min_lr <= lr, "optimizer.min_lr", min_lr, f"from 0 to optimizer.lr={lr}")
        if not isinstance(schedule, str):
            valid = all(0 < share < 1 and factor > 0 for share, factor in schedule)
            wanted = "pairs of a share of training in (0, 1) and a positive factor"
            require(valid, "optimizer.schedule", schedule, wanted)
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.schedule = schedule
        self.min_lr = min_lr
        self.lr_by_density = lr_by_density

    def create(self, model: nn.Module, total_steps: int) -> tuple[torch.optim.Optimizer, Schedule]:
        """Return an optimizer of all but the soft choices of `model`, and its schedule.

        The model must be on its device already.
        """
        groups = _parameter_groups(model, self.weight_decay, lr_by_density=self.lr_by_density)
        optimizer = self._optimizer(groups)
        require_entrywise(optimizer, model)
        return optimizer, self._schedule(optimizer, total_steps)

    @abc.abstractmethod
    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the optimizer of these parameter groups."""

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


class AdamW(OptimizerBuilder):
    """Builds an `AgeAwareAdamW`.

    Args:
        lr: as in `OptimizerBuilder`, like all others not named here.
        betas: decays of the two moments.
        eps: added to the root of the second moment.
        regrowth_warmup: steps over which the learning rate of what is grown rises linearly (SMET
            takes 100); 0: at once.
    """

    def __init__(
        self,
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        warmup: float,
        schedule: Fall,
        min_lr: float,
        lr_by_density: bool,
        regrowth_warmup: int,
    ) -> None:
        super().__init__(
            lr=lr,
            weight_decay=weight_decay,
            warmup=warmup,
            schedule=schedule,
            min_lr=min_lr,
            lr_by_density=lr_by_density,
        )
        valid = all(0 <= beta < 1 for beta in betas)
        require(valid, "optimizer.betas", betas, "two numbers of at least 0 and below 1")
        require(eps > 0, "optimizer.eps", eps, "positive")
        require(
            regrowth_warmup >= 0, "optimizer.regrowth_warmup", regrowth_warmup, "at least 0 steps"
        )
        self.betas = betas
        self.eps = eps
        self.regrowth_warmup = regrowth_warmup

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        # One kernel for each parameter, on a CPU as on a GPU.
        return AgeAwareAdamW(
            groups,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=True,
            regrowth_warmup=self.regrowth_warmup,
        )


class SGD(OptimizerBuilder):
    """Builds a `torch.optim.SGD`.

    Args:
        lr: as in `OptimizerBuilder`, like all others not named here.
        momentum: decay of the momentum buffer.
        nesterov: whether to look ahead; needs momentum.
    """

    def __init__(
        self,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
        warmup: float,
        schedule: Fall,
        min_lr: float,
        lr_by_density: bool,
    ) -> None:
        super().__init__(
            lr=lr,
            weight_decay=weight_decay,
            warmup=warmup,
            schedule=schedule,
            min_lr=min_lr,
            lr_by_density=lr_by_density,
        )
        require(0 <= momentum < 1, "optimizer.momentum", momentum, "at least 0 and below 1")
        require(
            not nesterov or momentum > 0,
            "optimizer.nesterov",
            nesterov,
            "false without optimizer.momentum",
        )
        self.momentum = momentum
        self.nesterov = nesterov

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)
