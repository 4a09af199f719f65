import csv
import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.bench_cases import CPU, NM, keys, run
from gpu.kernel_checks import checks
from hostile import DAMAGED, undone
from padst_exp.bench import choices, suites, tables
from padst_exp.bench.choices import Layer
from padst_exp.config import config_dir
from padst_exp.errors import UserError

RESULTS = config_dir().parent / "results"


def test_the_command_measures_and_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kernels"
    status = run(
        ["suite=layers", "device=cpu", "shapes=[{inputs:48,outputs:32}]", "tokens=[3]",
         "sparsities=[0.75]", "structures=[{structure:nm,group:16}]", "rounds=1", f"out={out}"],
        monkeypatch,
    )  # fmt: skip
    assert status == 0, capsys.readouterr().err
    (table,) = out.glob("layers-*-float32.csv")
    assert (out / "layers.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(table.open()))
    assert {row["structure"] for row in rows} == {"dense", "nm group=16"}
    for key in ("device", "dtype", "case", "density", "commit", "torch", "copy_gb_per_s"):
        assert all(row[key] for row in rows), key
    assert "nm group=16" in (out / "README.md").read_text()


def test_a_gpu_is_measured_from_a_checkout_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(suites, "ROOT", tmp_path)
    with pytest.raises(UserError, match="suite: expected a checkout"):
        suites.gpu_all({}, print)


def test_mistakes_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for arguments, message in (
        (["suite=layers", "structures=[nn]"], "structures: 'nn' is unknown"),
        (["suite=memory", "models=[vitt]"], "models: 'vitt' is unknown; did you mean vit?"),
        (["suite=layers", "+colour=1"], "colour: unknown key"),
        (["suite=layers", f"out={tmp_path}/file"], "out: expected a folder to write to"),
        (["suite=gpu_all"], "suite: expected another one, since there is no GPU"),
        ([], "suite: expected layers, fan_in, "),
    ):
        if torch.cuda.is_available() and "GPU" in message:
            continue
        assert run(arguments, monkeypatch) == 1, arguments
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith(f"padst_exp: error: {message}"), line
    even = {"inputs": 4, "outputs": 4, "kernel": 2}
    for changes, message in (
        ({"shapes": [768]}, "shapes: expected list[{inputs: int, outputs: int,"),
        ({"shapes": [even]}, "shapes: expected sizes of at least 1, and odd kernels"),
        ({"rounds": 0}, "rounds: expected at least 1, got 0"),
        ({"tokens": [1, 0]}, "tokens: expected at least 1, got 0"),
        ({"batches": [0]}, "batches: expected at least 1, got 0"),
        ({"sparsities": [1.0]}, "sparsities: expected a number in [0, 1), got 1.0"),
        ({"scopes": ["some"]}, "scopes: expected "),
        ({"threads": 2, "clock": "cpu"}, "clock: expected wall"),
        ({"threads": 5000}, "threads: expected at most 1024, got 5000"),
        ({"tokens": [10**12]}, "tokens: expected what fits into "),
        ({"tokens": [10**20]}, "tokens[0]: expected an integer of at most "),
        ({"batches": [10**12]}, "batches: expected what fits into "),
        ({"shapes": [{**even, "kernel": 0, "inputs": 10**12}]}, "shapes: expected what fits into "),
    ):
        with pytest.raises(UserError) as error:
            keys("layers", **changes)  # type: ignore[arg-type]
        assert str(error.value).startswith(message), error.value


def test_results_are_readable_and_what_is_slow_is_counted(tmp_path: Path) -> None:
    for path in (RESULTS / "kernels").glob("*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "README.md").write_text(f"By hand.\n{tables.MARK}old\n")
    tables.publish(tmp_path, RESULTS / "tables")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(f"By hand.\n{tables.MARK}") and "\nold\n" not in text
    shown: dict[str, dict[str, str]] = {}  # by file: what is slower than dense, by line
    for section in text.partition(tables.MARK)[2].split("\n- [")[1:]:
        (names, _, *lines) = [line[2:-2].split(" | ") for line in section.splitlines()
                              if line.startswith("| ")] or [[], []]  # fmt: skip
        path = section.partition("]")[0]
        shown[path] = {line[0]: line[names.index("slower than dense")] for line in lines}
    # Files of one table stand above it.
    for path, following in reversed(list(itertools.pairwise(shown))):
        shown[path] = shown[path] or shown[following]
    assert set(shown) == {path.name for path in tmp_path.glob("*.csv")}
    for path, slower in shown.items():
        for row in csv.DictReader((tmp_path / path).open()):
            form = row.get("form", "")
            if row["structure"] != "dense" and not form.startswith(("masked", "torch")):
                assert any(name.startswith(row["structure"]) for name in slower), row
            if form.startswith("packed") and row["permutation"] != "none":
                soft = ", soft" * (row["permutation"] == "soft")
                assert float(row["ratio"]) >= 1 or slower[row["structure"] + soft][0] != "0", row


def test_damaged_tables_are_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    own, accuracies = tmp_path / "own", tmp_path / "tables"
    own.mkdir()
    accuracies.mkdir()
    table, known = own / "memory-a-float32.csv", accuracies / "demo_accuracy.csv"
    (sound,) = (RESULTS / "kernels").glob("memory-*.csv")
    table.write_bytes(sound.read_bytes())
    known.write_text("structure,dataset,seed,density,value\nnm,digits,0,0.1,97\n")
    readme = own / "README.md"
    readme.write_text("By hand.\n")
    head, first, *_ = table.read_text().splitlines(keepends=True)
    number = head.split(",").index("tokens")
    cells = first.split(",")
    cells[number] = "many"
    files = {table: set(DAMAGED) - {"flipped bytes", "a little short", "half", "missing"},
             known: {"empty", "a pointer of Git LFS", "a folder", "a pipe", "no end"},
             readme: {"a folder", "a pipe", "another encoding"}}  # fmt: skip
    for path, damages in files.items():
        whole = path.read_bytes()
        own_ways = {"only a head": head, "dense only": head + first, "no number": ",".join(cells)}
        for what in [*sorted(damages), *(own_ways if path is table else ())]:
            if what in own_ways:
                path.write_text(head + own_ways[what] if what == "no number" else own_ways[what])
            else:
                DAMAGED[what](path)
            with pytest.raises(UserError) as error:
                tables.accuracies(accuracies, 0.1)
                tables.publish(own, accuracies)
            line = str(error.value)
            assert line.startswith("out: expected ") and "\n" not in line, (what, line)
            assert str(path) in line, (what, line)
            assert {file.name for file in own.iterdir()} == {table.name, "README.md"}, what
            undone(path, whole)
    assert readme.read_text() == "By hand.\n"
    # What the next run of the same suite replaces may be anything.
    table.write_text("x")
    assert tables.sections(own, accuracies, without=table) == []


def test_accuracies_are_means_at_a_density(tmp_path: Path) -> None:
    (tmp_path / "demo_accuracy.csv").write_text(
        "dataset,seed,model,structure,density,value\ndigits,0,demo,nm group=16,0.1,97\n"
        "digits,1,demo,nm group=16,0.1009,98\ndigits,0,zeroed,,,10\n"
        "digits,2,demo,nm group=16,0.1,\ntext,0,gpt2,unstructured,0.1,30\n"
    )
    found = tables.accuracies(tmp_path, 0.1).fillna("").to_dict("index")
    assert found == {"nm group=16": {"digits": "97.5", "text": ""},
                     "unstructured": {"digits": "", "text": "30.0"}}  # fmt: skip
    assert tables.accuracies(tmp_path, 0.05).empty
    assert tables.accuracies(tmp_path / "none", 0.1).empty


def test_wrong_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(entry: dict[str, object]) -> set[str]:
        layer, kind = Layer(inputs=40, outputs=105, split=3), choices.sparsities(entry)[0]
        return {c.kernel for c in checks(kind, layer, 0.25, 5, torch.float32, CPU) if c.reason}

    # The function of that name hides the module.
    product = importlib.import_module("padst_exp.structures.product")
    for name, entry in (("tile_matmul", NM), ("entry_matmul", {"structure": "diag", "bundle": 1})):
        assert refused(entry) == set()
        right = getattr(product, name)

        def wrong(x: Tensor, *rest: object, right: object = right, **how: object) -> Tensor:
            y: Tensor = right(x, *rest, **how)  # type: ignore[operator]
            return y * 1.001 if how["backend"] == "native" else y

        monkeypatch.setattr(product, name, wrong)
        assert refused(entry) == {"packed, native"}


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; import padst_exp.bench.__main__; "
        "print({'torch', 'timm', 'matplotlib', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={"PYTHONPATH": ":".join(sys.path)}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "set()\n", "")
