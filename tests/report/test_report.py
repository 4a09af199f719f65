import csv
import html
import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from hostile import DAMAGED, HOSTILE_YAML, undone
from padst_exp.analysis.masks import connections, mask
from padst_exp.engine.distributed import World
from padst_exp.errors import UserError
from padst_exp.layers import sparse_layers
from padst_exp.report import __main__ as command
from padst_exp.report import (
    choices,
    compare,
    exhibits,
    published,
    runs,
    statistics,
    store,
    tables,
    write,
)
from padst_exp.report.compare import Table
from padst_exp.report.pictures import picture
from padst_exp.restore import restore_run
from programs import exit_status
from report.made import made, swept

RANDOM, LEARNED, NONE = "permutation=random", "permutation=doubly_stochastic", "permutation=none"
PUBLISHED = Path(__file__).parents[2] / "results" / "paper" / "published.csv"
EVIL = "<script>alert('x')</script>\"'&$\\frac{1}{0}$"


def report(folder: Path, out: Path, **keys: object) -> tuple[list[str], str]:
    """What is said, and the page."""
    given = {"experiments": None, "baseline": None, "kernels": out, "published": PUBLISHED}
    said = list(write.report([folder], out=out, **{**given, **keys}))  # type: ignore[arg-type]
    return said, (out / "report.html").read_text()


def compared(folder: Path, baseline: str | None = None) -> list[Table]:
    rows = [row for row, _ in store.rows(runs.find([folder]).placed)]
    by_experiment, _ = store.merged(folder / "no tables", rows)
    papers = published.read(PUBLISHED)
    return [
        table
        for own in by_experiment.values()
        for table in compare.tables(own, papers, baseline=baseline)
    ]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three arms at six seeds, one of whose values is known to differ by 2."""
    folder = tmp_path_factory.mktemp("sweep")
    for arm, permutation, gain in (
        ("nm", NONE, 0.0), ("nm_random", RANDOM, -1.0), ("nm_learned", LEARNED, 2.0)
    ):  # fmt: skip
        for seed in range(6):
            value = 80 + seed + gain + 0.1 * (seed % 2) * gain
            name = f"run-{arm}-{seed}"
            made(folder, name, value, overrides=("structure=nm", permutation), seed=seed)
            swept(folder, "small_one", name, arm, seed)
    for seed in range(6):
        name = f"run-rigl-{seed}"
        made(folder, name, 85.0 + seed, overrides=("structure=unstructured", NONE), seed=seed)
        swept(folder, "small_one", name, "rigl", seed)
    return folder


def test_a_sweep_becomes_tables_and_a_page(sweep: Path, tmp_path: Path) -> None:
    said, page = report(sweep, tmp_path)
    assert "small_one: 24 finished" in said[0]
    rows = list(csv.DictReader((tmp_path / "tables" / "small_one.csv").open()))
    assert len(rows) == 24 and {row["scale"] for row in rows} == {"demo"}
    (row,) = [row for row in rows if row["arm"] == "nm_learned" and row["seed"] == "3"]
    assert float(row["value"]) == 80 + 3 + 2 + 0.2 and row["permutation"] == "doubly_stochastic"
    assert (row["structure"], row["dst"], row["model"], row["dataset"], row["commit"]) == (
        "nm group=16", "rigl", "vit", "digits", "0" * 40
    )  # fmt: skip
    assert (row["input_wait_share"], row["mfu"]) == ("0.25", "")
    assert len(row["config_hash"]) == 8 and row["torch"] == "2.14.1" and row["dirty"] == "False"
    again = "python -m padst_exp.train -m experiment=small_one scale=demo seed=0,1,2,3,4,5"
    for text in (page, (tmp_path / "tables" / "small_one.md").read_text()):
        assert "demo scale" in text and again in text
        assert "84.60" in text and "+3.15" in text  # mean of the learned arm, and its gain
    # Self-contained: nothing is loaded from anywhere, and no script runs.
    assert not re.search(r"<script|<link|src=\"(?!data:)|href=\"(?!#)|url\((?!#)|@import", page)
    assert page.count("<svg") >= 3 and "prefers-color-scheme: dark" in page


def test_arms_are_paired_with_their_controls(sweep: Path) -> None:
    (table,) = compared(sweep)
    arms = {arm.name: arm for arm in table.arms}
    controls = {name: arm.baseline for name, arm in arms.items()}
    assert controls == {"nm": "", "nm_random": "nm", "nm_learned": "nm_random", "rigl": ""}
    learned = arms["nm_learned"]
    assert learned.difference is not None and learned.difference.sample.n == 6
    assert learned.difference.sample.mean == pytest.approx(3.15)
    assert learned.p is not None and learned.p < 0.001 and table.comparisons == 2
    closure = learned.closure
    assert closure is not None and closure.value == pytest.approx(3.15 / 6.05)
    (named,) = compared(sweep, baseline="rigl")
    assert {arm.baseline for arm in named.arms} == {"", "rigl"}


def lists(experiment: str, contrasts: object, conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be an experiment with five arms and these contrasts."""
    names = ("nm", "nm_random", "nm_learned", "rigl", "set")
    sweeper = {"arms": {name: {} for name in names}, "contrasts": contrasts}
    (conf / "experiment").mkdir(parents=True, exist_ok=True)
    content = yaml.safe_dump({"hydra": {"sweeper": sweeper}})
    (conf / "experiment" / f"{experiment}.yaml").write_text(content)
    monkeypatch.setattr(store, "config_dir", lambda: conf)
    store._sweeper.cache_clear()


