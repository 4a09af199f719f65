"""From a run to an export and back: the entry point, in this process and as a user types it."""

import copy
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from transformers import GPT2LMHeadModel

from from_yaml import asked, from_yaml
from inference.own_models import Perceptron
from inference.small_models import assert_equal
from padst_exp import dispatch
from padst_exp.config import config_dir, read_keys
from padst_exp.engine import checkpoint
from padst_exp.engine.distributed import World
from padst_exp.errors import UserError
from padst_exp.evaluate import EvaluateSchema, evaluate
from padst_exp.export import ExportSchema, export
from padst_exp.files import sha256
from padst_exp.inference import load
from padst_exp.inference.packing import harden
from padst_exp.layers import sparse_layers
from padst_exp.restore import restore_run
from padst_exp.train import build_experiment

ROOT = Path(__file__).parents[2]
SIZES = ["model.dim=32", "model.depth=1", "model.heads=2"]
CPU = torch.device("cpu")


@functools.cache
def _composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def composed(name: str, *overrides: str) -> DictConfig:
    return copy.deepcopy(_composed(name, *overrides))


KEYS: dict[str, Any] = {"device": "cpu", "trust": "inference", "changes": ()}
OWN_MODEL = {"_target_": "inference.own_models.Perceptron", "width": 48}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("padst_exp.cache.cache_folder", lambda: tmp_path)
    return tmp_path / "timings"


