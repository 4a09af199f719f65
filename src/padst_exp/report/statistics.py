"""What a few seeds can say: intervals, paired differences, and what they could have detected.

The seed is the replicate. Nothing here knows where the numbers come from; values that are not
finite belong to runs that failed, and whoever calls this counts them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

LEVEL = 0.95
POWER = 0.8
FEWEST = 5
"""Seeds below which nothing is bootstrapped: their resamples are hardly others than themselves."""
RESAMPLES = 9_999
_FIGURES: Mapping[str, Callable[[Floats], Floats]] = {
    "top1": lambda ratio: 100 * ratio,
    "perplexity": np.exp,
}
# Differences that are equal but for rounding have no spread.
ROUNDING = 1e-12

Interval = tuple[float, float]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """A mean over seeds.

    Args:
        n: seeds.
        mean: over them.
        sd: standard deviation of one seed, None for fewer than two.
        interval: 95% t interval of the mean, None for fewer than two.
    """

    n: int
    mean: float
    sd: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Difference:
    """Of two arms, seed by seed.

    Args:
        sample: of the differences.
        p: two-sided, of the paired t test; None where the differences have no spread.
        detectable: least difference that so many seeds, spread like these, find with a power of
            80% at 5%; None as for `p`.
        bootstrap: 95% percentile interval of the mean over resampled seeds; None for few seeds.
        over_items: the same where what the models were tested on is drawn anew as well; None where
            it is not known how they did on each.
    """

    sample: Sample
    p: float | None
    detectable: float | None
    bootstrap: Interval | None
    over_items: Interval | None = None


@dataclass(frozen=True)
class Items:
    """Two models, item by item: images, or texts.

    Args:
        n: items.
        difference: of their figures, the first less the second.
        interval: 95% percentile interval of the difference over resampled items.
        only: items that only the first has right, and that only the second has; None where an item
            is not right or wrong.
        p: that both are as many, two-sided and exact (McNemar 1947); None as for `only`.
    """

    n: int
    difference: float
    interval: Interval
    only: tuple[int, int] | None
    p: float | None


@dataclass(frozen=True)
class Closure:
    """The share of the gap between two arms that a third one closes: 0 the lower, 1 the upper.

    Args:
        n: seeds that all three arms have.
        value: the ratio of mean differences.
        interval: 95%, Fieller's.
    """

    n: int
    value: float
    interval: Interval


def sample(values: Sequence[float]) -> Sample:
    """Mean, spread and t interval of one or more finite values."""
    x = np.asarray(values, dtype=np.float64)
    if not len(x) or not np.isfinite(x).all():
        raise ValueError(f"values: expected finite numbers, got {values}")
    n, mean = len(x), float(x.mean())
    if n < 2:
        return Sample(n, mean, None, None)
    sd = float(x.std(ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * sd / math.sqrt(n)
    return Sample(n, mean, sd, (mean - half, mean + half))


def paired(ours: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Compare two arms over the seeds that both have; None where there is none.

    Args:
        ours, baseline: finite values by seed.
    """
    seeds = sorted(ours.keys() & baseline.keys())
    if not seeds:
        return None
    differences = np.array([ours[seed] - baseline[seed] for seed in seeds])
    size = max(abs(value) for arm in (ours, baseline) for value in arm.values())
    found = sample(differences.tolist())
    if found.sd is None or found.sd <= ROUNDING * size:
        # Equal throughout: a mean, and nothing to judge it by.
        return Difference(Sample(found.n, found.mean, found.sd, None), None, None, None)
    statistic = found.mean / (found.sd / math.sqrt(found.n))
    p = float(2 * stats.t.sf(abs(statistic), found.n - 1))
    resampled = _resamples(found.n)
    bootstrap = None if resampled is None else _percentiles(differences[resampled].mean(axis=1))
    return Difference(found, p, detectable(found.sd, found.n), bootstrap)


def paired_items(
    ours: Sequence[Floats], baseline: Sequence[Floats], metric: str
) -> Interval | None:
    """Bootstrap of the mean difference of two arms over their seeds and the items they share.

    Args:
        ours, baseline: of the same seeds, the outcomes of all items, `[N, 2]` each.
        metric: see `figure_of`.

    Returns:
        95% percentile interval; None for few seeds, or where the items are not the same.
    """
    seeds = _resamples(len(ours))
    shapes = {outcomes.shape for outcomes in (*ours, *baseline)}
    if seeds is None or len(shapes) != 1:
        return None
    first, second = (_over_items(np.stack(arm), metric) for arm in (ours, baseline))
    if first is None or second is None:
        return None
    differences = first - second
    drawn = seeds[: len(differences)]
    return _percentiles(np.take_along_axis(differences, drawn, axis=1).mean(axis=1))


def compare_items(ours: Floats, theirs: Floats, metric: str) -> Items | None:
    """Compare two models on the same items; None for a metric that `figure_of` does not know.

    Args:
        ours, theirs: outcomes, `[N, 2]`.
        metric: what they are outcomes of.
    """
    both = np.stack([ours, theirs])
    figures = figure_of(metric, *both.sum(axis=1).T)
    resampled = _over_items(both, metric)
    if figures is None or resampled is None:
        return None
    difference = float(figures[0] - figures[1])
    interval = _percentiles(resampled[:, 0] - resampled[:, 1])
    if not np.isin(both, (0, 1)).all():
        return Items(len(ours), difference, interval, None, None)
    more = ours[:, 0] - theirs[:, 0]
    only = int((more > 0).sum()), int((more < 0).sum())
    p = float(stats.binomtest(only[0], sum(only)).pvalue) if sum(only) else 1.0
    return Items(len(ours), difference, interval, only, p)


