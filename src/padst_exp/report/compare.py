"""From rows of runs to tables of arms: means over seeds, paired with a baseline, beside papers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from padst_exp.report import published, statistics, store
from padst_exp.report.published import Published
from padst_exp.report.statistics import Closure, Difference, Floats, Interval, Sample
from padst_exp.report.store import Row, learned

Outcomes = Mapping[str, Floats]
UPPER, LOWER, PLAIN = "rigl", "random", "none"
"""Arms that span the gap to close, and one without permutations, where an experiment has them."""
UNKNOWN = "another"
# What is swept is written as key=value key=value.
_WORDS = re.compile(r" (?=[\w.@/]+=)", re.ASCII)


@dataclass(frozen=True)
class Arm:
    """One line of a table: all seeds of one arm under one choice of what is swept.

    Args:
        name: of the arm.
        swept: what is swept beside it, e.g. `{"sparsity": "0.9"}`.
        rows: its runs, whatever their state.
        sample: over the seeds that have a finite value; None without any.
        not_finite: seeds that finished and have none.
        missing: seeds whose run is not finished, or damaged.
        baseline: the arm that it is paired with, by seed; empty for none.
        difference: to that arm.
        p: of that difference, adjusted (Holm) for all comparisons of the table.
        closure: of the gap between random permutations and RigL.
        papers: published numbers of the same method, model and sparsity.
        comparable: whether they are on the same data, at the papers' scale.
    """

    name: str
    swept: Mapping[str, str]
    rows: tuple[Row, ...]
    sample: Sample | None
    not_finite: int
    missing: int
    baseline: str = ""
    difference: Difference | None = None
    p: float | None = None
    closure: Closure | None = None
    papers: tuple[Published, ...] = ()
    comparable: bool = False

    @property
    def first(self) -> Row:
        """A row that stands for all in what they share."""
        return next((row for row in self.rows if row["value"] is not None), self.rows[0])

    @property
    def sparsity(self) -> float:
        """Asked of the sparse layers, 0 for a dense model."""
        try:
            return 0.0 if self.first["structure"] == "dense" else float(self.first["sparsity"])
        except ValueError:
            return 0.0

    @property
    def permutation(self) -> str:
        """ "none", "random" or "learned"."""
        chosen = str(self.first["permutation"])
        return "learned" if learned(chosen) else chosen or "none"

    def words(self, keys: Collection[str]) -> str:
        """What is swept, of some keys."""
        return _swept_words(self.swept, keys)

    def by_seed(self) -> dict[int, float]:
        """The finite values."""
        return {row["seed"]: row["value"] for row in self.rows if row["value"] is not None}


@dataclass(frozen=True)
class Contrast:
    """Two arms that their experiment lists to be compared, the first less the second.

    Args:
        swept: what both share of what is swept.
        ours, theirs: names of the arms.
        difference: paired by seed.
        p: of it, adjusted (Holm) for all contrasts of the table.
    """

    swept: Mapping[str, str]
    ours: str
    theirs: str
    difference: Difference
    p: float | None = None

    def words(self, keys: Collection[str]) -> str:
        """What is swept, of some keys."""
        return _swept_words(self.swept, keys)


@dataclass(frozen=True)
class Table:
    """The arms of an experiment at one scale, of one model on one data set.

    `comparisons` is the size of the family of tests that p values of arms are adjusted for;
    `contrasts` are a family of their own.
    """

    experiment: str
    scale: str
    model: str
    dataset: str
    metric: str
    arms: tuple[Arm, ...]
    comparisons: int
    contrasts: tuple[Contrast, ...] = ()

    @property
    def varying(self) -> list[str]:
        """The keys that are swept, and not the same in all arms."""
        keys = dict.fromkeys(key for arm in self.arms for key in arm.swept)
        return [key for key in keys if len({arm.swept.get(key) for arm in self.arms}) > 1]

    @property
    def lower_is_better(self) -> bool:
        """Whether less of the metric is better."""
        return lower_is_better(self.metric)


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better."""
    return any(word in metric for word in ("perplexity", "loss"))


def tables(
    rows: Sequence[Row],
    papers: Sequence[Published],
    *,
    baseline: str | None = None,
    outcomes: Outcomes = MappingProxyType({}),
) -> list[Table]:
    """Compare the arms of one experiment, at each scale, for each model and data set.

    Args:
        rows: of the experiment.
        papers: published numbers.
        baseline: arm to pair all others with; None: a learned permutation with a random one, a
            random one with none, of the same structure and algorithm.
        outcomes: by the name of a run, where they are known: of each item that it was tested on.

    Raises:
        UserError: the experiment lists a contrast of what is no arm of it.
    """
    whole: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["state"] != "repeat":
            whole[row["scale"], row["model"], row["dataset"]].append(row)
    # What never began has no model; it belongs to the only table there is, else to one of its own.
    known = [key for key in whole if key[1]]
    for key in [key for key in whole if not key[1]]:
        same = [other for other in known if other[0] == key[0]]
        if len(same) == 1:
            whole[same[0]] += whole.pop(key)
    return [_table(key, own, papers, baseline, outcomes) for key, own in whole.items()]