def make_run(
    folder: Path,
    *overrides: str,
    averaged: bool = False,
    own_model: bool = False,
    sizes: Sequence[str] = SIZES,
) -> Path:
    """A run directory as a training leaves it at step 3, its permutations still soft."""
    cfg = composed("config", "structure=nm", "sparsity=0.5", *sizes, *overrides)
    if own_model:
        cfg.model = OWN_MODEL
        cfg.sparse = [{"pattern": "hidden", "split": 1}]
    experiment = build_experiment(cfg, World())
    model = experiment.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    state = model.state_dict()
    broken = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    (folder / "checkpoints").mkdir(parents=True)
    text = OmegaConf.to_yaml(cfg, resolve=True)
    (folder / "config.yaml").write_text(text)
    row = {"kind": "eval", "step": 3, "loss": 1.5, "top1": 40.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    payload = {
        "step": 3,
        "model": broken if averaged else state,
        "average": state if averaged else None,
        "backends": dispatch.save(dispatch.forced(model, "torch", CPU), CPU),
        "config_text": text,
        "data": experiment.task.describe(),
        # Nothing of the rest is read here.
        "optimizer": {"state": {}, "param_groups": []},
        **{key: {} for key in ("schedule", "topology", "environment", "config")},
        **{key: [] for key in ("learners", "losses", "norms", "random")},
        **dict.fromkeys(("births", "best")),
    }
    checkpoint.write(payload, folder / "checkpoints" / "last.pt")
    return folder


def keys(run: Path, **changes: Any) -> ExportSchema:
    return asked("export", ExportSchema, run=str(run), **KEYS | changes)


def metrics_of(run: Path, batch_size: int | None = None, **changes: Any) -> dict[str, float]:
    own = {"batch_size": batch_size, **KEYS, **changes}
    return evaluate(asked("evaluate", EvaluateSchema, run=str(run), **own), World())[1]


def edit_checkpoint(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = run / "checkpoints" / "last.pt"
    payload = checkpoint.read(path)
    change(payload)
    checkpoint.write(payload, path)


def first_images() -> torch.Tensor:
    validation = from_yaml("dataset/digits").validation
    return torch.stack([validation[index][0] for index in range(4)])


def hardened_logits(run: Path, inputs: torch.Tensor) -> torch.Tensor:
    model = restore_run(run, World(), trust="inference").model.eval()
    harden(model)
    return model(inputs).detach()


def test_an_export_computes_what_the_run_does(tmp_path: Path) -> None:
    """Of the weights or of their average, packed or dense; and so says its evaluation."""
    for averaged in (False, True):
        run = make_run(tmp_path / f"run {averaged}", averaged=averaged)
        inputs = first_images()
        expected = hardened_logits(run, inputs)
        for format in ("packed", "dense"):
            folder, description = export(keys(run, format=format), World())
            assert folder == run / ("export" if format == "packed" else "export-dense")
            written = json.loads((folder / "model.json").read_text())
            assert written.pop("tensors") == sha256(folder / "model.safetensors")
            assert written == {"format": 3, "shared": {}, **json.loads(json.dumps(description))}
            source = description["source"]
            assert (source["step"], source["averaged"]) == (3, averaged)
            assert source["checkpoint"] == "last.pt" and len(source["hardened"]) == 4
            assert description["metrics_of_checkpoint"] == {"loss": 1.5, "top1": 40.0}
            assert description["density_of_layers"] == 0.5
            assert description["kind"] == format
            assert_equal(load(folder)(inputs), expected, (format, averaged))


def test_an_export_evaluates_like_its_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "permutation=random")
    expected = metrics_of(run)
    for format in ("packed", "dense"):
        folder, _ = export(keys(run, format=format), World())
        assert metrics_of(folder) == pytest.approx(expected, rel=1e-5)
    (run / "checkpoints" / "last.pt").unlink()
    assert metrics_of(run / "export") == pytest.approx(expected, rel=1e-5)


def test_what_is_exported_of_gpt2_is_one(tmp_path: Path) -> None:
    """Companions go along too."""
    small = ["vocab_size=13", "context_length=9", "pool=8", "validation_samples=8"]
    data = ["dataset=synthetic_tokens", *(f"dataset.{key}" for key in small)]
    run = make_run(tmp_path / "run", "model=gpt2", "low_rank=1", *data)
    inputs = torch.randint(8, (2, 9))
    expected = hardened_logits(run, inputs)
    for format in ("packed", "dense"):
        folder, _ = export(keys(run, format=format), World())
        assert_equal(load(folder)(inputs), expected, format)
    plain: Any = GPT2LMHeadModel.from_pretrained(folder)
    assert_equal(plain(inputs).logits.detach(), expected, "transformers")


def test_packed_files_shrink_with_density(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "model.dim=64", "sparsity=0.9")
    sizes = {}
    for format in ("packed", "dense"):
        folder, _ = export(keys(run, format=format), World())
        sizes[format] = (folder / "model.safetensors").stat().st_size
    assert sizes["packed"] < 0.35 * sizes["dense"]


def test_a_dense_model_exports_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "structure=dense", "sparsity=0")
    folder, description = export(keys(run), World())
    assert description["layers"] == {} and description["density_of_layers"] == 1.0
    inputs = first_images()
    assert_equal(load(folder)(inputs), hardened_logits(run, inputs), "dense")


def test_of_a_run_that_is_not_finished_a_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"^export: .* \(a run, of which .*export run=.*\)$"):
        load(run)
    (run / "summary.json").unlink(missing_ok=True)
    said = f"{run} is not finished: last.pt is of step "
    metrics_of(run)
    assert said in capsys.readouterr().err
    (run / "summary.json").write_text('{"monitor": "top1", "final": {"top1": 1.0}}')
    metrics_of(run)
    assert said not in capsys.readouterr().err


def test_one_checkpoint_even_moved_out_of_its_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    inputs = first_images()
    expected = hardened_logits(run, inputs)
    inside, _ = export(keys(run / "checkpoints" / "last.pt"), World())
    assert inside == run / "checkpoints" / "last-export"
    moved = tmp_path / "elsewhere" / "some.pt"
    moved.parent.mkdir()
    (run / "checkpoints" / "last.pt").rename(moved)
    folder, description = export(keys(moved, out=str(tmp_path / "o" / "mine")), World())
    assert folder == tmp_path / "o" / "mine"
    assert description["source"]["run"] is None
    assert description["metrics_of_checkpoint"] == {}
    for exported in (inside, folder):
        assert_equal(load(exported)(inputs), expected, exported.name)


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "permutation=random", own_model=True)
    inputs = first_images()
    expected, expected_metrics = hardened_logits(run, inputs), metrics_of(run)
    for format in ("packed", "dense"):
        folder, description = export(keys(run, format=format), World())
        assert description["model"]["_target_"] == OWN_MODEL["_target_"]
        with pytest.raises(UserError, match=r"'inference.own_models.Perceptron' is none of padst"):
            load(folder)
        mine = Perceptron(**description["model"]["arguments"])
        assert_equal(load(folder, model=mine)(inputs), expected, format)
        other = Perceptron(**{**description["model"]["arguments"], "width": 36})
        with pytest.raises(UserError, match=r"^model: not the one in .*safetensors"):
            load(folder, model=other)
        assert metrics_of(folder) == pytest.approx(expected_metrics, rel=1e-5)