def detectable(sd: float, n: int) -> float:
    """The least mean difference that a paired t test finds with a power of 80% at a level of 5%.

    Args:
        sd: of the differences.
        n: pairs, at least two.
    """
    freedom = n - 1
    critical = float(stats.t.ppf((1 + LEVEL) / 2, freedom))

    def lack(shift: float) -> float:
        # That it is found with the wrong sign has a probability below 1e-5 here.
        return float(stats.nct.sf(critical, freedom, shift)) - POWER

    most = 2 * critical + 4
    return float(optimize.brentq(lack, 0.0, most)) * sd / math.sqrt(n)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Adjust a family of p values (Holm 1979); those that are None are no tests, and stay so."""
    tests = sorted((p, place) for place, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, place) in enumerate(tests):
        largest = max(largest, min(1.0, (len(tests) - rank) * p))
        adjusted[place] = largest
    return adjusted


def gap_closure(
    ours: Mapping[int, float],
    lower: Mapping[int, float],
    upper: Mapping[int, float],
    *,
    lower_is_better: bool,
) -> Closure | None:
    """`(ours - lower) / (upper - lower)`, over the seeds that all three arms have.

    Its interval is Fieller's (1954) for the ratio of two means of paired values: what shares t of
    the gap are compatible with `ours - lower - t (upper - lower)` being zero on average.

    Args:
        ours, lower, upper: finite values by seed.
        lower_is_better: whether less of the metric is better.

    Returns:
        None where the 95% interval of `upper - lower` includes zero, or cannot be told, or `upper`
        is the worse one: there is then no gap to close.
    """
    seeds = sorted(ours.keys() & lower.keys() & upper.keys())
    gap = paired(*({seed: arm[seed] for seed in seeds} for arm in (upper, lower)))
    if gap is None or gap.sample.interval is None:
        return None
    low, high = gap.sample.interval
    if low <= 0 <= high or (high < 0) != lower_is_better:
        return None
    x, random, best = (np.array([arm[seed] for seed in seeds]) for arm in (ours, lower, upper))
    gained, whole = x - random, best - random
    interval = _fieller(gained, whole)
    return Closure(len(seeds), float(gained.mean() / whole.mean()), interval)


def _fieller(tops: Floats, bottoms: Floats) -> Interval:
    """Of the ratio of the means of pairs, where the mean of `bottoms` differs from zero."""
    n = len(tops)
    critical = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) ** 2 / n
    (top, both), (_, bottom) = np.cov(tops, bottoms) * critical
    # The roots t of (mean(tops) - t mean(bottoms))^2 = top - 2 t both + t^2 bottom.
    a = float(bottoms.mean()) ** 2 - bottom
    b = float(tops.mean() * bottoms.mean()) - both
    c = float(tops.mean()) ** 2 - top
    root = math.sqrt(max(b * b - a * c, 0.0))
    return float((b - root) / a), float((b + root) / a)


@cache
def _resamples(n: int) -> NDArray[np.int64] | None:
    """Which of n seeds each resample takes, `[RESAMPLES, n]`: the same at every call."""
    if n < FEWEST:
        return None
    drawn = np.random.default_rng(0).integers(0, n, size=(RESAMPLES, n))
    drawn.flags.writeable = False
    return drawn


def figure_of(metric: str, numerators: Floats, denominators: Floats) -> Floats | None:
    """A metric by the sums that `Task.outcomes` speaks of; None for one that is not made of them.

    Args:
        metric: "top1" or "perplexity", of averaged weights, too ("ema_top1").
    """
    figure = _FIGURES.get(metric.removeprefix("ema_"))
    if figure is None:
        return None
    with np.errstate(all="ignore"):
        return figure(numerators / denominators)


def is_figure_of(outcomes: Floats, metric: str, stated: object) -> bool:
    """Whether outcomes of items, `[N, 2]`, make what is stated of a metric, but for rounding."""
    figure = figure_of(metric, *outcomes.sum(axis=0)[:, None])
    if figure is None or not isinstance(stated, int | float):
        return False
    return bool(np.allclose(figure, stated, rtol=1e-4))


def _over_items(outcomes: Floats, metric: str) -> Floats | None:
    """The metric of each model over resampled items: outcomes `[M, N, 2]` to `[R, M]`."""
    models, n, _ = outcomes.shape
    flat = np.ascontiguousarray(outcomes.transpose(1, 0, 2).reshape(n, 2 * models), np.float64)
    sums = np.concatenate([part @ flat for part in _item_weights(n)]).reshape(-1, models, 2)
    return figure_of(metric, sums[..., 0], sums[..., 1])


@cache
def _item_weights(n: int) -> tuple[NDArray[np.uint8], ...]:
    """How often each of n items is in each resample, in parts of `[.., n]`: always the same."""
    random = np.random.default_rng(0)
    even = np.full(n, 1 / n)
    return tuple(random.multinomial(n, even, size=250).astype(np.uint8) for _ in range(8))


def _percentiles(values: Floats) -> Interval:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
