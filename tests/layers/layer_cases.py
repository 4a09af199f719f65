"""Sparse layers for tests: the same for the same arguments, whatever the storage."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from padst_exp.dst import Algorithm, Change, Selection, Signals, Topology
from padst_exp.layers import SparseLinear, permutations
from padst_exp.permutations import DoublyStochastic, PermutationLearner, RandomPermutation
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import Storage, Structure

Life = Literal["none", "random", "soft", "hardened"]
LIVES: tuple[Life, ...] = ("none", "random", "soft", "hardened")


def learned(**changes: Any) -> DoublyStochastic:
    """A `DoublyStochastic` learner of both sides with the settings of its YAML file, but short."""
    settings: dict[str, Any] = {
        "side": "both",
        "parametrization": "logits",
        "iterations": 10,
        "init": "lognormal",
        "scale": 1.0,
        "lr": 0.3,
        "betas": (0.9, 0.99),
        "weighting": "adaptive",
        "weight": 3.0,
        "ramp_start": 0.05,
        "ramp_end": 0.2,
        "delta": 0.22,
        "deadline": 0.6,
        "interval": 1,
        "clip": None,
    }
    return DoublyStochastic(**settings | changes)


class SoftHalf(Algorithm):
    """Weighs twice as many units as are to stay, by random coefficients."""

    def initial_density(self, density: float) -> float:
        return min(1.0, 2 * density)

    def selection(self, topology: Topology, generator: torch.Generator) -> Selection:
        return Selection(topology, torch.randn(len(topology.active), generator=generator))

    def is_due(self, step: int, total: int) -> bool:
        return False

    def decide(
        self, topology: Topology, signals: Signals, *, step: int, total: int, carry: float
    ) -> tuple[Change, float]:
        raise AssertionError("topologies stay")


def sparse_layer(
    dense: nn.Module,
    structure: Structure,
    *,
    life: Life = "none",
    storage: Storage = "packed",
    split: int = 1,
    low_rank: int = 0,
    selected: bool = False,
    density: float = 0.25,
) -> SparseLinear:
    """`dense` made sparse: its permutations hard from the start, soft, or hardened."""
    torch.manual_seed(0)
    model = nn.Sequential(dense)
    learners: dict[Life, PermutationLearner | None] = {
        "none": None,
        "random": RandomPermutation(side="both"),
        "soft": learned(),
        "hardened": learned(),
    }
    sparsify(
        model,
        [Rule("0", split)],
        structure=structure,
        density=density,
        learner=learners[life],
        low_rank=low_rank,
        storage=storage,
        algorithm=SoftHalf() if selected else None,
    )
    layer = model[0]
    assert isinstance(layer, SparseLinear)
    if layer.companion is not None:
        nn.init.normal_(layer.companion.up)
    if life == "hardened":
        for permutation in permutations(layer).values():
            permutation.harden()
    return layer


def linear(shape: tuple[int, int], split: int = 1) -> nn.Linear:
    """A dense layer of `split` times O outputs and I inputs; always the same."""
    torch.manual_seed(1)
    return nn.Linear(shape[1], split * shape[0])


def signals_for(shape: tuple[int, ...], outputs: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """An input and a gradient of the output."""
    return torch.randn(shape), torch.randn(outputs)
