"""results/kernels/README.md: every table beside it, made readable."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from padst_exp.bench.report import read_csv, readable

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
- Accuracy is looked up in results/tables by structure, density and sparse layers, and belongs to
  the small demo models that were trained there, not to the model that is timed. Sides have their
  permutations folded in (`hard`) where those models learned some.
- The floor is a twin that reads and writes the same bytes and computes nothing, or the arithmetic
  at the rate of the fastest dense product, whichever takes longer; measured in the same run. Of a
  whole model it is its arithmetic, attention included, or reading its weights.
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


def _cells(rows: Rows, keys: Sequence[str]) -> list[tuple[str, ...]]:
    """All that `keys` take, those with the first key alike side by side."""
    firsts = [first for (first,) in _unique(rows, keys[0])]
    return sorted(_unique(rows, *keys), key=lambda cell: firsts.index(cell[0]))


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
    dense = [row for row in timed if row["structure"] == "dense"]
    sparse = [row for row in timed if row not in dense]
    packed = [row for row in sparse if row["form"].startswith(("packed", "condensed"))]
    text = ["### At a glance: from the slowest to the fastest of these layers\n"]
    for (density,) in _unique(packed, "density_asked"):
        own = [row for row in packed if row["density_asked"] == density]
        text.append(_ranges(f"density {density}, tokens", own, _PASS, "ratio"))
    text += [*_slower(timed), *_accuracies(timed)]
    for density, case in _unique(sparse, "density_asked", "case"):
        own = [r for r in sparse if (r["density_asked"], r["case"]) == (density, case)]
        head, lines = _layer([row for row in dense if row["case"] == case], own)
        summary = f"<summary>Every side: {case}, density {density}</summary>"
        text.append(f"<details>{summary}\n\n{table(head, lines)}\n</details>\n")
    return [*text, *_floors(packed), *_conversions(rows)]


_SIDE = ("structure", "form", "permutation")
_PASS = ("pass", "tokens")


def _layer(dense: Rows, sparse: Rows) -> tuple[list[str], list[list[str]]]:
    """Every side of one layer at one density."""
    cells = _cells(sparse, _PASS)
    milliseconds: Cells = {
        (row["pass"], row["tokens"]): row["dense_ms"] for row in sparse if row["dense_ms"]
    }
    usual = "the faster of eager and compiled dense, ms"
    lines = [[usual, *(milliseconds.get(cell, "") for cell in cells)]]
    for rows in (dense, sparse):
        for side in _unique(rows, *_SIDE):
            own = [row for row in rows if tuple(row[key] for key in _SIDE) == side]
            ratios: Cells = {(row["pass"], row["tokens"]): _ratio(row) for row in own}
            lines.append([_name(side), *(ratios.get(cell, "") for cell in cells)])
    return ["tokens", *(" ".join(cell) for cell in cells)], lines


def _name(side: Sequence[str]) -> str:
    structure, form, permutation = side
    return f"{structure}, {form}" + (
        "" if permutation == "none" else f", {permutation} permutation"
    )


def _ranges(name: str, rows: Rows, keys: tuple[str, ...], value: str) -> str:
    """A line for each side, a column for each cell of `keys`: lowest to highest `value`."""
    cells = _cells(rows, keys)
    lines = []
    for side in _unique(rows, *_SIDE):
        own = [row for row in rows if tuple(row[key] for key in _SIDE) == side]
        found = [[r[value] for r in own if tuple(r[k] for k in keys) == cell] for cell in cells]
        lines.append([_name(side), *(_range([float(v) for v in all_ if v]) for all_ in found)])
    return table([name, *(" ".join(cell) for cell in cells)], lines)


def _range(values: Sequence[float]) -> str:
    ends = [f"{value:.3g}" for value in (min(values), max(values))] if values else [""]
    return " to ".join(dict.fromkeys(ends))


def _slower(rows: Rows) -> list[str]:
    """Where sparse is slower than dense, and what training takes there."""
    ours = [row for row in rows if row["form"].startswith(("packed", "condensed", "layer"))]
    slow = [row for row in ours if row["ratio"] and float(row["ratio"]) < 1]
    if not slow:
        return []
    lines = []
    keys = *_SIDE, "density_asked", "pass"
    for *group, chosen in _unique(slow, *keys, "dispatcher"):
        alike = [row for row in ours if [row[key] for key in keys] == group]
        own = [row for row in alike if row in slow and row["dispatcher"] == chosen]
        ratios = [float(row["ratio"]) for row in own]
        where = "; ".join(
            f"{tokens}: {', '.join(r['case'] for r in own if r['tokens'] == tokens)}"
            for (tokens,) in _unique(own, "tokens")
        )
        count = f"{len(own)} of {len(alike)}; tokens {where}"
        *side, density, what = group
        lines.append([_name(side), density, what, count, _range(ratios), chosen])
    head = ["slower than dense", "density", "pass", "cells", "ratio", "trained by"]
    explained = (
        "Layers with `torch` are trained by it all the same: to train them by a dense product, "
        "their values would first have to be put into a dense weight, which takes longer.\n"
    )
    return ["### Slower than dense\n", explained, table(head, lines)]


def _floors(packed: Rows) -> list[str]:
    """How near the products that training uses come to their floor."""
    text = ["### Share of the floor: floor / time\n"] if packed else []
    for (density,) in _unique(packed, "density_asked")[:1]:
        own = [row for row in packed if row["density_asked"] == density]
        text.append(_ranges(f"density {density}, tokens", own, _PASS, "floor_share"))
    return text


def _conversions(rows: Rows) -> list[str]:
    """What a rewiring and a condensation cost."""
    own = [row for row in rows if row["pass"] == "conversion"]
    explained = (
        "Milliseconds after a rewiring (`fold`: the indices of the product, hard permutations "
        "with them) and once for inference (`condense`).\n"
    )
    conversions = _ranges("density", own, ("density_asked",), "p50_ms")
    return ["### Conversions\n", explained, conversions] if own else []


def _accuracies(rows: Rows) -> list[str]:
    own = [row for row in rows if row["accuracy"]]
    found = _unique(own, "structure", "scope", "density_asked", "accuracy")
    head = ["structure", "sparse layers", "density", "accuracy"]
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
                readable(float(row["p50_ms"])) if row["p50_ms"] else "",
                _ratio(row),
                row["floor_share"],
                row["dispatcher"],
            ]
            for row in own
        ]
        head = [
            "structure", "sparse layers", "permutations", "form", "density", "ms", "dense / this",
            "floor / this", "products by",
        ]  # fmt: skip
        text.append(table(head, lines))
    return [*text, *_accuracies(rows)]


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
            ]
            for row in rows
            if (row["case"], row["batch"]) == (case, batch)
        ]
        head = [
            "structure", "sparse layers", "permutations", "density",
            *(f"{size}, MB" for size in sizes), "kept / dense", "peak / dense",
        ]  # fmt: skip
        text += [f"### {case}, batch {batch}\n", table(head, lines)]
    return [*text, *_accuracies(rows)]


def _checks(rows: Rows) -> list[str]:
    lines = []
    for key in _unique(rows, "kernel", "structure", "dtype"):
        own = [r for r in rows if (r["kernel"], r["structure"], r["dtype"]) == key]
        worst = max(own, key=lambda row: float(row["error"]) / float(row["limit"]))
        passed = sum(row["passed"] == "True" for row in own)
        detail = f"{worst['what']}: {float(worst['error']):.2g} of {float(worst['limit']):.2g}"
        lines.append([*key, f"{passed} of {len(own)}", f"{detail} {worst['note']}".strip()])
    return [table(["kernel", "structure", "dtype", "passed", "nearest to its limit"], lines)]
