import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from padst_exp.report import statistics
from padst_exp.report.statistics import (
    compare_items,
    detectable,
    gap_closure,
    holm,
    paired,
    paired_items,
    sample,
)

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12)
PAIRS = st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=2, max_size=12)


def by_seed(values: Any) -> dict[int, float]:
    return dict(enumerate(values))


def test_a_sample_is_what_one_calculates_by_hand() -> None:
    # 1, 2, 3, 4: mean 2.5, variance 5/3; t(0.975, 3) = 3.1824463 in every table.
    found = sample([1, 2, 3, 4])
    half = 3.182446305 * math.sqrt(5 / 3) / 2
    assert found.n == 4 and found.mean == 2.5 and found.sd == pytest.approx(math.sqrt(5 / 3))
    assert found.interval == pytest.approx((2.5 - half, 2.5 + half))
    one = sample([7.0])
    assert (one.mean, one.sd, one.interval) == (7.0, None, None)
    for bad in ([], [1.0, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="finite"):
            sample(bad)


def test_a_paired_difference_is_what_one_calculates_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, sd 1, t = 2 sqrt(3) = 3.4641 with 2 degrees of freedom, whose
    # two-sided p is 1 - t / sqrt(t^2 + 2) = 1 - sqrt(12 / 14).
    found = paired({0: 11, 1: 22, 2: 33, 9: 5}, {0: 10, 1: 20, 2: 30, 8: 1})
    assert found is not None and found.sample.n == 3 and found.sample.mean == 2
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14))
    half = 4.302652730 / math.sqrt(3)
    assert found.sample.interval == pytest.approx((2 - half, 2 + half))
    assert found.bootstrap is None  # three seeds are too few


def test_what_cannot_be_judged_is_left_blank() -> None:
    assert paired({0: 1.0}, {1: 2.0}) is None and paired({}, {}) is None
    single = paired({3: 5.0}, {3: 4.0})
    assert single is not None and single.sample.mean == 1 and single.sample.interval is None
    assert single.p is None and single.detectable is None
    # Ties, and differences that are equal but for rounding.
    for ours, theirs in (([5.0] * 6, [5.0] * 6), ([0.1 + 0.2, 1.3], [0.3, 1.3])):
        tied = paired(by_seed(ours), by_seed(theirs))
        assert tied is not None and tied.sample.mean == pytest.approx(0, abs=1e-12)
        assert tied.p is None and tied.sample.interval is None and tied.bootstrap is None