def test_an_evaluated_export_is_tuned(
    tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for precision in ("float32", "bfloat16", "float64"):
        run = make_run(tmp_path / precision, f"trainer.precision={precision}")
        folder, _ = export(keys(run), World())
        capsys.readouterr()
        metrics_of(folder, batch_size=50)
        said = capsys.readouterr().err
        wanted = rf"(major|dense) for batches of 50 in {precision}: [0-9.]+x dense on "
        assert re.search(wanted, said)
    kept = {path: path.read_text() for path in own_cache.iterdir()}
    metrics_of(folder, batch_size=50)
    assert {path: path.read_text() for path in own_cache.iterdir()} == kept
    capsys.readouterr()
    metrics_of(run)
    assert "x dense" not in capsys.readouterr().err


def test_a_head_of_zeros_exports_and_what_diverged_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")

    def silence(payload: dict[str, Any]) -> None:
        for name in ("head.weight", "head.bias"):
            payload["model"][name].zero_()

    edit_checkpoint(run, silence)
    folder, description = export(keys(run), World())
    assert description["largest_difference"] == 0
    shutil.rmtree(folder)

    def diverge(payload: dict[str, Any]) -> None:
        payload["model"]["head.bias"][0] = float("nan")

    edit_checkpoint(run, diverge)
    with pytest.raises(UserError, match=r"last\.pt: head.bias of its model is not a number"):
        export(keys(run), World())
    assert not folder.exists()


def test_a_checkpoint_of_another_model_brings_its_config_or_is_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    text = (run / "config.yaml").read_text()
    others = {"deeper": "model.depth=2", "blocks": "structure=block"}
    for name, override in others.items():
        other = make_run(tmp_path / name, override)
        shutil.copy(other / "checkpoints" / "last.pt", run / "checkpoints" / "last.pt")
        assert metrics_of(run) == metrics_of(other)
        edit_checkpoint(run, lambda payload: payload.update(config_text=text))
        with pytest.raises(UserError, match=r"^.*last\.pt: does not fit this model: [^\n]*$"):
            restore_run(run, World())


def test_backends_that_do_not_fit_are_not_taken_over(tmp_path: Path) -> None:
    """Nor what another device proved: plain PyTorch needs no proof."""
    run = make_run(tmp_path / "run")
    inputs = first_images()
    expected = hardened_logits(run, inputs)

    def by(backend: str) -> Callable[[dict[str, Any]], None]:
        def change(payload: dict[str, Any]) -> None:
            for pick in payload["backends"]["picks"].values():
                pick["backend"] = backend

        return change

    def backends() -> set[str]:
        model = restore_run(run, World()).model
        return {layer.backend for layer in sparse_layers(model).values()}

    edit_checkpoint(run, by("scatter"))
    assert backends() == {"scatter"}
    for change in (
        by("triton"),
        lambda payload: payload["backends"].update(device="another"),
        lambda payload: payload["backends"]["picks"].popitem(),
    ):
        edit_checkpoint(run, by("scatter"))
        edit_checkpoint(run, change)
        assert backends() == {"torch"}
    assert_equal(hardened_logits(run, inputs), expected, "torch")


def test_a_damaged_config_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    expected = metrics_of(run)
    folder, _ = export(keys(run), World())
    description = json.loads((folder / "model.json").read_text())
    for text, message in (
        ("a: [", "while parsing a flow node"),
        ("[1, 2]", ""),
        ("hello", ""),
        ("", ""),
        ("model: 5", ""),
        ("speed: 5", ""),
    ):
        (run / "config.yaml").write_text(text)
        (folder / "model.json").write_text(json.dumps({**description, "config": text}))
        wanted = rf"run: expected a training config, got .*%s \({message}[^\n]*\)"
        with pytest.raises(UserError, match=f"^{wanted % 'model.json'}$"):
            metrics_of(folder)
        capsys.readouterr()  # a run has its config in its checkpoint as well
        assert metrics_of(run) == expected
        said = capsys.readouterr().err
        assert re.match(f"warning: {wanted % 'config.yaml'}; taking the one in .*last.pt", said)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    export(keys(run), World())
    for wrong, message in (
        (keys(tmp_path), "run: .* is no run directory, it has no config.yaml"),
        (keys(tmp_path / "nowhere"), "run: .*nowhere is no run directory"),
        (keys(run, out=str(run)), "out: .* exists and is no export; choose another folder"),
        (keys(run), "out: .* holds an export already; overwrite=true"),
    ):
        with pytest.raises(UserError, match=rf"^{message}[^\n]*$"):
            export(wrong, World())
    one_file = "run: .* is one file of an export, give its folder"
    for path, message in (
        (run / "config.yaml", r"checkpoint: expected one that training wrote, got .*config\.yaml "),
        (run / "export" / "model.safetensors", one_file),
        (run / "export" / "model.json", one_file),
    ):
        with pytest.raises(UserError, match=rf"^{message}[^\n]*$"):
            metrics_of(path)
    export(keys(run, overwrite=True), World())
    with pytest.raises(UserError, match=r"^export: one process is enough, torchrun started 2$"):
        export(keys(run), World(size=2))
    (run / "checkpoints" / "last.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"^checkpoint: expected .*last\.pt "):
        export(keys(run, overwrite=True), World())
    assert (run / "export" / "model.json").exists()
    for override, message in (
        ("format=zip", "format: expected packed or dense or timm or transformers, got 'zip'"),
        ("device=tpu", "device: expected auto or cpu or cuda, got 'tpu'"),
        ("out=''", "out: expected a folder, got ''"),
    ):
        with pytest.raises(UserError, match=f"^{message}$"):
            read_keys(composed("export", "run=x", override), ExportSchema)


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'kernels'}",
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, text=True, capture_output=True,
        timeout=300, check=False,
    )  # fmt: skip