def _table(
    key: tuple[str, str, str],
    rows: Sequence[Row],
    papers: Sequence[Published],
    named: str | None,
    outcomes: Outcomes,
) -> Table:
    metric = next((row["metric"] for row in rows if row["metric"]), "")
    arms: list[Arm] = []
    cells = [
        {name: _arm(name, swept, own, metric) for name, own in by_name.items()}
        for swept, by_name in _cells(rows)
    ]
    for plain in cells:
        arms += [_compared(arm, plain, named, outcomes) for arm in plain.values()]
    # An arm that stands in several cells may be compared with another such: that is one test.
    tests = {_test(arm): arm.difference.p for arm in arms if arm.difference}
    adjusted = dict(zip(tests, statistics.holm(list(tests.values())), strict=True))
    scale, model, dataset = key
    arms = [
        _beside(replace(arm, p=adjusted.get(_test(arm))), papers, scale, model, dataset, metric)
        for arm in arms
    ]
    comparisons = sum(p is not None for p in adjusted.values())
    experiment = rows[0]["experiment"]
    contrasts = _contrasts(store.contrasts(experiment), cells, outcomes)
    return Table(experiment, scale, model, dataset, metric, tuple(arms), comparisons, contrasts)


def _cells(rows: Sequence[Row]) -> list[tuple[dict[str, str], dict[str, list[Row]]]]:
    """The rows of each arm, for every choice of what is swept.

    An arm that has no part in a key of the experiment (or is dense, whatever sparsity is swept)
    stands in all cells that differ in it alone.
    """
    chosen = [_chosen(row) for row in rows]
    keys = dict.fromkeys(key for choice in chosen for key in choice)
    # What tells runs apart that an experiment does not sweep is not known of earlier rows.
    own = store.params(rows[0]["experiment"])
    foreign = [key for key in keys if own and key not in (*own, "sparsity")]
    chosen = [dict.fromkeys(foreign, UNKNOWN) | choice for choice in chosen]
    whole = [choice for choice in chosen if choice.keys() == keys.keys()] or chosen
    cells = []
    for choice in sorted(_unique(whole), key=lambda one: [_natural(one.get(k, "")) for k in keys]):
        by_name: dict[str, list[Row]] = defaultdict(list)
        for row, other in zip(rows, chosen, strict=True):
            if all(choice.get(key) == value for key, value in other.items()):
                by_name[row["arm"]].append(row)
        cells.append((choice, by_name))
    return cells


