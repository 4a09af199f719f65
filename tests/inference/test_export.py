"""From a run to an export and back: the entry point, in this process and as a user types it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from from_yaml import from_yaml
from inference.own_models import Perceptron
from padst_exp import config, dispatch
from padst_exp.config import build, config_dir
from padst_exp.engine import checkpoint
from padst_exp.engine.distributed import World
from padst_exp.errors import UserError
from padst_exp.evaluate import EvaluateSchema, evaluate
from padst_exp.export import ExportSchema, export
from padst_exp.inference import load
from padst_exp.layers import permutations
from padst_exp.restore import restore_run
from padst_exp.train import build_task, sparse_model

ROOT = Path(__file__).parents[2]
SIZES = ["model.dim=32", "model.depth=1", "model.heads=2"]


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose(name, overrides=list(overrides))


OWN_MODEL = {"_target_": "inference.own_models.Perceptron", "width": 48}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADST_CACHE", str(tmp_path / "cache"))


def make_run(
    folder: Path, *overrides: str, averaged: bool = False, own_model: bool = False
) -> Path:
    """A run directory as a training leaves it at step 3, its permutations still soft."""
    cfg = composed("config", "structure=nm", "sparsity=0.5", *SIZES, *overrides)
    if own_model:
        cfg.model, cfg.sparse = OWN_MODEL, [{"pattern": "hidden", "split": 1}]
    model, _ = sparse_model(cfg, build_task(cfg, World()), build(cfg.permutation, "permutation"))
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
    device = torch.device("cpu")
    payload = {
        "step": 3,
        "model": broken if averaged else state,
        "average": state if averaged else None,
        "backends": dispatch.save(dispatch.forced(model, "torch", device), device),
        "config_text": text,
    }
    checkpoint.write(payload, folder / "checkpoints" / "last.pt")
    return folder


def settings(run: Path, **changes: Any) -> ExportSchema:
    values = {"format": "packed", "out": None, "overwrite": False, "device": "cpu", **changes}
    return ExportSchema(run=str(run), **values)


def evaluation(run: Path, batch_size: int | None = None) -> EvaluateSchema:
    return EvaluateSchema(run=str(run), batch_size=batch_size, device="cpu")


def edit_checkpoint(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = run / "checkpoints" / "last.pt"
    payload = checkpoint.read(path)
    change(payload)
    checkpoint.write(payload, path)


def first_images() -> torch.Tensor:
    validation = from_yaml("dataset/digits").validation
    return torch.stack([validation[index][0] for index in range(4)])


def hardened_logits(run: Path, inputs: torch.Tensor) -> torch.Tensor:
    model = restore_run(run, World()).model.eval()
    for permutation in permutations(model).values():
        if permutation.soft:
            permutation.harden()
    return model(inputs).detach()


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("format", ["packed", "dense"])
def test_an_export_computes_what_the_run_does(tmp_path: Path, format: str, averaged: bool) -> None:
    run = make_run(tmp_path / "run", averaged=averaged)
    folder, description = export(settings(run, format=format), World())
    assert folder == run / ("export" if format == "packed" else "export-dense")
    written = json.loads((folder / "model.json").read_text())
    assert written == {"format": 1, "shared": {}, **json.loads(json.dumps(description))}
    source = description["source"]
    assert (source["step"], source["averaged"]) == (3, averaged)
    assert source["checkpoint"] == "last.pt" and len(source["hardened"]) == 4
    assert description["metrics_of_checkpoint"] == {"loss": 1.5, "top1": 40.0}
    assert description["density_of_layers"] == 0.5
    inputs = first_images()
    expected = hardened_logits(run, inputs)
    torch.testing.assert_close(load(folder)(inputs), expected, atol=1e-5, rtol=1e-5)
    assert description["kind"] == format


def test_packed_files_shrink_with_density(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "model.dim=64", "sparsity=0.9")
    sizes = {}
    for format in ("packed", "dense"):
        folder, _ = export(settings(run, format=format), World())
        sizes[format] = (folder / "model.safetensors").stat().st_size
    assert sizes["packed"] < 0.35 * sizes["dense"]


def test_a_dense_model_exports_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "structure=dense", "sparsity=0")
    folder, description = export(settings(run), World())
    assert description["layers"] == {} and description["density_of_layers"] == 1.0
    inputs = first_images()
    torch.testing.assert_close(load(folder)(inputs), hardened_logits(run, inputs))


def test_one_checkpoint_even_moved_out_of_its_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    inputs = first_images()
    expected = hardened_logits(run, inputs)
    inside, _ = export(settings(run / "checkpoints" / "last.pt"), World())
    assert inside == run / "checkpoints" / "last-export"
    moved = tmp_path / "elsewhere" / "some.pt"
    moved.parent.mkdir()
    (run / "checkpoints" / "last.pt").rename(moved)
    folder, description = export(settings(moved, out=str(tmp_path / "o" / "mine")), World())
    assert folder == tmp_path / "o" / "mine"
    assert description["source"]["run"] is None
    assert description["metrics_of_checkpoint"] == {}
    for exported in (inside, folder):
        torch.testing.assert_close(load(exported)(inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_a_model_of_ones_own(tmp_path: Path, format: str) -> None:
    run = make_run(tmp_path / "run", "permutation=random", own_model=True)
    inputs = first_images()
    expected = hardened_logits(run, inputs)
    folder, description = export(settings(run, format=format), World())
    assert description["model"]["_target_"] == OWN_MODEL["_target_"]
    with pytest.raises(UserError, match=r"'inference.own_models.Perceptron' is none of padst_exp"):
        load(folder)
    mine = Perceptron(**description["model"]["arguments"])
    torch.testing.assert_close(load(folder, model=mine)(inputs), expected, atol=1e-5, rtol=1e-5)
    found = evaluate(evaluation(folder), World())[1]
    moved = tmp_path / "moved.pt"
    (run / "checkpoints" / "last.pt").rename(moved)
    expected_metrics = evaluate(evaluation(moved), World())[1]
    assert found == pytest.approx(expected_metrics, rel=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_an_evaluated_export_is_tuned(
    precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", f"trainer.precision={precision}")
    folder, _ = export(settings(run), World())
    asked = evaluation(folder, batch_size=50)
    capsys.readouterr()
    evaluate(asked, World())
    said = capsys.readouterr().err
    assert re.search(rf"(major|dense) for batches of 50 in {precision}: [0-9.]+x dense on ", said)
    decisions = (tmp_path / "cache" / "decisions.json").read_text()
    evaluate(asked, World())
    assert (tmp_path / "cache" / "decisions.json").read_text() == decisions
    capsys.readouterr()
    evaluate(evaluation(run), World())
    assert "x dense" not in capsys.readouterr().err


def test_a_head_of_zeros_exports(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")

    def silence(payload: dict[str, Any]) -> None:
        for name in ("head.weight", "head.bias"):
            payload["model"][name].zero_()

    edit_checkpoint(run, silence)
    _, description = export(settings(run), World())
    assert description["largest_difference"] == 0


def test_a_run_that_diverged_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")

    def diverge(payload: dict[str, Any]) -> None:
        payload["model"]["head.bias"][0] = float("nan")

    edit_checkpoint(run, diverge)
    with pytest.raises(UserError, match=r"^run: .*last\.pt computes logits that are not finite$"):
        export(settings(run), World())
    assert not (run / "export").exists()


def test_a_checkpoint_of_another_model_is_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    others = {"deeper": "model.depth=2", "blocks": "structure=block"}
    for name, override in others.items():
        other = make_run(tmp_path / name, override)
        shutil.copy(other / "checkpoints" / "last.pt", run / "checkpoints" / "last.pt")
        with pytest.raises(UserError, match=r"^.*last\.pt: does not fit this model: [^\n]*$"):
            restore_run(run, World())


def test_backends_that_do_not_fit_are_not_taken_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    inputs = first_images()
    expected = hardened_logits(run, inputs)
    edit_checkpoint(run, lambda payload: payload["backends"]["choices"].popitem())
    torch.testing.assert_close(hardened_logits(run, inputs), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "while parsing a flow node"),
        ("[1, 2]", ""),
        ("hello", ""),
        ("", ""),
        ("model: 5", "model: missing"),
        ("speed: 5", "model: missing"),
    ],
)
def test_a_damaged_config_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    folder, _ = export(settings(run), World())
    (run / "config.yaml").write_text(text)
    with pytest.raises(
        UserError, match=rf"^.*config\.yaml: damaged, no training config: {message}[^\n]*$"
    ):
        restore_run(run, World())
    description = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**description, "config": text}))
    with pytest.raises(
        UserError, match=rf"^.*model\.json: damaged, no training config: {message}[^\n]*$"
    ):
        evaluate(evaluation(folder), World())


def test_an_export_evaluates_like_its_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "permutation=random")
    _, expected = evaluate(evaluation(run), World())
    for format in ("packed", "dense"):
        folder, _ = export(settings(run, format=format), World())
        path, metrics = evaluate(evaluation(folder), World())
        assert path == folder
        assert metrics == pytest.approx(expected, rel=1e-5)
    (run / "checkpoints" / "last.pt").unlink()
    again = evaluate(evaluation(run / "export"), World())
    assert again[1] == pytest.approx(expected, rel=1e-5)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    cases = [
        (settings(tmp_path), "run: .* is no run directory, it has no config.yaml"),
        (settings(tmp_path / "nowhere"), "run: .*nowhere is no run directory"),
        (settings(run, out=str(run)), "out: .* exists and is no export; choose another folder"),
    ]
    export(settings(run), World())
    cases.append((settings(run), "out: .* holds an export already; overwrite=true"))
    for wrong, message in cases:
        with pytest.raises(UserError, match=rf"^{message}[^\n]*$"):
            export(wrong, World())
    cases = [
        (run / "config.yaml", r".*config\.yaml: damaged, or not a checkpoint"),
        (run / "export" / "model.safetensors", "run: .* is one file of an export, give its folder"),
        (run / "export" / "model.json", "run: .* is one file of an export, give its folder"),
    ]
    for path, message in cases:
        with pytest.raises(UserError, match=rf"^{message}[^\n]*$"):
            evaluate(evaluation(path), World())
    export(settings(run, overwrite=True), World())
    with pytest.raises(UserError, match=r"^export: one process is enough, torchrun started 2$"):
        export(settings(run), World(size=2))
    (run / "checkpoints" / "last.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"last\.pt: damaged"):
        export(settings(run, overwrite=True), World())
    assert (run / "export" / "model.json").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["format=zip"], "format: expected packed or dense, got 'zip'"),
        (["device=tpu"], "device: expected auto or cpu or cuda, got 'tpu'"),
        (["out=''"], "out: expected a folder, got ''"),
    ],
)
def test_wrong_values_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        config.read_keys(composed("export", "run=x", *overrides), ExportSchema)


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'kernels'}",
        "PADST_CACHE": str(cwd / "cache"),
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
@pytest.mark.parametrize(
    ("model", "structure"),
    [
        ("vit", ["structure=nm", "structure.group=8"]),
        ("gpt2", ["structure=nm", "structure.group=8"]),
        ("vit", ["structure=block", "structure.size=8"]),
        ("vit", ["structure=diag"]),
    ],
    ids=["vit-nm", "gpt2-nm", "vit-block", "vit-diag"],
)
def test_the_whole_flow_as_a_user_types_it(
    model: str, structure: list[str], tmp_path: Path
) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        done = python("-m", *arguments, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        return done.stderr

    run("padst_exp.train", "name=a", f"model={model}", *structure, "logger=none",
        "sparsity=0.75", "trainer.steps=6", "trainer.checkpoint_interval=1", "trainer.keep_last=6",
        "dst.interval=2", *SIZES)  # fmt: skip
    said = run("padst_exp.export", "run=runs/a")
    assert "of the trained model's\nexported to runs/a/export\n" in said
    assert "still soft" not in said
    run("padst_exp.export", "run=runs/a", "format=dense")
    if model == "vit":
        refused = run("padst_exp.export", "run=runs/a", code=1)
        assert refused.startswith("padst_exp: error: out: runs/a/export holds an export already")
        soft = run("padst_exp.export", "run=runs/a/checkpoints/step-000000001.pt", "out=soft")
        assert "was still soft, the nearest permutation took its place" in soft
        found = [
            dict(line.rsplit(maxsplit=1) for line in said.splitlines() if "top1" in line)
            for said in (
                run("padst_exp.evaluate", f"run=runs/{name}") for name in ("a", "a/export")
            )
        ]
        assert found[0] == found[1] and "top1" in found[0]
    restored = restore_run(tmp_path / "runs" / "a", World())
    inputs = torch.stack([restored.task.validation[index][0] for index in range(2)])
    expected = restored.model.eval()(inputs).detach()
    for folder in ("export", "export-dense"):
        loaded = load(tmp_path / "runs" / "a" / folder)
        torch.testing.assert_close(loaded(inputs), expected, atol=1e-5, rtol=1e-5)
    if model == "gpt2":
        from transformers import GPT2LMHeadModel

        dense = tmp_path / "runs" / "a" / "export-dense"
        plain: Any = GPT2LMHeadModel.from_pretrained(dense)
        torch.testing.assert_close(plain(inputs).logits.detach(), expected, atol=1e-5, rtol=1e-5)
        plain.load_state_dict(load_file(dense / "model.safetensors"), strict=True)