def test_help_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; import padst_exp.export; "
        "print({'torch', 'timm', 'transformers', 'scipy', 'safetensors'} & set(sys.modules))"
    )
    done = python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr


@pytest.mark.slow
def test_the_whole_flow_as_a_user_types_it(tmp_path: Path) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        done = python("-m", *arguments, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        return done.stderr

    run("padst_exp.train", "name=a", "model=vit", "structure.group=8", "logger=none",
        "sparsity=0.75", "trainer.steps=6", "trainer.checkpoint_interval=1", "trainer.keep_last=6",
        "dst.interval=2", *SIZES)  # fmt: skip
    said = run("padst_exp.export", "run=runs/a")
    assert "of the trained model's\nexported to runs/a/export\n" in said
    assert "still soft" not in said
    refused = run("padst_exp.export", "run=runs/a", code=1)
    assert refused.startswith("padst_exp: error: out: runs/a/export holds an export already")
    soft = run("padst_exp.export", "run=runs/a/checkpoints/step-000000001.pt", "out=soft")
    assert "was still soft, the nearest hard choice took its place" in soft
    found = [
        dict(line.rsplit(maxsplit=1) for line in said.splitlines() if "top1" in line)
        for said in (run("padst_exp.evaluate", f"run=runs/{name}") for name in ("a", "a/export"))
    ]
    assert found[0] == found[1] and "top1" in found[0]
    expected = restore_run(tmp_path / "runs" / "a", World()).model.eval()(first_images())
    loaded = load(tmp_path / "runs" / "a" / "export")
    assert_equal(loaded(first_images()), expected.detach(), "export")
