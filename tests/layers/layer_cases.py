"""Sparse layers for tests: the same for the same arguments, whatever the storage."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from padst_exp.dst import Algorithm, Change, Selection, Signals, Topology
from padst_exp.layers import SparseLinear, permutations
from padst_exp.permutations import PermutationLearner, RandomPermutation
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import Storage, Structure
from permutation_cases import learned

Life = Literal["none", "random", "soft", "hardened"]
LIVES: tuple[Life, ...] = ("none", "random", "soft", "hardened")


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
