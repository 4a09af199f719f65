"""Permutations as networks of switches: products of butterflies (kaleidoscopes)."""

from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from padst_exp.permutations.learners import Relaxed, require_start, single
from padst_exp.permutations.permutation import Permutation

Pairs = list[tuple[int, int]]


def network(lines: list[int]) -> list[Pairs]:
    """Return the stages of a Benes network on `lines`: which two lines each switch may exchange.

    A butterfly and its mirror image; for any number of lines n (Chang and Melhem 1997), in
    2 ceil(log2 n) - 1 stages. Every permutation is a setting of its switches.
    """
    if len(lines) <= 2:
        return [[(lines[0], lines[1])]] if len(lines) == 2 else []
    half = len(lines) // 2
    outer = [(lines[2 * i], lines[2 * i + 1]) for i in range(half)]
    upper, lower = lines[0 : 2 * half : 2], lines[1 : 2 * half : 2] + lines[2 * half :]
    inner = zip_longest(network(upper), network(lower), fillvalue=Pairs())
    return [outer, *(one + other for one, other in inner), outer]


class SwitchedPermutation(Permutation):
    """M is a product of stages of soft switches, ((1 - q, q), (q, 1 - q)) on pairs of features.

    Each stage is doubly stochastic and so is their product, without any normalisation; rounding
    every switch gives a permutation, without any assignment (the kaleidoscopes of Dao et al. 2020,
    of two butterflies, restricted to permutations).

    Args:
        logits: `[number of switches of network(range(d))]`, in the order of its stages;
            q = sigmoid(logit).
        size: d, at least 2.
    """

    def __init__(self, logits: Tensor, *, size: int) -> None:
        super().__init__(torch.arange(size, device=logits.device))
        partners, switches, first = [], [], 0
        for pairs in network(list(range(size))):
            partner, switch = torch.arange(size), torch.full((size,), -1)
            for number, (one, other) in enumerate(pairs, first):
                partner[one], partner[other] = other, one
                switch[one] = switch[other] = number
            partners.append(partner)
            switches.append(switch)
            first += len(pairs)
        assert logits.shape == (first,), logits.shape
        # [stages, d]: whom a feature may change places with, and by which switch; -1: by none.
        self.register_buffer("_partner", torch.stack(partners).to(logits.device), persistent=False)
        self.register_buffer("_switch", torch.stack(switches).to(logits.device), persistent=False)
        self._soften(logits)

    def relaxed(self) -> Tensor:
        crossed = torch.sigmoid(self._wide_logits())
        matrix = torch.eye(self.size, dtype=crossed.dtype, device=crossed.device)
        return self._through(crossed, matrix)

    def _through(self, crossed: Tensor, x: Tensor) -> Tensor:
        """Send the rows of `x` `[d, ...]` through all stages, given the q of every switch."""
        partners, switches = self._buffers["_partner"], self._buffers["_switch"]
        assert partners is not None and switches is not None
        crossed = torch.cat([crossed, crossed.new_zeros(1)])  # -1 reads it
        for partner, switch in zip(partners, switches, strict=True):
            x = torch.lerp(x, x[partner], crossed[switch][:, None])
        return x

    def penalty(self) -> Tensor:
        """Return the mean of 4 q (1 - q) over all switches: 1 at uniform, 0 at a permutation."""
        if self.logits is None:
            return torch.zeros((), device=self.index.device)
        crossed = torch.sigmoid(self._wide_logits())
        return (4 * crossed * (1 - crossed)).mean()

    def tangent(self, gradient: Tensor) -> Tensor:
        return gradient

    @torch.no_grad()
    def nearest(self) -> Tensor:
        if self.logits is None:
            return self.index.clone()
        crossed = (self._wide_logits() > 0).double()
        lines = torch.arange(self.size, device=crossed.device).double()[:, None]
        return self._through(crossed, lines).squeeze(1).long()

    def project_(self) -> None:
        return


@dataclass(kw_only=True, eq=False)
class Kaleidoscope(Relaxed):
    """Permutations as soft switching networks: d log2 d parameters, doubly stochastic as such.

    Args:
        scale: of the initial logits, scale * randn.
        side, lr, betas, weighting, weight, ramp_start, ramp_end, delta, deadline, interval, clip:
            as in `Relaxed`.
    """

    scale: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require_start(1, "lognormal", self.scale)

    def create(self, size: int, generator: torch.Generator) -> Permutation | None:
        if size == 1:
            return single(generator)
        number = sum(map(len, network(list(range(size)))))
        noise = torch.randn(number, generator=generator, device=generator.device)
        return SwitchedPermutation(self.scale * noise, size=size)
