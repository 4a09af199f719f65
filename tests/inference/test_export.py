"""From a run to an export and back: the entry point, in this process and as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from padst_exp import dispatch
from padst_exp.config import (
    EvaluateSchema,
    ExportSchema,
    build,
    config_dir,
    export_settings,
    register_schemas,
)
from padst_exp.engine import checkpoint
from padst_exp.engine.distributed import World
from padst_exp.errors import UserError
from padst_exp.evaluate import evaluate
from padst_exp.export import export
from padst_exp.inference import load
from padst_exp.layers import permutations
from padst_exp.restore import restore_run
from padst_exp.train import build_task, sparse_model

ROOT = Path(__file__).parents[2]
SIZES = ["model.dim=32", "model.depth=1", "model.heads=2"]


def composed(name: str, *overrides: str) -> DictConfig:
    register_schemas()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def make_run(folder: Path, *overrides: str, averaged: bool = False) -> Path:
    """A run directory as a training leaves it at step 3, its permutations still soft."""
    cfg = composed("config", "structure=nm", "sparsity=0.5", *SIZES, *overrides)
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
    values = {"format": "packed", "overwrite": False, "device": "cpu", **changes}
    return ExportSchema(run=str(run), **values)


def first_images() -> torch.Tensor:
    from padst_exp.data.small_images import Digits

    return torch.stack([Digits().validation[index][0] for index in range(4)])


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
    assert description["metrics"] == {"loss": 1.5, "top1": 40.0}
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
    assert description["source"]["run"] is None and description["metrics"] == {}
    for exported in (inside, folder):
        torch.testing.assert_close(load(exported)(inputs), expected, atol=1e-5, rtol=1e-5)


def test_an_export_evaluates_like_its_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "permutation=random")
    _, expected = evaluate(EvaluateSchema(run=str(run), device="cpu"), World())
    for format in ("packed", "dense"):
        folder, _ = export(settings(run, format=format), World())
        path, metrics = evaluate(EvaluateSchema(run=str(folder), device="cpu"), World())
        assert path == folder
        assert metrics == pytest.approx(expected, rel=1e-5)
    (run / "checkpoints" / "last.pt").unlink()
    again = evaluate(EvaluateSchema(run=str(run / "export"), device="cpu"), World())
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
        export_settings(composed("export", "run=x", *overrides))


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
@pytest.mark.parametrize("model", ["vit", "gpt2"])
def test_the_whole_flow_as_a_user_types_it(model: str, tmp_path: Path) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        done = python("-m", *arguments, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        return done.stderr

    run("padst_exp.train", "name=a", f"model={model}", "structure.group=8", "logger=none",
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
        trained = run("padst_exp.evaluate", "run=runs/a").splitlines()[1:]
        assert run("padst_exp.evaluate", "run=runs/a/export").splitlines()[1:] == trained
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
