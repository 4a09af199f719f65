import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.bench_cases import CPU, NM, session
from gpu.kernel_checks import checks
from padst_exp.bench import __main__ as command
from padst_exp.bench import choices, suites, tables
from padst_exp.bench.choices import Layer
from padst_exp.bench.session import EVERY
from padst_exp.config import config_dir

RESULTS = config_dir().parent / "results"


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The command line in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    try:
        command.main()
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code
    return 0


def test_the_command_measures_and_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kernels"
    status = run(
        ["suite=layers", "device=cpu", "shapes=[48x32]", "tokens=[3]", "sparsities=[0.75]",
         "structures=[{structure:nm,group:16}]", "rounds=1", f"out={out}"], monkeypatch,
    )  # fmt: skip
    assert status == 0, capsys.readouterr().err
    (table,) = out.glob("layers-*-float32.csv")
    assert (out / "layers.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(table.open()))
    assert {row["structure"] for row in rows} == {"dense", "nm group=16"}
    for key in ("device", "dtype", "case", "density", "commit", "torch", "copy_gb_per_s"):
        assert all(row[key] for row in rows), key
    assert "nm group=16" in (out / "README.md").read_text()


def test_mistakes_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for arguments, message in (
        (["suite=layer"], "suite: expected layers or model_inference or "),
        (["suite=layers", "structures=[nn]"], "structures: 'nn' is unknown"),
        (["suite=layers", "shapes=[vit]"], "shapes: expected a width (768) or a layer (3072x768)"),
        (["suite=memory", "models=[vitt]"], "models: 'vitt' is unknown; did you mean vit?"),
        (["suite=layers", "rounds=0"], "rounds: expected at least 1, got 0"),
        (["suite=layers", "tokens=[1,0]"], "tokens: expected at least 1, got 0"),
        (["suite=layers", "sparsities=[1.0]"], "sparsities: expected a number in [0, 1), got 1.0"),
        (["suite=layers", "scopes=[some]"], "scopes: expected "),
        (["suite=layers", "threads=2", "clock=cpu"], "clock: expected wall"),
        (["suite=layers", "budget=0"], "budget: expected seconds, got 0"),
        (["suite=layers", f"out={tmp_path}/file"], "out: expected a folder to write to"),
        (["suite=gpu_all", "device=cpu"], "suite: gpu_all needs a GPU"),
        ([], "suite: missing"),
    ):
        assert run(arguments, monkeypatch) == 1, arguments
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith(f"padst_exp: error: {message}"), line


def test_results_are_readable_and_what_is_slow_is_listed(tmp_path: Path) -> None:
    for path in (RESULTS / "kernels").glob("*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "README.md").write_text(f"By hand.\n{tables.MARK}old\n")
    tables.publish(tmp_path, RESULTS / "tables")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(f"By hand.\n{tables.MARK}") and "\nold\n" not in text
    for path in tmp_path.glob("*.csv"):
        section = text.partition(f"({path.name})")[2].partition(".csv]")[0]
        for row in csv.DictReader(path.open()):
            shown = f"| {row['structure']}" in section
            assert shown or (row["suite"], row["structure"]) == ("layers", "dense"), row
            packed = row.get("form", "").startswith("packed") and row["permutation"] != "none"
            if packed and float(row["ratio"]) < 1:
                slow = section.partition("slower than dense")[2]
                assert f"\n| {row['structure']}" in slow, (path.name, row["structure"])


def test_accuracies_are_those_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "a_accuracy.csv").write_text(
        "dataset,seed,model,structure,density,value\ndigits,0,demo,nm group=16,0.1,97\n"
        "digits,1,demo,nm group=16,0.1009,98\ndigits,0,zeroed,,,10\n"
        "digits,2,demo,nm group=16,0.1,\ntext,0,gpt2,unstructured,0.1,30\n"
    )
    reached = tables.accuracies(tmp_path)
    assert reached("nm group=16", 0.1, "all") == "digits 97.5"
    assert reached("unstructured", 0.1, "all") == "text 30.0"
    for structure, density, scope in (
        ("nm group=16", 0.05, "all"),
        ("nm group=16", 0.1, "dense_qkv"),
        ("nm", 0.1, "all"),
    ):
        assert reached(structure, density, scope) == "-"
    assert tables.accuracies(tmp_path / "none")("unstructured", 0.1, "all") == "-"


def test_wrong_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(entry: dict[str, object]) -> set[str]:
        layer, kind = Layer(40, 105, split=3), choices.sparsity(entry)
        return {c.kernel for c in checks(kind, layer, 0.25, 5, torch.float32, CPU) if c.reason}

    # The function of that name hides the module.
    product = importlib.import_module("padst_exp.structures.product")
    for name, entry in (("tile_matmul", NM), ("entry_matmul", {"structure": "diag", "bundle": 1})):
        assert refused(entry) == set()
        right = getattr(product, name)

        def wrong(x: Tensor, *rest: object, backend: str, right: object = right) -> Tensor:
            y: Tensor = right(x, *rest, backend=backend)  # type: ignore[operator]
            return y * 1.001 if backend == "native" else y

        monkeypatch.setattr(product, name, wrong)
        assert refused(entry) == {"packed, native"}


def test_verdicts_of_tests_that_end_and_of_those_that_do_not(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    assert suites.read_verdicts(path) == {}
    lines = [
        ("nm", EVERY, "a", "did not end"), ("nm", "packed, triton", "a", ""),
        ("nm", EVERY, "a", ""), ("nm", EVERY, "b", "did not end"),
        ("nm", "packed, triton", "b", "dX: error 1"), ("nm", "packed, torch", "b", ""),
        ("nm", EVERY, "b", ""),
        ("diag", "packed, triton", "a", ""), ("diag", EVERY, "b", "did not end"),
    ]  # fmt: skip
    names = ("structure", "kernel", "test", "reason")
    path.write_text("\n".join(json.dumps(dict(zip(names, line, strict=True))) for line in lines))
    own = session(verdicts=suites.read_verdicts(path))
    assert own.refusal("nm", "packed, triton") == "dX: error 1"
    assert own.refusal("nm", "packed, torch") == "" and own.refusal("nm", "masked dense") == ""
    assert own.refusal("nm", "packed, triton, CUDA graph") == "dX: error 1"
    assert own.refusal("nm", "packed, cuda") == "was not checked"
    assert own.refusal("diag", "packed, triton") == "did not end"


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
