"""AdamW for weights whose entries are not of one age."""

from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor


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


def risen(born: Tensor, ages: Tensor, warmup: int) -> Tensor:
    """Share of its learning rate that each entry has: grown ones get theirs over `warmup` steps."""
    return torch.where(born > 0, (ages / warmup).clamp(max=1), 1)


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
    ramp = risen(born, ages, warmup) if warmup else None
    difference = torch._foreach_sub(factors(steps), factors(ages, ramp))
    means = [state["exp_avg"] for state in states]
    torch._foreach_addcmul_(parameters, means, difference, value=float(group["lr"]))


def _in_shape(flat: Tensor, births: list[Tensor]) -> list[Tensor]:
    """Cut `flat` into tensors with the shapes of `births`."""
    parts = flat.split([birth.numel() for birth in births])
    return [part.view_as(birth) for part, birth in zip(parts, births, strict=True)]