def _unique(choices: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return list({tuple(sorted(choice.items())): choice for choice in choices}.values())


def _natural(text: str) -> tuple[bool, float, str]:
    """Numbers by size, before everything else."""
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text


def _chosen(row: Row) -> dict[str, str]:
    """What is swept beside arm and seed, of one run."""
    words = [word.partition("=")[::2] for word in _WORDS.split(str(row["swept"])) if word]
    chosen = dict(words)
    if row["sparsity"] != "":
        chosen.setdefault("sparsity", str(row["sparsity"]))
    if row["structure"] == "dense":
        chosen.pop("sparsity", None)
    return chosen


def _swept_words(swept: Mapping[str, str], keys: Collection[str]) -> str:
    return " ".join(f"{key}={value}" for key, value in swept.items() if key in keys)


def _test(arm: Arm) -> tuple[object, ...]:
    """What is compared, whichever cell it stands in."""
    sample = arm.difference.sample if arm.difference else None
    return arm.name, arm.baseline, tuple(row["run"] for row in arm.rows), sample


def _arm(name: str, swept: Mapping[str, str], rows: Sequence[Row], metric: str) -> Arm:
    # Another metric (of averaged weights, say) is another quantity.
    rows = [row if row["metric"] in ("", metric) else {**row, "value": None} for row in rows]
    one_each: dict[int, Row] = {}
    for row in rows:
        if row["seed"] not in one_each or one_each[row["seed"]]["value"] is None:
            one_each[row["seed"]] = row
    own = tuple(one_each.values())
    values = [row["value"] for row in own if row["value"] is not None]
    return Arm(
        name=name,
        swept=swept,
        rows=own,
        sample=statistics.sample(values) if values else None,
        not_finite=sum(row["value"] is None and row["state"] == "finished" for row in own),
        missing=sum(row["state"] != "finished" for row in own),
    )


def _compared(arm: Arm, arms: Mapping[str, Arm], named: str | None, outcomes: Outcomes) -> Arm:
    base = named if named is not None and named in arms else _baseline(arm, arms)
    if base and base != arm.name:
        arm = replace(arm, baseline=base, difference=_difference(arm, arms[base], outcomes))
    lower, upper = _lower(arm, arms), _upper(arms)
    if lower and upper and arm.name not in (lower, upper) and arm.sample:
        ends = (arms[name].by_seed() for name in (lower, upper))
        less = lower_is_better(str(arm.first["metric"]))
        closure = statistics.gap_closure(arm.by_seed(), *ends, lower_is_better=less)
        arm = replace(arm, closure=closure)
    return arm


def _contrasts(
    pairs: Sequence[tuple[str, str]], cells: Sequence[Mapping[str, Arm]], outcomes: Outcomes
) -> tuple[Contrast, ...]:
    """Each pair in every cell that has both arms; two arms that stand in several are one test."""
    found: dict[tuple[str, ...], Contrast] = {}
    for ours, theirs in pairs:
        for arms in cells:
            if ours not in arms or theirs not in arms:
                continue
            both = arms[ours], arms[theirs]
            test = (ours, theirs, *(row["run"] for arm in both for row in arm.rows))
            if test in found:
                shared = dict(found[test].swept.items() & both[0].swept.items())
                swept = {key: shared[key] for key in both[0].swept if key in shared}
                found[test] = replace(found[test], swept=swept)
                continue
            difference = _difference(*both, outcomes)
            if difference is not None:
                found[test] = Contrast(both[0].swept, ours, theirs, difference)
    adjusted = statistics.holm([contrast.difference.p for contrast in found.values()])
    return tuple(
        replace(contrast, p=p) for contrast, p in zip(found.values(), adjusted, strict=True)
    )


def _difference(arm: Arm, base: Arm, outcomes: Outcomes) -> Difference | None:
    difference = statistics.paired(arm.by_seed(), base.by_seed())
    if difference is None:
        return None
    return replace(difference, over_items=_over_items(arm, base, outcomes))


def _over_items(arm: Arm, base: Arm, outcomes: Outcomes) -> Interval | None:
    seeds = sorted(arm.by_seed().keys() & base.by_seed().keys())
    if len(seeds) < statistics.FEWEST:
        return None
    both = [
        [
            outcomes.get(next(row["run"] for row in one.rows if row["seed"] == seed))
            for seed in seeds
        ]
        for one in (arm, base)
    ]
    known = [[each for each in own if each is not None] for own in both]
    if any(len(own) < len(seeds) for own in known):
        return None
    return statistics.paired_items(known[0], known[1], str(arm.first["metric"]))


def _baseline(arm: Arm, arms: Mapping[str, Arm]) -> str:
    """The arm that another one is to be compared with, empty for none.

    With a permutation that is one with a random one, else one without, of the same structure and
    algorithm; what has another structure is no control.
    """
    if arm.permutation == "none":
        return ""
    stem = arm.name.removesuffix("_learned").removesuffix("_random")
    named = [stem, PLAIN] if arm.permutation == "random" else [f"{stem}_random", LOWER, stem, PLAIN]
    if arm.permutation == "random" and arm.name != LOWER:
        named.insert(0, LOWER)
    for name in named:
        if name != arm.name and name in arms and _alike(arm, arms[name]):
            return name
    found = _only(arm, arms, "random") if arm.permutation == "learned" else ""
    return found or _only(arm, arms, "none")


def _lower(arm: Arm, arms: Mapping[str, Arm]) -> str:
    """The arm with random permutations from which a gap is counted, empty for none."""
    stem = arm.name.removesuffix("_learned")
    named = next((name for name in (f"{stem}_random", LOWER) if name in arms), "")
    return named or _only(arm, arms, "random")


def _alike(arm: Arm, other: Arm) -> bool:
    keys = ("structure", "dst", "transform")
    return all(other.first[key] in (arm.first[key], "") for key in keys)


def _only(arm: Arm, arms: Mapping[str, Arm], permutation: str) -> str:
    """The only arm of the same structure and algorithm with such permutations."""
    found = [
        other.name for other in arms.values()
        if other.permutation == permutation and other.name != arm.name and _alike(arm, other)
    ]  # fmt: skip
    return found[0] if len(found) == 1 else ""


def _upper(arms: Mapping[str, Arm]) -> str:
    if UPPER in arms:
        return UPPER
    found = [
        arm.name for arm in arms.values()
        if arm.first["method"] == UPPER and arm.permutation == "none"
    ]  # fmt: skip
    return found[0] if len(found) == 1 else ""


def _beside(
    arm: Arm, papers: Sequence[Published], scale: str, model: str, dataset: str, metric: str
) -> Arm:
    found = published.matching(
        papers, model=model, dataset=dataset, metric=metric,
        method=arm.first["method"], sparsity=arm.sparsity,
    )  # fmt: skip
    same = scale == "paper" and all(row.dataset == dataset for row in found)
    return replace(arm, papers=tuple(found), comparable=bool(found) and same)