@settings(max_examples=60, deadline=None)
@given(PAIRS)
def test_paired_agrees_with_scipy_and_is_antisymmetric(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = (by_seed(side) for side in zip(*pairs, strict=True))
    found, back = paired(ours, theirs), paired(theirs, ours)
    assert found is not None and back is not None
    assert found.sample.mean == pytest.approx(-back.sample.mean)
    assert found.p == back.p
    if found.p is not None:
        reference = stats.ttest_rel(list(ours.values()), list(theirs.values()))
        assert found.p == pytest.approx(float(reference.pvalue), rel=1e-6)
        interval = reference.confidence_interval()
        assert found.sample.interval == pytest.approx((interval.low, interval.high), rel=1e-6)
        # The interval leaves out zero exactly where p is below 5%.
        low, high = found.sample.interval or (0, 0)
        if abs(found.p - 0.05) > 1e-6:
            assert (low <= 0 <= high) == (found.p > 0.05)


@settings(max_examples=60, deadline=None)
@given(VALUES, st.floats(-50, 50), st.floats(0.5, 20))
def test_a_sample_moves_and_stretches_with_its_values(
    values: list[float], shift: float, scale: float
) -> None:
    first, second = sample(values), sample([scale * value + shift for value in values])
    assert first.sd is not None and second.sd is not None
    assert second.mean == pytest.approx(scale * first.mean + shift, abs=1e-6)
    assert second.sd == pytest.approx(scale * first.sd, abs=1e-6)
    assert second.interval == pytest.approx(
        tuple(scale * end + shift for end in first.interval or ()), abs=1e-5
    )


def test_what_is_detectable_is_found_four_times_in_five() -> None:
    draws = np.random.default_rng(0)
    for n in (3, 10):
        shift = detectable(1.0, n)
        pairs = shift + draws.standard_normal((20_000, n))
        found = stats.ttest_1samp(pairs, 0, axis=1).pvalue < 0.05
        assert found.mean() == pytest.approx(0.8, abs=0.012)
    # Tables of power: large, medium and small effects take 15, 34 and 199 pairs.
    for effect, pairs_needed in ((0.8, 15), (0.5, 34), (0.2, 199)):
        assert detectable(1.0, pairs_needed) < effect < detectable(1.0, pairs_needed - 1)
    assert detectable(3.0, 10) == pytest.approx(3 * detectable(1.0, 10))
    assert detectable(1.0, 2) > detectable(1.0, 3) > detectable(1.0, 30)


def test_holm_is_what_one_calculates_by_hand() -> None:
    # 4 * 0.01, 3 * 0.02, 2 * 0.03 = 0.06 (no less than before), then 0.5.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([None, 0.2, None]) == [None, 0.2, None]
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_lies_between_p_and_bonferroni(ps: list[float]) -> None:
    adjusted = [p for p in holm(ps) if p is not None]
    assert len(adjusted) == len(ps)
    for p, new in zip(ps, adjusted, strict=True):
        assert p <= new <= min(1.0, len(ps) * p) + 1e-12
    order = np.argsort(ps, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_gap_closure_is_a_ratio_with_an_interval() -> None:
    noise = np.random.default_rng(1).normal(size=(3, 10))
    lower, upper = 80 + 0.1 * noise[0], 90 + 0.1 * noise[1]
    ours = 82.5 + 0.1 * noise[2]
    found = gap_closure(by_seed(ours), by_seed(lower), by_seed(upper), lower_is_better=False)
    assert found is not None
    assert found.value == pytest.approx((ours - lower).mean() / (upper - lower).mean())
    assert found.interval[0] < found.value < found.interval[1]
    assert found.interval == pytest.approx((0.25, 0.25), abs=0.03)
    # The ends of the scale, exactly; fewer is better as well as more.
    for arm, value in ((lower, 0.0), (upper, 1.0)):
        end = gap_closure(by_seed(arm), by_seed(lower), by_seed(upper), lower_is_better=False)
        assert end is not None and end.value == pytest.approx(value)
    arms = by_seed(-ours), by_seed(-lower), by_seed(-upper)
    turned = gap_closure(*arms, lower_is_better=True)
    assert turned is not None and turned.value == pytest.approx(found.value)
    assert turned.interval == pytest.approx(found.interval)
    assert gap_closure(*arms, lower_is_better=False) is None  # the upper arm is the worse one


def test_fiellers_interval_has_the_true_ratio_as_often_as_it_says() -> None:
    """Its ends are where a t test of `ours - lower - t (upper - lower)` turns."""
    random = np.random.default_rng(0)
    lower, hits = np.zeros(6), []
    for _ in range(600):
        upper = 1 + 0.4 * random.normal(size=6)
        ours = 0.3 + 0.4 * random.normal(size=6)
        found = gap_closure(by_seed(ours), by_seed(lower), by_seed(upper), lower_is_better=False)
        if found is None:
            continue
        low, high = found.interval
        hits.append(low <= 0.3 <= high)
        for end in found.interval:
            assert stats.ttest_1samp(ours - end * upper, 0).pvalue == pytest.approx(0.05, abs=1e-6)
    assert len(hits) > 550 and np.mean(hits) == pytest.approx(0.95, abs=0.02)


def test_no_gap_is_closed_where_there_is_none() -> None:
    lower = by_seed([80.0, 81, 79, 80.5, 80.2])
    near = {seed: value + (-1) ** seed for seed, value in lower.items()}
    # The interval of the gap includes zero.
    assert gap_closure(near, lower, near, lower_is_better=False) is None
    assert gap_closure(near, lower, lower, lower_is_better=False) is None  # no gap at all
    assert gap_closure({0: 1.0}, {0: 0.0}, {0: 2.0}, lower_is_better=False) is None  # one seed
    assert gap_closure({9: 1.0}, lower, lower, lower_is_better=False) is None  # no seed in common


def test_the_bootstrap_is_near_scipys_and_the_same_each_time() -> None:
    differences = np.random.default_rng(2).exponential(size=12)
    ours, zero = by_seed(differences), by_seed(np.zeros(12))
    first, again = paired(ours, zero), paired(ours, zero)
    assert first is not None and first == again and first.bootstrap is not None
    reference = stats.bootstrap(
        (differences,), np.mean, method="percentile", n_resamples=9_999, rng=5
    ).confidence_interval
    spread = reference.high - reference.low
    assert first.bootstrap == pytest.approx(tuple(reference), abs=0.05 * spread)
    assert statistics.FEWEST == 5 and paired(by_seed(differences[:5]), zero) is not None


def hits(*right: int) -> Any:
    return np.array([[value, 1.0] for value in right])


def test_two_models_are_compared_item_by_item() -> None:
    # The first alone is right on 8 items, the second on 2: 2 (C(10,0) + C(10,1) + C(10,2)) / 2^10.
    ours = hits(*[1] * 8, *[0] * 2, *[1] * 30, *[0] * 10)
    theirs = hits(*[0] * 8, *[1] * 2, *[1] * 30, *[0] * 10)
    found = compare_items(ours, theirs, "top1")
    assert found is not None and (found.n, found.only) == (50, (8, 2))
    assert found.difference == pytest.approx(12) and found.p == pytest.approx(2 * 56 / 1024)
    assert found.interval[0] < 12 < found.interval[1]
    # A mean of fifty differences with this spread.
    spread = 100 * float(np.std(ours[:, 0] - theirs[:, 0])) / math.sqrt(50)
    assert found.interval[1] - found.interval[0] == pytest.approx(2 * 1.96 * spread, rel=0.1)
    same = compare_items(ours, ours, "top1")
    assert same is not None and (same.difference, same.p, same.only) == (0, 1, (0, 0))
    assert compare_items(ours, theirs, "accuracy of a toy") is None


def test_texts_are_compared_by_perplexity() -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(3, 9, 40).astype(float)
    ours, theirs = (np.stack([tokens * random.uniform(1, 2, 40), tokens], 1) for _ in range(2))
    found = compare_items(ours, theirs, "ema_perplexity")
    perplexities = [math.exp(each[:, 0].sum() / tokens.sum()) for each in (ours, theirs)]
    assert found is not None and found.only is None and found.p is None
    assert found.difference == pytest.approx(perplexities[0] - perplexities[1])


def test_items_widen_an_interval_over_seeds() -> None:
    random = np.random.default_rng(0)
    ours = [hits(*random.integers(0, 2, 200)) for _ in range(6)]
    theirs = [hits(*random.integers(0, 2, 200)) for _ in range(6)]
    values = [[100 * each[:, 0].mean() for each in arm] for arm in (ours, theirs)]
    seeds = paired(by_seed(values[0]), by_seed(values[1]))
    both = paired_items(ours, theirs, "top1")
    assert seeds is not None and seeds.bootstrap is not None and both is not None
    assert both[1] - both[0] > seeds.bootstrap[1] - seeds.bootstrap[0]
    assert paired_items(ours, ours, "top1") == (0, 0)
    # Items that all models answer alike add nothing to what the seeds say.
    sure, unsure = [hits(*[n] * 200) for n in (1, 0, 1, 1, 0, 1)], [hits(*[0] * 200)] * 6
    known = paired(by_seed([100, 0, 100, 100, 0, 100]), by_seed([0.0] * 6))
    assert known is not None and paired_items(sure, unsure, "top1") == known.bootstrap
    assert paired_items(ours[:4], theirs[:4], "top1") is None  # too few seeds
    assert paired_items(ours, [*theirs[:5], hits(1, 0)], "top1") is None  # other items
