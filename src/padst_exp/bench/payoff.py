"""Will it pay? One linear layer, sparse beside dense, and from which sparsity on it is as fast.

    python -m padst_exp.bench shape=3072x768 tokens=788 structure=nm structure.group=64

Everything is measured, by the mechanisms of the suite `layers`; nothing is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import OmegaConf

from padst_exp import dispatch
from padst_exp.bench import contenders, layers
from padst_exp.bench.choices import QUESTION, Keys, Layer, Sparsity, keys_of
from padst_exp.bench.session import Contender, Row, Session
from padst_exp.bench.suites import start
from padst_exp.config import build, options, require_sparsity
from padst_exp.errors import UserError, require
from padst_exp.memory import require_memory
from padst_exp.structures import Dense

DEFAULT_SPARSITY = 0.9
# Where the bracket of a break-even is narrow enough, and timings of each contender until then.
WIDTH, ROUNDS = 0.04, 5


@dataclass(frozen=True)
class Question:
    """One layer with so many tokens, in a structure with hard permutations."""

    keys: Keys
    layer: Layer
    tokens: int
    sparsity: float
    kind: Sparsity


def question_of(cfg: Mapping[str, Any], label: str) -> Question:
    """The question that the keys of a run ask; `label` is how they name the structure.

    Raises:
        UserError: in one line that names the key.
    """
    for key in ("suite", "shapes", "structures", "sparsities", "models", "batches", "scopes"):
        require(cfg[key] is None, key, cfg[key], "null beside shape, which asks about one layer")
    sizes = re.fullmatch(r"([1-9]\d{0,9})x([1-9]\d{0,9})", str(cfg["shape"]))
    wanted = "inputs x outputs of a linear layer, such as 3072x768"
    if sizes is None:
        raise UserError(f"shape: expected {wanted}, got {cfg['shape']}")
    layer = Layer(inputs=int(sizes[1]), outputs=int(sizes[2]))
    require_memory("shape", cfg["shape"], 4.0 * layer.inputs * layer.outputs)
    tokens = cfg["tokens"]
    require(type(tokens) is int and tokens >= 1, "tokens", tokens, "one number of at least 1")
    sparsity = DEFAULT_SPARSITY if cfg["sparsity"] is None else cfg["sparsity"]
    require(isinstance(sparsity, float | int), "sparsity", sparsity, "a number in [0, 1)")
    require_sparsity("sparsity", sparsity)
    known = ", ".join(name for name in options("structure") if name != "dense")
    require(cfg.get("structure") is not None, "structure", "none", f"one of {known}")
    structure = build(OmegaConf.create(dict(cfg["structure"])), "structure")
    require(not isinstance(structure, Dense), "structure", "dense", f"one of {known}")
    suite = {"suite": "layers", "sparsities": [float(sparsity)], "tokens": [tokens],
             "shapes": [{"inputs": layer.inputs, "outputs": layer.outputs}]}  # fmt: skip
    keys = keys_of({**cfg, **suite, **dict.fromkeys(QUESTION)})
    return Question(keys, layer, tokens, float(sparsity), Sparsity(label, structure, "hard"))


def answer(cfg: Mapping[str, Any], label: str, say: Callable[[str], None]) -> None:
    """Say, in a few lines, what a sparse layer takes beside a dense one.

    Args:
        cfg: conf/bench.yaml with what the command line changed, in plain containers.
        label: of the structure, as the command line has it.
        say: takes a line for a person.

    Raises:
        UserError: a key is wrong, or the structure cannot hold that sparsity in such a layer.
    """
    question = question_of(cfg, label)
    comparison = Comparison(start(question.keys, say), question)
    say(comparison.about())
    for what in layers.PASSES:
        for line in comparison.lines(what):
            say(f"{what}: {line}")


@dataclass(frozen=True)
class Measured:
    """A sparse layer beside the fastest of some dense ones, in one kind of pass.

    Args:
        sparsity: that the layer has.
        row: of the table that the suite `layers` would write.
    """

    sparsity: float
    row: Mapping[str, Any]

    @property
    def ratio(self) -> float:
        """Time of the dense layer over its own: the median."""
        return float(self.row["ratio"])

    def __str__(self) -> str:
        return f"{self.sparsity:.1%} ({self.ratio:.3g} times as fast)"


class Comparison:
    """The layer of a question at any sparsity, by the backend that `auto` takes, beside dense."""

    def __init__(self, session: Session, question: Question) -> None:
        self.session, self.question = session, question
        self.dense = contenders.dense(session, question.layer)
        self._sparse: dict[float, Contender] = {}
        self.sparse(question.sparsity)  # refused before anything is timed

    def about(self) -> str:
        """What is measured, and where, in one line."""
        question, where = self.question, self.session.columns
        threads = f", {where['threads']} thread(s)" if where["threads"] else ""
        return (
            f"{question.layer.label}, {question.tokens} tokens, {question.kind.label}, permutation "
            f"folded in; {where['device']}{threads}, {where['dtype']}, {where['clock']} time"
        )

    def lines(self, what: str) -> Iterator[str]:
        """What one kind of pass takes, and from which sparsity on it pays."""
        asked = self.measure(what, self.question.sparsity, self.session.rounds, self.dense)
        row = asked.row
        yield (
            f"dense {row['dense_ms']:.4g} ms ({row['dense_form']}), {asked.sparsity:.1%} sparse "
            f"{row['p50_ms']:.4g} ms ({row['form'].removeprefix('packed, ')}): {row['ratio']:.3g} "
            f"times as fast (quartiles {row['ratio_q1']:.3g} to {row['ratio_q3']:.3g})"
            f"{_beside_others(row)}"
        )
        (best,) = [one for one in self.dense if row["dense_form"].split(",")[0] == one.form]

        def at(sparsity: float) -> Measured:
            return self.measure(what, sparsity, min(ROUNDS, self.session.rounds), [best])

        yield break_even(asked, at)

    def measure(
        self, what: str, sparsity: float, rounds: int, dense: Sequence[Contender]
    ) -> Measured:
        """Time the layer at a sparsity, in turn with dense ones.

        Raises:
            UserError: the structure cannot hold it, or the layer cannot run.
        """
        session, question = replace(self.session, rounds=rounds), self.question
        one = self.sparse(sparsity)
        about: Row = {"tokens": question.tokens, "pass": what}
        rows = layers.cell(session, question.layer, [*dense, one], about)
        own = rows[rows.structure != "dense"]
        require(len(own) < len(rows), "shape", question.layer.label, "one that runs as dense")
        require(len(own) > 0, "structure", one.structure, "one that runs; see the line above")
        return Measured(1 - one.density, own.loc[own.p50_ms.idxmin()].to_dict())

    def sparse(self, sparsity: float) -> Contender:
        """The layer at a sparsity, by the backend that `auto` takes there.

        Raises:
            UserError: the structure cannot hold it.
        """
        if sparsity not in self._sparse:
            session, question = self.session, self.question
            density = round(1 - sparsity, 6)
            one = contenders.sparse(session, question.layer, question.kind, density)
            module, sample = one.modules[0], session.inputs(question.layer.example(1))
            picks = dispatch.choose(
                module,
                lambda: module(sample),
                samples=question.tokens,
                device=session.device,
                compiled=False,
            )
            (pick,) = picks.values()
            form = f"packed, {pick.backend}"
            self._sparse[sparsity] = contenders.several(session, replace(one, form=form))
        return self._sparse[sparsity]


def break_even(asked: Measured, at: Callable[[float], Measured]) -> str:
    """From which sparsity on a layer is as fast as dense, in words: found by halving a bracket.

    Args:
        asked: what was measured first.
        at: measures at a sparsity; raises a `UserError` at one that the structure cannot hold.
    """
    slower: Measured | None = None
    faster: Measured | None = None
    low, high, now, sparsity = 0.0, 1.0, asked, asked.sparsity
    while True:
        if now.ratio >= 1:
            high, faster = sparsity, now
        else:
            low, slower = sparsity, now
        if high - low <= WIDTH:
            break
        sparsity = round((low + high) / 2, 4)
        try:
            now = at(sparsity)
        except UserError:  # this structure holds few sparsities
            break
    if faster is None:
        return f"as fast as dense at none that was measured, up to {slower}"
    if slower is None:
        return f"as fast as dense at all that were measured, down to {faster}"
    return f"break-even between {slower} and {faster}"


def _beside_others(row: Mapping[str, Any]) -> str:
    """What a dense product by other kernels than PyTorch's takes, where that is faster."""
    if row["strongest_form"] == row["dense_form"]:
        return ""
    return f"; {row['ratio_strongest']:.3g} times {row['strongest_form']}"
