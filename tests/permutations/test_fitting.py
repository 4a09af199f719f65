"""Permutations fitted to trained weights, against brute force and planted ones."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from from_yaml import from_yaml
from padst_exp.errors import UserError
from padst_exp.permutations import PermutationLearner, Site
from padst_exp.permutations.fitting import climb, kept
from padst_exp.structures import (
    Block,
    Diagonal,
    Structure,
    best_units,
    random_units,
    scatter_entries,
)
from structure_cases import STRUCTURES


def site_of(structure: Structure, importance: Tensor | None, size: int, density: float) -> Site:
    """A square weight, permuted on its input side."""
    geometry = structure.geometry(size, size, density)
    counts = structure.initial_counts(geometry, density)

    def best(seen: Tensor) -> Tensor:
        entries = geometry.entries(best_units(geometry, counts, geometry.unit_rms(seen.sqrt())))
        inside = torch.ones_like(entries, dtype=torch.bool)
        return scatter_entries(inside, entries, geometry.shape)

    return Site(size=size, importance=importance, best=best)


def planted(structure: Structure, size: int, density: float) -> Tensor:
    """A random weight of the structure whose columns were permuted."""
    geometry = structure.geometry(size, size, density)
    counts = structure.initial_counts(geometry, density)
    entries = geometry.entries(random_units(geometry, counts, torch.Generator().manual_seed(1)))
    weight = scatter_entries(torch.randn(entries.shape), entries, geometry.shape)
    return weight[:, torch.randperm(size)]


def fitted(name: str, site: Site, **changes: object) -> Tensor:
    learner: PermutationLearner = from_yaml(f"permutation/{name}", **changes)
    found = learner.fit(site, torch.Generator().manual_seed(0))
    assert found is not None and not found.soft
    assert torch.equal(found.index.sort().values, torch.arange(site.size))
    return found.index


def test_climbing_never_keeps_less_and_searching_never_less_than_climbing() -> None:
    for name, structure in STRUCTURES.items():
        site = site_of(structure, torch.randn(64, 64).square(), 64, 0.25)
        start = torch.randperm(64)
        values = [kept(site, start)] + [climb(site, start, rounds)[1] for rounds in (1, 2, 20)]
        assert values == sorted(values), name
        natural = kept(site, torch.arange(64))
        greedy = kept(site, fitted("greedy", site))
        assert natural <= greedy <= kept(site, fitted("search", site, trials=3)), name


def test_a_planted_permutation_is_found_again() -> None:
    for name in ("block-8", "diag", "diag-stride", "nm-16"):
        weight = planted(STRUCTURES[name], 64, 0.25)
        site = site_of(STRUCTURES[name], weight.square(), 64, 0.25)
        share = kept(site, fitted("search", site)) / float(weight.square().sum())
        assert share > (0.97 if name == "nm-16" else 0.999), (name, share)


def test_nothing_keeps_more_on_small_weights() -> None:
    for structure in (Block(size=2, balanced=False), Diagonal(bundle=1, stride=1, width=1)):
        for seed in range(2):
            torch.manual_seed(seed)
            site = site_of(structure, torch.randn(5, 5).square(), 5, 0.41)
            most = max(kept(site, torch.tensor(order)) for order in permutations(range(5)))
            found = kept(site, fitted("search", site, trials=60, shake=0.5))
            assert found == pytest.approx(most, rel=1e-6)


def test_fresh_weights_get_a_random_permutation() -> None:
    for name in ("greedy", "search"):
        site = site_of(STRUCTURES["block-8"], None, 64, 0.25)
        learner = from_yaml(f"permutation/{name}")
        generators = (torch.Generator().manual_seed(0) for _ in range(2))
        first, again = (learner.fit(site, generator).index for generator in generators)
        assert torch.equal(first, again) and not torch.equal(first, torch.arange(64))


def test_bad_hyper_parameters_are_named() -> None:
    for name, key, value in (
        ("greedy", "rounds", 0), ("search", "trials", 0), ("search", "shake", 0.0),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"^permutation\.{key}: expected .*, got {value}$"):
            from_yaml(f"permutation/{name}", **{key: value})