@pytest.fixture
def no_cache() -> Iterator[None]:
    yield
    store._sweeper.cache_clear()


@pytest.mark.usefixtures("no_cache")
def test_contrasts_are_a_family_of_their_own(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [["rigl", "nm_random"], ["nm_learned", "nm"], ["nm_random", "nm"], ["set", "nm"]]
    lists("small_one", pairs, tmp_path / "conf", monkeypatch)
    (table,) = compared(sweep)
    # There is no run of set, so its contrast is left out.
    assert [[one.ours, one.theirs] for one in table.contrasts] == pairs[:3]
    values = {arm.name: arm.by_seed() for arm in table.arms}
    for one in table.contrasts:
        apart = [values[one.ours][seed] - values[one.theirs][seed] for seed in range(6)]
        assert one.difference.sample.mean == pytest.approx(np.mean(apart))
        assert one.difference.sample.n == 6 and one.swept == table.arms[0].swept
    ps = [one.difference.p for one in table.contrasts]
    assert [one.p for one in table.contrasts] == statistics.holm(ps) != ps
    assert table.comparisons == 2  # of the arms with their controls, which know nothing of it
    _, page = report(sweep, tmp_path / "out")
    for name in ("small_one.md", "small_one.tex", "report.html"):
        text = page if name == "report.html" else (tmp_path / "out/tables" / name).read_text()
        minus = "$-$" if name.endswith("tex") else tables.MINUS
        learned = "nm\\_learned" if name != "report.html" else "nm_learned"
        assert f"{learned} {minus} nm" in text and "small" in text.split("contrasts: top-1")[0]
        (note,) = re.findall(r"A family of its own, .* its (\d+) comparisons\.", text)
        assert note == "3" and f"set {minus} nm" not in text


@pytest.mark.usefixtures("no_cache")
def test_a_contrast_in_several_cells_is_one_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists("cells", [["nm_random", "nm"], ["rigl", "set"]], tmp_path / "conf", monkeypatch)
    for arm, structure, groups in (
        ("nm", "nm", ("16", "32")), ("nm_random", "nm", ("16", "32")),
        ("rigl", "unstructured", ("",)), ("set", "unstructured", ("",)),
    ):  # fmt: skip
        for group in groups:
            for seed in range(3):
                name, value = f"{arm}{group}-{seed}", 50 + seed + len(arm) * (1 + seed)
                chosen = {"structure.group": group} if group else {}
                more = [f"{key}={value}" for key, value in chosen.items()]
                permutation = RANDOM if arm == "nm_random" else NONE
                overrides = (f"structure={structure}", permutation, *more)
                made(tmp_path, name, value, overrides=overrides, seed=seed)
                swept(tmp_path, "cells", name, arm, seed, swept=chosen)
    (table,) = compared(tmp_path)
    grid = tables.contrasts(table)
    assert grid is not None
    names = [column.heading for column in grid.columns]
    assert names[:4] == ["contrast", "swept", "seeds", "difference"]
    minus = tables.MINUS
    assert [row[:2] for row in grid.cells] == [
        (f"nm_random {minus} nm", "structure.group=16"),
        (f"nm_random {minus} nm", "structure.group=32"),
        (f"rigl {minus} set", ""),
    ]
    assert "its 3 comparisons" in grid.notes[0]
    drawn = exhibits.contrasts(table)
    assert drawn is not None
    assert [column.heading for column in drawn.grid.columns[1:]] == [
        row[1] for row in grid.cells[:2]
    ]
    paired, free = drawn.grid.cells
    assert paired[1].startswith("+") and paired[0] == grid.cells[0][0]
    assert free[1] == free[2] and free[0] == grid.cells[2][0]  # it stands in both


@pytest.mark.usefixtures("no_cache")
def test_a_contrast_of_what_is_no_arm_is_named(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = "hydra.sweeper.contrasts: expected two arms of experiment=small_one"
    for wrong, message in (
        ([["nm", "rigl"], ["nm_lerned", "nm"]],
         f"{two}; did you mean nm_learned?, got ['nm_lerned', 'nm']"),
        ([["nm", "nm"]], f"{two}, got ['nm', 'nm']"),
        ([["nm"]], f"{two}, got ['nm']"),
        ([["nm", {"a": 1}]], f"{two}; known: nm, nm_learned, nm_random, rigl, set, got ['nm', "),
        (["nm"], f"{two}, got 'nm'"),
        ("nm\nrigl", "hydra.sweeper.contrasts: expected pairs of arms, got 'nm\\nrigl'"),
    ):  # fmt: skip
        lists("small_one", wrong, tmp_path / "conf", monkeypatch)
        with pytest.raises(UserError, match=f"^{re.escape(message)}"):
            report(sweep, tmp_path / "out")
    for nothing in (None, []):
        lists("small_one", nothing, tmp_path / "conf", monkeypatch)
        (table,) = compared(sweep)
        assert table.contrasts == () and tables.contrasts(table) is None


def test_what_every_image_says_is_in_the_interval(sweep: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sweep, tmp_path / "runs")
    for path in sorted(folder.glob("run-*")):
        value = json.loads((path / "summary.json").read_text())["final"]["top1"]
        right = np.random.default_rng(0).permutation(1000) < 10 * value
        np.save(path / "outcomes.npy", np.stack([right, np.ones(1000)], 1).astype(np.float32))
        assert runs.read(path).outcomes() is not None
    _, page = report(folder, tmp_path / "out")
    markdown = (tmp_path / "out" / "tables" / "small_one.md").read_text()
    assert "with items" in page and "with items" in markdown.split("\n")[2]
    # It stays when runs are gone: what their items said lies beside the table.
    gone = shutil.copytree(folder, tmp_path / "fewer")
    for path in gone.glob("run-nm_learned-*"):
        shutil.rmtree(path)
    (gone / "sweeps" / "small_one.jsonl").unlink()
    report(gone, tmp_path / "out")
    assert (tmp_path / "out" / "tables" / "small_one.md").read_text() == markdown
    kept = tmp_path / "out" / "tables" / "small_one.safetensors"
    content = kept.read_bytes()
    wrong = "empty", "half", "a little short", "zeros", "deep", "a folder", "a pipe", "no end"
    for name in wrong:
        DAMAGED[name](kept)
        with pytest.raises(UserError, match=r"^out: expected outcomes of items that a report"):
            report(gone, tmp_path / "out")
        undone(kept, content)
    # What cannot be read, or is not what training writes, is known of nobody.
    (path,) = folder.glob("run-nm_learned-3*")
    sound = (path / "outcomes.npy").read_bytes()
    for damage in DAMAGED.values():
        damage(path / "outcomes.npy")
        assert runs.read(path).outcomes() is None
        undone(path / "outcomes.npy", sound)
    for wrong in (np.zeros((0, 2)), np.ones((50, 3)), np.full((9, 2), np.nan), np.ones((50, 2))):
        np.save(path / "outcomes.npy", wrong.astype(np.float32))
        assert runs.read(path).outcomes() is None
    np.save(path / "outcomes.npy", np.array([[print]], object), allow_pickle=True)
    assert runs.read(path).outcomes() is None


def test_unpaired_seeds_single_seeds_ties_and_missing_arms(tmp_path: Path) -> None:
    for arm, permutation, values in (
        ("block_random", RANDOM, {0: 50.0, 1: 60.0, 7: 55.0}),
        ("block_learned", LEARNED, {1: 60.0, 7: 55.0, 9: 99.0}),
        ("diag_learned", LEARNED, {0: 40.0}),
    ):
        for seed, value in values.items():
            structure = f"structure={arm.partition('_')[0]}"
            made(tmp_path, f"{arm}-{seed}", value, overrides=(structure, permutation), seed=seed)
            swept(tmp_path, "gaps", f"{arm}-{seed}", arm, seed)
    (table,) = compared(tmp_path)
    arms = {arm.name: arm for arm in table.arms}
    block = arms["block_learned"]
    assert block.difference is not None and block.difference.sample.n == 2  # seeds 1 and 7
    assert block.difference.sample.mean == 0 and block.difference.p is None and block.p is None
    alone = arms["diag_learned"]
    assert alone.baseline == "" and alone.sample is not None and alone.sample.sd is None
    cells = tables.grid(table)
    assert "nan" not in tables.markdown(cells).lower() and table.comparisons == 0


def test_what_is_there_to_start_from_is_no_replicate(tmp_path: Path) -> None:
    for seed in range(3):
        made(tmp_path, f"own-{seed}", 50.0 + seed, overrides=("experiment=structures",), seed=seed)
    for seed in range(2):
        swept(tmp_path, "structures", f"own-{seed}", "a", seed)
    (table,) = compared(tmp_path)
    assert [sorted(arm.by_seed()) for arm in table.arms] == [[0, 1]]
    said, _ = report(tmp_path, tmp_path / "out")
    assert any("own-2: in no sweep" in line for line in said)
    (tmp_path / "sweeps" / "structures.jsonl").unlink()
    (table,) = compared(tmp_path)
    assert [sorted(arm.by_seed()) for arm in table.arms] == [[0, 1, 2]]


def test_what_has_no_result_is_listed(tmp_path: Path) -> None:
    made(tmp_path, "whole", 50.0)
    made(tmp_path, "wholly", 50.0, seed=6)
    made(tmp_path, "diverged", float("nan"), seed=1)
    made(tmp_path, "cut", None, seed=2)
    made(tmp_path, "damaged", 60.0, seed=3)
    (tmp_path / "damaged" / "summary.json").write_text('{"monitor": "top1", "final": {"to')
    made(tmp_path, "other", 60.0, seed=4)
    (tmp_path / "other" / "config.yaml").write_text("seed: [")
    swept(tmp_path, "begun", "never", "a", 0)
    swept(tmp_path, "begun", "whole", "a", 5)  # of another seed than its config
    (tmp_path / "sweeps" / "begun.jsonl").open("a").write('{"run": 3}\n{"run": "../../x"')
    (tmp_path / "sweeps" / "noise.jsonl").write_bytes(b"\xff\xfe\x00")
    out = tmp_path / "out"
    said, page = report(tmp_path, out)
    assert any("begun.jsonl: 2 lines" in line for line in said)
    assert any("noise.jsonl" in line for line in said)
    text = html.unescape(page)
    for name, state in (
        ("diverged", "not finite"), ("cut", "unfinished"), ("damaged", "damaged"),
        ("other", "damaged"), ("never", "not begun"),
    ):  # fmt: skip
        assert re.search(rf"<td>{name}</td><td>{state}</td>", text), name
    assert "last row is of step 7" in text and "its seed is 0" in text
    (table,) = (t for t in compared(tmp_path) if t.experiment == "single_runs" and t.metric)
    (arm,) = (arm for arm in table.arms if arm.sample)
    assert arm.sample is not None and arm.sample.n == 1
    assert (arm.not_finite, arm.missing) == (1, 2)


def test_a_folder_without_runs_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for folder in (tmp_path / "runs", tmp_path / "none"):
        with pytest.raises(UserError, match=r"^runs: .* none in .*experiment=structures .* some$"):
            report(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    made(tmp_path / "runs", "begun", None)
    said, page = report(tmp_path / "runs", tmp_path / "out")
    assert any("experiment=structures" in line for line in said)
    assert "No finished runs yet; this makes some: <code>python -m padst_exp.train" in page
    with pytest.raises(UserError, match=r"^runs: expected folders of runs, got .* \(it is a file"):
        (tmp_path / "file").touch()
        report(tmp_path / "file", tmp_path / "out")


def test_strings_of_others_are_data(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    made(folder, "evil<b>", 50.0, overrides=("structure=nm", LEARNED), monitor=EVIL)
    made(folder, "evil2", None, seed=1, config={"arm": EVIL, "sparsity": EVIL})
    swept(folder, "attack", "evil<b>", EVIL, 0, swept={EVIL: EVIL}, scale=EVIL, overrides=[EVIL])
    swept(folder, "..", "evil<b>", "a", 0)
    (folder / "sweeps" / "<img src=x>.jsonl").write_text(
        (folder / "sweeps" / "attack.jsonl").read_text()
    )
    environment = json.loads((folder / "evil<b>" / "env.json").read_text())
    changed = {**environment, "device": EVIL, "git_commit": EVIL, "packages": {"torch": EVIL}}
    (folder / "evil<b>" / "env.json").write_text(json.dumps(changed))
    _, page = report(folder, tmp_path / "out")
    assert "alert(" in page and not re.search(r"<script|<img src=x|<b>", page)
    # Nothing of theirs is a tag, in HTML or in SVG.
    tags = set(re.findall(r"<([a-zA-Z!/]+)", page))
    assert not tags & {"script", "b", "iframe", "object", "a onclick"}
    written = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")
    }
    assert all(re.fullmatch(r"report\.html|tables|tables/[\w.]+", name) for name in written), (
        written
    )
    markdown = (tmp_path / "out" / "tables" / "attack.md").read_text()
    assert "<script" not in markdown.split("~~~")[0]
    latex = (tmp_path / "out" / "tables" / "attack.tex").read_text()
    assert r"\frac" not in latex and r"\textbackslash{}frac" in latex


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "env.json", "overrides.yaml",
                                  "metrics.jsonl"])  # fmt: skip
def test_no_damage_to_a_file_ends_the_report(name: str, tmp_path: Path) -> None:
    path = made(tmp_path, "run", 50.0) / name
    sound = path.read_bytes()
    for what, damage in DAMAGED.items():
        damage(path)
        (pair,) = runs.find([tmp_path]).placed
        (row,) = store.rows([pair])[0][:1]
        assert row["state"] in ("finished", "unfinished", "damaged"), what
        undone(path, sound)
    for text in HOSTILE_YAML:
        path.write_text(text)
        assert runs.read(path.parent).state in ("finished", "damaged", "unfinished")
        path.write_bytes(sound)


def test_rows_stay_until_a_run_takes_their_place(tmp_path: Path) -> None:
    folder, out = tmp_path / "runs", tmp_path / "out"
    for seed in range(3):
        made(folder, f"run-{seed}", 50.0 + seed, overrides=("experiment=structures",), seed=seed)
    report(folder, out)
    shutil.rmtree(folder / "run-0")
    shutil.rmtree(folder / "run-1")
    made(folder, "run-1", 77.0, overrides=("experiment=structures",), seed=1)
    (folder / "run-2" / "summary.json").unlink()  # begun anew, not finished
    said, _ = report(folder, out)
    assert not any("another config" in line for line in said)
    kept = {row["seed"]: row["value"] for row in store.read(out / "tables" / "structures.csv")}
    assert kept == {0: 50.0, 1: 77.0, 2: 52.0}
    # Runs of another config at the same place are named; what tells them apart is never averaged.
    shutil.rmtree(folder)
    made(folder, "run-1", 78.0, overrides=("experiment=structures", "trainer.steps=50"), seed=1)
    said, _ = report(folder, out)
    assert "structures: 1 rows were of runs with another config" in said
    for steps in (60, 70):
        more = ("experiment=structures", f"trainer.steps={steps}")
        made(folder, f"run-{steps}", float(steps), overrides=more, seed=2)
    report(folder, out)
    (table,) = compare.tables(store.read(out / "tables" / "structures.csv"), [])
    cells = {arm.swept["trainer.steps"]: arm.by_seed() for arm in table.arms}
    assert cells == {"50": {1: 78.0}, "60": {2: 60.0}, "70": {2: 70.0}, "another": cells["another"]}
    assert cells["another"] == {0: 50.0, 1: 78.0, 2: 52.0}
    # A table of something else is never overwritten.
    (out / "tables" / "structures.csv").write_text("what,ratio\na,1\n")
    said, _ = report(folder, out)
    assert "structures_runs.csv" in said[0]
    assert (out / "tables" / "structures.csv").read_text() == "what,ratio\na,1\n"
    (out / "tables" / "structures_runs.csv").write_text(",".join(store.COLUMNS) + '\n"a')
    with pytest.raises(UserError, match=r"^out: expected a table of runs"):
        report(folder, out)


def test_a_run_that_was_only_listed_leaves_no_row_behind_once_it_has_run(tmp_path: Path) -> None:
    folder, out = tmp_path / "runs", tmp_path / "out"
    folder.mkdir()
    swept(folder, "lists", "listed", "nm", 0)
    for value in (None, 60.0):
        if value is not None:
            made(folder, "listed", value, overrides=("structure=nm", NONE))
        report(folder, out)
        (row,) = store.read(out / "tables" / "lists.csv")
        assert row["value"] == value


def test_the_same_run_twice_is_one_replicate(tmp_path: Path) -> None:
    for name in ("run", "run-2"):
        made(tmp_path, name, 50.0, overrides=("experiment=structures",))
    (table,) = compared(tmp_path)
    assert table.arms[0].sample is not None and table.arms[0].sample.n == 1
    states = [run.state for _, run in runs.find([tmp_path]).placed]
    assert sorted(states) == ["finished", "repeat"]


def test_a_sweep_takes_the_newest_finished_folder_of_a_name(tmp_path: Path) -> None:
    made(tmp_path, "run", 50.0)
    made(tmp_path, "run-2", 51.0, config={"sparsity": 0.5})
    made(tmp_path, "run-3", None)
    swept(tmp_path, "e", "run", "a", 0)
    placed = {run.path.name: place for place, run in runs.find([tmp_path]).placed}
    assert placed["run-2"].experiment == "e" and placed["run-2"].arm == "a"
    assert placed["run"].experiment == placed["run-3"].experiment == runs.NO_EXPERIMENT


def test_an_arm_without_a_part_in_what_is_swept_stands_in_every_cell(tmp_path: Path) -> None:
    """The layout of the headline experiments: a control of its own for every arm."""
    sizes = ("16", "32")
    wanted = [
        *(("none", "structure=block", NONE, size) for size in sizes),
        *(("random", "structure=block", RANDOM, size) for size in sizes),
        *(("learned_paper", "structure=block", LEARNED, size) for size in sizes),
        *(("transplanted", "structure=block", RANDOM, size) for size in sizes),
        ("fan_in_16", "structure=fan_in", NONE, ""),
        ("rigl", "structure=unstructured", NONE, ""),
        ("rigl_learned", "structure=unstructured", LEARNED, ""),
        ("dense", "structure=dense", NONE, ""),
    ]
    for number, (arm, structure, permutation, size) in enumerate(wanted):
        for seed in range(3):
            block = (f"structure.size={size}",) if size else ()
            sparsity = "0" if arm == "dense" else "0.95"
            value = 50.0 + number + random.Random(10 * number + seed).random()
            made(tmp_path, f"{number}-{seed}", value, seed=seed,
                 overrides=(structure, permutation, *block, f"sparsity={sparsity}"))  # fmt: skip
            chosen = {"sparsity": float(sparsity)} | ({"structure.size": int(size)} if size else {})
            swept(tmp_path, "headline", f"{number}-{seed}", arm, seed, swept=chosen)
    (table,) = compared(tmp_path)
    assert table.varying == ["structure.size"] and "sparsity=0.95" in tables.grid(table).caption
    for size in sizes:
        arms = {arm.name: arm for arm in table.arms if arm.swept["structure.size"] == size}
        assert set(arms) == {arm for arm, *_ in wanted}
        assert {name: arm.baseline for name, arm in arms.items()} == {
            "none": "", "random": "none", "learned_paper": "random", "transplanted": "random",
            "fan_in_16": "", "rigl": "", "rigl_learned": "rigl", "dense": "",
        }  # fmt: skip
        assert all(arm.sample is not None and arm.sample.n == 3 for arm in arms.values())
    # rigl_learned against rigl is one test, although it stands in both cells.
    assert table.comparisons == 7
    drawn = exhibits.results(table)
    assert drawn is not None
    names = [row[0] for row in drawn.grid.cells]
    assert "learned_paper size=16" in names and names.count("rigl") == 1


def test_runs_of_one_arm_that_differ_in_more_than_their_seed_are_never_averaged(
    tmp_path: Path,
) -> None:
    for steps in (100, 200):
        for arm, permutation in (("nm", NONE), ("nm_random", RANDOM)):
            for seed in (0, 1):
                name, more = f"{arm}-{steps}-{seed}", (f"trainer.steps={steps}", "dst=set")
                made(tmp_path, name, steps / 4 + seed + seed * (arm == "nm"), seed=seed,
                     overrides=("structure=nm", permutation, *more))  # fmt: skip
                said = [f"arm={arm}", "structure=nm", permutation, *more]
                swept(tmp_path, "twice", name, arm, seed, overrides=said)
    (table,) = compared(tmp_path)
    assert table.varying == ["trainer.steps"]
    found = {(arm.name, arm.swept["trainer.steps"]): arm for arm in table.arms}
    assert len(found) == 4 and all(arm.sample and arm.sample.n == 2 for arm in found.values())
    assert found["nm_random", "200"].baseline == "nm"
    assert found["nm_random", "200"].sample.mean == 50.5  # type: ignore[union-attr]
    # What was on the command line is in the command that makes the numbers again.
    *made_by, reported = tables.grid(table).commands
    start = "python -m padst_exp.train -m experiment=twice scale=demo structure=nm"
    assert set(made_by) == {f"{start} trainer.steps={n} dst=set seed=0,1" for n in (100, 200)}
    assert reported == "python -m padst_exp.report experiments=[twice]"


def test_published_numbers_stand_beside_ours() -> None:
    papers = published.read(PUBLISHED)
    assert len(papers) == 301

    def values(**keys: object) -> list[float]:
        given = {"model": "vit", "dataset": "imagenet1k", "metric": "top1", "method": "rigl",
                 "sparsity": 0.9, **keys}  # fmt: skip
        return [row.value for row in published.matching(papers, **given)]  # type: ignore[arg-type]

    assert values() == [77.24, 76.39] and values(metric="ema_top1") == [77.24, 76.39]
    assert values(method="dynadiag", sparsity=0.95) == [69.54]
    assert values(method="dense", sparsity=0.4)[0] == 78.5
    assert values(method="rigl", sparsity=0.91) == [] == values(method="")
    # On other data they are shown, and not subtracted.
    assert values(dataset="digits") == [77.24, 76.39]
    assert published.read(Path("nowhere.csv")) == []


def test_a_difference_to_a_paper_is_given_at_its_scale_on_its_data_only(tmp_path: Path) -> None:
    imagenet = ("dataset=imagenet1k", "structure=unstructured", NONE)
    made(tmp_path, "ours", 78.24, overrides=imagenet)
    for experiment, scale in (("as_printed", "paper"), ("smaller", "small")):
        swept(tmp_path, experiment, "ours", "rigl", 0, scale=scale)
    for table in compared(tmp_path):
        grid = tables.grid(table)
        assert SCALE[table.scale] in grid.caption
        row = dict(zip((c.heading for c in grid.columns), grid.cells[0], strict=True))
        assert row["published"].startswith("77.24 (DynaDiag, Table 1)")
        assert ("ours less published" in row) == (table.scale == "paper")
    (paper,) = (t for t in compared(tmp_path) if t.scale == "paper")
    assert "+1.00; +1.85" in tables.markdown(tables.grid(paper))


SCALE = {"paper": "paper scale", "small": "not the papers' numbers"}


def test_a_mask_is_drawn_from_a_checkpoint(real_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(real_run, folder / "run")
    _, page = report(folder, tmp_path / "out")
    assert page.count('src="data:image/png;base64,') == 3  # the mask, the permutation, and both
    found = picture(runs.read(folder / "run"))
    model = restore_run(folder / "run", World()).model
    layer = sparse_layers(model)[found.layer]
    assert torch.equal(found.mask, mask(layer.parts()[0]))
    assert torch.equal(found.connections, connections(layer)[0])
    assert found.permutation is not None and found.density == found.mask.double().mean()
    assert bool((found.permutation.sum(0) == 1).all() and (found.permutation.sum(1) == 1).all())
    for damage in (lambda p: p.write_bytes(b"PK"), Path.unlink):
        for path in (folder / "run" / "checkpoints").glob("*.pt"):
            damage(path)
        assert "data:image/png" not in report(folder, tmp_path / "out")[1]


def test_options_are_found_again() -> None:
    from report.made import _composed

    for chosen in (
        {"structure": "fan_in", "dst": "srigl", "permutation": "none"},
        {"structure": "diag", "dst": "dynadiag", "permutation": "random"},
        {"structure": "butterfly", "dst": "static", "transform": "sparse_wide"},
        {"structure": "block", "dst": "chts", "permutation": "gumbel_sinkhorn", "model": "mixer"},
        {"structure": "dense", "dst": "mest", "model": "vit_large", "dataset": "fashion_mnist"},
    ):
        config = _composed(tuple(f"{group}={name}" for group, name in chosen.items()))
        for group, name in chosen.items():
            assert choices.nearest_option(group, config[group]) == name
    assert choices.nearest_option("model", {"_target_": "elsewhere.Model"}) == "own"
    assert choices.nearest_option("dst", None) == "own"
    node = {"_target_": "padst_exp.structures.Diagonal", "bundle": "stride", "stride": 32}
    assert choices.structure_label({**node, "width": 16}) == "diag bundle=stride stride=32"


def command_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, main: Callable[[], None] = command.main
) -> int:
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    return exit_status(main)


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs"
    for arm in ("rigl", "set"):
        made(folder, arm, 50.0, overrides=("structure=unstructured", f"dst={arm}", NONE))
        swept(folder, "small_one", arm, arm, 0)
    keys = [f"runs={folder}", f"out={tmp_path}", f"published={PUBLISHED}", f"kernels={tmp_path}"]
    assert command_line([*keys, "experiments=[small_one]", "baseline=rigl"], monkeypatch) == 0
    assert "report.html" in capsys.readouterr().err
    for wrong, message in (
        ("experiments=[nothing]", "experiments: expected some of small_one, got nothing"),
        ("baseline=nobody", "baseline: expected the name of an arm, got nobody"),
        ("colour=red", "colour: unknown key"),
        ("out=/dev/null", "out: expected a folder to write to, got /dev/null"),
        (f"runs={tmp_path}/no out={tmp_path}/new", "runs: expected folders with runs, found none"),
    ):
        assert command_line([*keys, *wrong.split()], monkeypatch) == 1
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith(f"padst_exp: error: {message}"), line
    assert not (tmp_path / "new").exists()
