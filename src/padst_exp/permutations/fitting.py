"""Permutations fitted to trained weights, offline: they keep the most of what weights are worth.

Nothing is learned in training. What an entry is worth (its square, an accumulated saliency) comes
with the `Site`; of fresh weights nothing is known, and the permutation is a random one.
"""

import torch
from torch import Tensor

from padst_exp.errors import require
from padst_exp.permutations.learners import PermutationLearner, Side
from padst_exp.permutations.permutation import Permutation, assign
from padst_exp.permutations.site import Site


def kept(site: Site, index: Tensor) -> float:
    """Return how much of the importance the structure keeps with feature index[i] in slot i."""
    assert site.importance is not None
    seen = site.importance[:, index]
    return float(seen[site.best(seen)].double().sum())


def climb(site: Site, index: Tensor, rounds: int) -> tuple[Tensor, float]:
    """Improve the permutation `index` `[d]` until nothing more is gained, or for `rounds`.

    The best units for a permutation and the best permutation for units, a linear assignment, take
    turns (as RIA's assignment does once); neither can lose.

    Returns:
        The permutation and what it keeps.
    """
    importance = site.importance
    assert importance is not None
    value = kept(site, index)
    for _ in range(rounds):
        mask = site.best(importance[:, index])
        # What feature j is worth in slot i: all of it that stands in rows which slot i keeps.
        proposal = assign(mask.to(importance.dtype).T @ importance)
        found = kept(site, proposal)
        if found <= value * (1 + 1e-6):
            break
        index, value = proposal, found
    return index, value


class Greedy(PermutationLearner):
    """Fits permutations to trained weights by climbing from the natural order of features.

    Args:
        side: as in `PermutationLearner`.
        rounds: of `climb`, at most.
    """

    def __init__(self, *, side: Side, rounds: int) -> None:
        super().__init__(side=side)
        require(rounds >= 1, "permutation.rounds", rounds, "at least 1")
        self.rounds = rounds

    def create(self, size: int, generator: torch.Generator) -> Permutation | None:
        return Permutation(torch.randperm(size, generator=generator, device=generator.device))

    @torch.no_grad()
    def fit(self, site: Site, generator: torch.Generator) -> Permutation | None:
        if site.importance is None:
            return self.create(site.size, generator)
        natural = torch.arange(site.size, device=site.importance.device)
        return Permutation(self.best(site, *climb(site, natural, self.rounds), generator))

    def best(self, site: Site, index: Tensor, value: float, generator: torch.Generator) -> Tensor:
        """Return the permutation to take, given the one that climbing led to and its value."""
        return index


class Search(Greedy):
    """Goes on from where `Greedy` ends: shakes the best permutation so far and climbs again.

    A bounded search as in Pool and Yu (2021), whose swaps are one by one.

    Args:
        side: as in `PermutationLearner`.
        rounds: of each climb, at most.
        trials: how many times it shakes.
        shake: share of features that change places at random.
    """

    def __init__(self, *, side: Side, rounds: int, trials: int, shake: float) -> None:
        super().__init__(side=side, rounds=rounds)
        require(trials >= 1, "permutation.trials", trials, "at least 1")
        require(0 < shake <= 1, "permutation.shake", shake, "a share of features in (0, 1]")
        self.trials = trials
        self.shake = shake

    def best(self, site: Site, index: Tensor, value: float, generator: torch.Generator) -> Tensor:
        number = max(2, round(self.shake * site.size)) if site.size > 1 else 0
        for _ in range(self.trials):
            some = torch.randperm(site.size, generator=generator, device=generator.device)
            some = some[:number].to(index.device)
            shaken = index.clone()
            shaken[some] = index[some.roll(1)]
            found, worth = climb(site, shaken, self.rounds)
            if worth > value:
                index, value = found, worth
        return index
