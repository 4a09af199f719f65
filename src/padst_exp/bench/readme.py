"""results/kernels/README.md: every table beside it, made readable."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from padst_exp.bench.report import read_csv

Rows = Sequence[dict[str, str]]
Cells = dict[tuple[str, ...], str]

INTRODUCTION = """# Sparse layers and models beside dense ones

Made from the CSV files beside it by `python -m padst_exp.bench suite=...`; nothing is typed in.

- All sides of a table are timed in one process, in turn, after a warm-up. A ratio is dense time
  over sparse time, the median over rounds of neighbouring timings; the CSV has its quartiles, and
  p20, p50 and p80 of every time. **Above 1 the sparse side is faster; rows below 1 stand here
  too**, with what the dispatcher chose.
- `a / b`: a is against the faster of eager and compiled PyTorch, b against the fastest dense side
  there is. On CPUs that is oneDNN called directly, since PyTorch multiplies single precision by
  MKL, which leaves half of an AMD core unused. One number where both are the same.
- Weights rotate through more memory than the last-level cache holds, as inside a model.
- Accuracy is looked up in results/tables by structure, density and scope, and belongs to the small
  demo models that were trained there, not to the model that is timed.
- The floor is a twin that reads and writes the same bytes and computes nothing, or the arithmetic
  at the rate of the fastest dense product, whichever takes longer; measured in the same run.
"""
TITLES = {
    "checks": "Checks against float64",
    "layers": "Single layers",
    "model_inference": "Inference of whole models",
    "model_train": "Training steps of whole models",
    "memory": "Memory of a training step",
}


def write(folder: Path) -> Path:
    """Write the README of all tables in `folder`."""
    text = [INTRODUCTION]
    sections = {
        "checks": _checks,
        "layers": _layers,
        "model_inference": _models,
        "model_train": _models,
        "memory": _memory,
    }
    for suite, section in sections.items():
        for path in sorted(folder.glob(f"{suite}-*.csv")):
            rows = read_csv(path)
            text.append(f"## {TITLES[suite]}: {path.stem.removeprefix(f'{suite}-')}\n")
            text.append(_where(rows[0]))
            picture = path.with_suffix(".png")
            if picture.exists():
                text.append(f"![{TITLES[suite]}]({picture.name})\n")
            text += section(rows)
    readme = folder / "README.md"
    readme.write_text("\n".join(text).rstrip() + "\n")
    return readme


def _where(row: dict[str, str]) -> str:
    """Device and versions of a table."""
    threads = f"{row['threads']} thread" + ("" if row["threads"] == "1" else "s")
    cpu = f" ({row['instructions']}), {threads}" if row["instructions"] else ""
    triton = f", triton {row['triton']}" if row["triton"] else ""
    dirty = " with changes" if row["dirty"] == "True" else ""
    text = (
        f"{row['device']}{cpu}, {row['dtype']}, torch {row['torch']}{triton}, {row['clock']} time, "
        f"commit {row['commit']}{dirty}"
    )
    if row.get("gemm_gflops"):
        rates = f"{row['gemm_gflops']} GFLOP/s, copies {row['copy_gb_per_s']} GB/s"
        text += f"; dense products reach {rates}"
    return text + ".\n"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _unique(rows: Rows, *keys: str) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def _ratio(row: dict[str, str]) -> str:
    """Against the usual dense side, and against the fastest where that is another."""
    if not row["ratio"]:
        return row["note"].partition(":")[0] or ""
    usual = f"{float(row['ratio']):.2f}"
    if row["strongest_form"] == row["dense_form"]:
        return usual
    return f"{usual} / {float(row['ratio_strongest']):.2f}"


def _layers(rows: Rows) -> list[str]:
    timed = [row for row in rows if row["pass"] != "conversion"]
    text = []
    for (what,) in _unique(timed, "pass"):
        own = [row for row in timed if row["pass"] == what]
        cells = _unique(own, "case", "tokens")
        dense = [row for row in own if row["structure"] == "dense"]
        for (density,) in _unique([row for row in own if row not in dense], "density_asked"):
            text.append(f"### {what}, density {density}\n")
            head = ["layer, tokens", *(f"{case}, {tokens}" for case, tokens in cells)]
            sparse = [row for row in own if row["density_asked"] == density and row not in dense]
            lines = [_milliseconds(sparse, cells)]
            lines += [_line(dense, key, cells) for key in _unique(dense, *_SIDE)]
            lines += [_line(sparse, key, cells) for key in _unique(sparse, *_SIDE)]
            text.append(table(head, lines))
    return [*text, *_slower(timed), *_floors(timed), *_conversions(rows), *_accuracies(timed)]


_SIDE = ("structure", "form", "permutation")


def _name(side: tuple[str, ...]) -> str:
    structure, form, permutation = side
    return f"{structure}, {form}" + (
        "" if permutation == "none" else f", {permutation} permutation"
    )


def _line(
    rows: Rows, side: tuple[str, ...], cells: Sequence[tuple[str, ...]], value: str = ""
) -> list[str]:
    found: Cells = {
        (row["case"], row["tokens"]): row[value] if value else _ratio(row)
        for row in rows
        if tuple(row[key] for key in _SIDE) == side
    }
    return [_name(side), *(found.get(cell, "") for cell in cells)]


def _milliseconds(rows: Rows, cells: Sequence[tuple[str, ...]]) -> list[str]:
    """How long the usual dense side takes."""
    found: Cells = {
        (row["case"], row["tokens"]): row["dense_ms"] for row in rows if row["dense_ms"]
    }
    return ["the faster of eager and compiled dense, ms", *(found.get(c, "") for c in cells)]


def _slower(rows: Rows) -> list[str]:
    """Where sparse is slower than dense, and what training takes there."""
    slow = [row for row in rows if row["ratio"] and float(row["ratio"]) < 1 and row["dispatcher"]]
    if not slow:
        return []
    lines = []
    for key in _unique(slow, "structure", "form", "pass", "dispatcher"):
        own = [r for r in slow if (r["structure"], r["form"], r["pass"], r["dispatcher"]) == key]
        ratios = [float(row["ratio"]) for row in own]
        total = sum(
            (r["structure"], r["form"], r["pass"]) == key[:3] and bool(r["ratio"]) for r in rows
        )
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append([f"{key[0]}, {key[1]}", key[2], f"{len(own)} of {total}", spread, key[3]])
    head = ["slower than dense", "pass", "cells", "ratio", "the dispatcher trains it by"]
    return ["### Slower than dense\n", table(head, lines)]


def _floors(rows: Rows) -> list[str]:
    """How near the products that training uses come to their floor."""
    text = []
    packed = [row for row in rows if row["form"].startswith(("packed", "condensed"))]
    for what, density in _unique(packed, "pass", "density_asked")[:2]:
        own = [r for r in packed if (r["pass"], r["density_asked"]) == (what, density)]
        cells = _unique(own, "case", "tokens")
        lines = [_line(own, key, cells, "floor_share") for key in _unique(own, *_SIDE)]
        head = ["floor / time", *(f"{case}, {tokens}" for case, tokens in cells)]
        text += [f"### Share of the floor: {what}, density {density}\n", table(head, lines)]
    return text


def _conversions(rows: Rows) -> list[str]:
    """What a rewiring and a condensation cost."""
    own = [row for row in rows if row["pass"] == "conversion"]
    cells = _unique(own, "case", "density_asked")
    lines = []
    for key in _unique(own, "structure", "form"):
        found: Cells = {
            (r["case"], r["density_asked"]): r["p50_ms"]
            for r in own
            if (r["structure"], r["form"]) == key
        }
        lines.append([f"{key[0]}, {key[1]}", *(found.get(cell, "") for cell in cells)])
    head = ["layer, density", *(f"{case}, {density}" for case, density in cells)]
    explained = (
        "Milliseconds after a rewiring (`fold`: the indices of the product) and once for "
        "inference (`condense`). A hard permutation is folded with them and costs nothing later.\n"
    )
    return ["### Conversions\n", explained, table(head, lines)] if own else []


def _accuracies(rows: Rows) -> list[str]:
    found = _unique([r for r in rows if r["accuracy"]], "structure", "density_asked", "accuracy")
    head = ["structure", "density", "accuracy with all block linears so"]
    return ["### Accuracy of these configurations\n", table(head, found)] if found else []


def _models(rows: Rows) -> list[str]:
    text = []
    for case, batch, what in _unique(rows, "case", "tokens", "pass"):
        own = [r for r in rows if (r["case"], r["tokens"], r["pass"]) == (case, batch, what)]
        text.append(f"### {case}, batch {batch}: {what}\n")
        lines = [
            [
                row["structure"],
                row["scope"] or "-",
                row["permutation"],
                row["form"],
                row["density"],
                row["p50_ms"],
                _ratio(row),
                row["dispatcher"],
                row["accuracy"],
            ]
            for row in own
        ]
        head = [
            "structure", "sparse layers", "permutations", "form", "density", "ms", "dense / this",
            "products by", "accuracy",
        ]  # fmt: skip
        text.append(table(head, lines))
    return text


def _memory(rows: Rows) -> list[str]:
    sizes = ("parameters", "gradients", "moments", "indices", "peak")
    text = []
    for case, batch in _unique(rows, "case", "batch"):
        lines = [
            [
                row["structure"],
                row["scope"] or "-",
                row["permutation"],
                row["density"],
                *(f"{int(row[f'{size}_bytes']) / 1e6:,.1f}" for size in sizes),
                row["kept_share"],
                row["peak_share"],
                row["accuracy"],
            ]
            for row in rows
            if (row["case"], row["batch"]) == (case, batch)
        ]
        head = [
            "structure", "sparse layers", "permutations", "density",
            *(f"{size}, MB" for size in sizes), "kept / dense", "peak / dense", "accuracy",
        ]  # fmt: skip
        text += [f"### {case}, batch {batch}\n", table(head, lines)]
    return text


def _checks(rows: Rows) -> list[str]:
    lines = []
    for key in _unique(rows, "kernel", "structure", "dtype"):
        own = [r for r in rows if (r["kernel"], r["structure"], r["dtype"]) == key]
        worst = max(own, key=lambda row: float(row["error"]) / float(row["limit"]))
        passed = sum(row["passed"] == "True" for row in own)
        detail = f"{worst['what']}: {float(worst['error']):.2g} of {float(worst['limit']):.2g}"
        lines.append([*key, f"{passed} of {len(own)}", f"{detail} {worst['note']}".strip()])
    return [table(["kernel", "structure", "dtype", "passed", "nearest to its limit"], lines)]
