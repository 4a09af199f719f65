"""Runs that start from other runs, exports and models: what they take, and what they refuse."""

import copy
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from from_yaml import asked
from padst_exp import dispatch
from padst_exp.config import config_dir
from padst_exp.data.task import Task
from padst_exp.engine import checkpoint
from padst_exp.engine.distributed import World
from padst_exp.engine.experiment import Experiment
from padst_exp.engine.placement import Placement
from padst_exp.engine.state import TrainingState
from padst_exp.errors import UserError
from padst_exp.export import ExportSchema, export
from padst_exp.inference import files
from padst_exp.inference.packing import harden
from padst_exp.inherit import saliency
from padst_exp.layers import permutations, sparse_layers, sparse_weights
from padst_exp.restore import restore_run
from padst_exp.sparsify import Rule
from padst_exp.train import build_experiment, build_task, original
from test_commands import finish, start

CPU = torch.device("cpu")
VIT = ("model=vit", "model.dim=32", "model.depth=1", "model.heads=2", "logger=none")
GPT2 = ("model=gpt2", "model.dim=32", "model.depth=1", "model.heads=2", "logger=none")
DENSE = ("structure=dense", "permutation=none")


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=[*VIT, *overrides])


@functools.cache
def digits() -> Task:
    return build_task(config(), World())


def task_of(cfg: DictConfig) -> Any:
    """Digits, or for texts the sizes that a model needs."""
    if cfg.dataset._target_.endswith("Digits"):
        return digits()
    return SimpleNamespace(model_shape={"vocab_size": 512, "context_length": 64})


def built(*overrides: str) -> Experiment:
    cfg = config(*overrides)
    return build_experiment(cfg, World(), task_of(cfg))


def restored(path: Path) -> nn.Module:
    return restore_run(path, World(), task=task_of).model


def run(folder: Path, *overrides: str, hard: bool = False, seed: int = 7) -> Path:
    """A run directory as a training leaves it, with large random weights in every layer."""
    cfg = config(*overrides)
    experiment = build_experiment(cfg, World(), task_of(cfg))
    model = experiment.model
    if hard:
        harden(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    (folder / "checkpoints").mkdir(parents=True)
    text = OmegaConf.to_yaml(cfg, resolve=True)
    (folder / "config.yaml").write_text(text)
    (folder / "metrics.jsonl").write_text("")
    state = TrainingState(experiment, placement=Placement(World()), saved=None, path=folder)
    payload = {
        "data": {},
        "environment": {},
        **state.payload(),
        "average": None,
        "backends": dispatch.save(dispatch.forced(model, "torch", CPU), CPU),
        "config": {},
        "config_text": text,
    }
    checkpoint.write(payload, folder / "checkpoints" / "last.pt")
    return folder


def exported(folder: Path, out: Path, form: Any) -> Path:
    own = {"run": str(folder), "format": form, "out": str(out), "device": "cpu"}
    keys = asked("export", ExportSchema, **own)
    return export(keys, World())[0]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("runs") / "dense", *DENSE)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse run with permutations and a companion."""
    arguments = ("structure=nm", "sparsity=0.5", "permutation=random", "low_rank=1")
    return run(tmp_path_factory.mktemp("runs") / "sparse", *arguments, hard=True)


def images() -> Tensor:
    validation = digits().validation
    return torch.stack([validation[index][0] for index in range(5)])


def outputs(model: nn.Module) -> Tensor:
    return model.eval()(images()).detach()


def same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() < 1e-4 * b.norm())


def test_without_sparsity_a_run_starts_as_what_it_starts_from(
    dense: Path, sparse: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "alone.pt"
    alone.write_bytes((sparse / "checkpoints" / "last.pt").read_bytes())
    sources = {
        dense: dense,
        sparse: sparse,
        alone: sparse,
        dense / "checkpoints" / "last.pt": dense,
        exported(sparse, tmp_path / "packed", "packed"): sparse,
        exported(sparse, tmp_path / "plain", "dense"): sparse,
    }
    learners = ("permutation=random", "permutation=none", "permutation=doubly_stochastic")
    structures = ("structure=nm", "structure=diag", "structure=unstructured")
    for number, (source, of) in enumerate(sources.items()):
        wanted = outputs(restored(of))
        choice = (learners[number % 3], structures[number // 2])
        key = ("init_from", "init_values")[number % 2]
        experiment = built(f"{key}={source}", "sparsity=0.0", *choice)
        assert same(outputs(experiment.model), wanted), (source.name, choice, key)
    gradual = built(f"init_from={dense}", "sparsity=0.9", "dst=gmp", "permutation=random")
    assert gradual.report.density("layers") == 1.0
    assert same(outputs(gradual.model), outputs(restored(dense)))


def test_the_best_units_are_kept_under_every_structure(dense: Path) -> None:
    kept: dict[str, float] = {}
    weights = restored(dense).state_dict()
    for structure in ("unstructured", "fan_in", "nm", "block"):
        for source in (f"init_from={dense}", f"init_values={dense}"):
            experiment = built(
                source, f"structure={structure}", "sparsity=0.5", "permutation=random",
                *(("structure.size=4",) if structure == "block" else ()),
            )  # fmt: skip
            total = 0.0
            for name, layer in sparse_layers(experiment.model).items():
                found, wanted = layer.weight.detach(), weights[f"{name}.weight"]
                mask = found != 0
                # What stays is as it was, wherever the permutation put it.
                torch.testing.assert_close(found[mask], wanted[mask])
                total += float(found.square().sum() / wanted.square().sum())
            kept[f"{structure} {source.partition('=')[0]}"] = total / len(
                sparse_layers(experiment.model)
            )
    for structure in ("unstructured", "fan_in", "nm", "block"):
        # Drawn units keep about their share, chosen ones more.
        assert kept[f"{structure} init_values"] == pytest.approx(0.5, abs=0.05)
        assert kept[f"{structure} init_from"] > kept[f"{structure} init_values"] + 0.02
    assert kept["unstructured init_from"] == max(kept.values())


def test_everything_but_the_sparse_layers_is_taken_over(dense: Path) -> None:
    source = restored(dense).state_dict()
    for key in ("init_from", "init_values"):
        model = built(f"{key}={dense}", "sparsity=0.5", "permutation=none").model
        layers = sparse_layers(model)
        for name, tensor in model.state_dict().items():
            if name in source:
                torch.testing.assert_close(tensor, source[name], msg=name)
        left = {name for name in source if name not in model.state_dict()}
        assert left == {f"{name}.weight" for name in layers}


def test_saliency_is_what_the_loss_says(dense: Path) -> None:
    cfg = config(f"init_from={dense}", *DENSE, "trainer.batch_size=8")
    experiment = build_experiment(cfg, World(), digits())
    model, name = experiment.model, "blocks.0.mlp.fc1"
    before = copy.deepcopy(model.state_dict())
    arguments = (experiment.task, experiment.trainer, World())
    rules = [Rule(name)]
    one = saliency(model, rules, *arguments, seed=0, steps=1)[name]
    two = saliency(model, rules, *arguments, seed=0, steps=2)[name]
    assert one.shape == model.get_submodule(name).weight.shape and not torch.equal(one, two)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    # Its root is the first-order change of the loss as a weight goes: scaled weights tell.
    assert float(one.max()) > 0

    choose = (f"init_from={dense}", "structure=unstructured", "sparsity=0.9", "permutation=random")
    chosen = built(*choose, "init_score=saliency", "init_batches=2", "trainer.batch_size=8")
    kept = sparse_layers(chosen.model)[name].weight.detach() != 0
    assert two[kept].min() >= two[~kept].max()
    by_magnitude = sparse_layers(built(*choose).model)[name].weight.detach() != 0
    assert not torch.equal(kept, by_magnitude)


def test_topologies_are_taken_alone(sparse: Path) -> None:
    arguments = ("structure=nm", "sparsity=0.5", "permutation=random", "seed=3", "low_rank=1")
    source = sparse_weights(restored(sparse))
    other = sparse_weights(built(*arguments).model)
    model = built(*arguments, f"init_topology={sparse}").model
    for name, weight in sparse_weights(model).items():
        assert torch.equal(weight.active, source[name].active)
        assert not torch.equal(weight.active, other[name].active)
        assert not torch.equal(weight.values, source[name].values)
    drawn = permutations(built(*arguments).model)
    for name, permutation in permutations(model).items():
        assert torch.equal(permutation.index, drawn[name].index)


def test_permutations_are_taken_alone_and_hard(sparse: Path) -> None:
    source = restored(sparse)
    for learner in ("random", "doubly_stochastic"):
        arguments = ("structure=nm", "sparsity=0.5", f"permutation={learner}", "low_rank=1")
        experiment = built(*arguments, "seed=3", f"init_permutation={sparse}")
        found = permutations(experiment.model)
        assert found
        for name, permutation in found.items():
            assert not permutation.soft
            assert torch.equal(permutation.index, permutations(source)[name].index)
        for name, weight in sparse_weights(experiment.model).items():
            assert not torch.equal(weight.active, sparse_weights(source)[name].active)


def test_a_run_put_together_from_its_parts_is_the_run(sparse: Path) -> None:
    arguments = ("structure=nm", "sparsity=0.5", "permutation=random", "seed=3", "low_rank=1")
    parts = (f"init_values={sparse}", f"init_topology={sparse}", f"init_permutation={sparse}")
    ours = sparse_layers(built(*arguments, *parts).model)
    # Their companion went into the dense weights, of which units hold a part.
    theirs = sparse_layers(restored(sparse))
    for name, layer in ours.items():
        weight, whole = layer.weight.detach(), theirs[name].weight.detach()
        kept = weight != 0
        torch.testing.assert_close(weight[kept], whole[kept], atol=1e-6, rtol=1e-5)


def test_a_restored_run_needs_nothing_that_it_started_from(dense: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.symlink_to(dense)
    arguments = ("structure=nm", "sparsity=0.5", "permutation=random", "init_score=saliency")
    made = run(tmp_path / "made", *arguments, f"init_from={gone}", "trainer.batch_size=8")
    wanted = outputs(restored(made))
    gone.unlink()
    assert same(outputs(restored(made)), wanted)
    # One from before there were such keys, too.
    cfg = OmegaConf.load(made / "config.yaml")
    assert isinstance(cfg, DictConfig)
    for key in [str(key) for key in cfg if str(key).startswith("init_")]:
        del cfg[key]
    OmegaConf.save(cfg, made / "config.yaml")
    assert same(outputs(restored(made)), wanted)


def test_models_of_timm_and_transformers_are_sources_too(tmp_path: Path) -> None:
    cfg = config()
    plain = original(cfg, digits()).build({})
    state = {name: tensor + 0.1 for name, tensor in plain.state_dict().items()}
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_224"}))
    torch.save(state, tmp_path / "weights.pth")
    plain.load_state_dict(state)
    for source in (folder, folder / "model.safetensors", tmp_path / "weights.pth"):
        experiment = built(f"init_from={source}", "sparsity=0.0", "permutation=random")
        assert same(outputs(experiment.model), outputs(plain)), source

    text = config(*GPT2)
    lm = original(text, task_of(text)).build({})
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 512, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    torch.manual_seed(5)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    tokens = torch.arange(20)[None]
    expected = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2").eval()(tokens).logits
    taken = built(*GPT2, f"init_from={tmp_path / 'gpt2'}", "sparsity=0.0", "permutation=random")
    assert same(taken.model.eval()(tokens), expected) and not same(lm.eval()(tokens), expected)


def mistakes(dense: Path, sparse: Path, tmp_path: Path) -> list[tuple[list[str], str]]:
    soft = run(tmp_path / "soft", "structure=nm", "sparsity=0.5")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("no weights")
    nm = ["structure=nm", "sparsity=0.5", "permutation=random", "low_rank=1"]
    return [
        ([f"init_from={tmp_path}/nowhere"], "init_from: expected a run directory, a check"),
        ([f"init_from={tmp_path}/empty"], "init_from: expected an existing file, got "),
        ([f"init_from={tmp_path}/empty.pt"], "init_from: expected weights to load, got "),
        ([f"init_from={tmp_path}/text.pt"], "init_from: expected weights to load, got "),
        (["init_from=no_such_model"], "init_from: expected a name that timm has weights for, got"),
        ([f"init_from={dense}", "model.dim=64"], "init_from: expected weights of this model, got"),
        ([f"init_values={dense}", "model.depth=2"], "init_values: expected weights of this model"),
        ([f"init_from={sparse}", "model.depth=2"], "init_from: expected weights of this model"),
        ([f"init_from={dense}", *GPT2], "init_from: expected weights of this model, got "),
        ([f"init_from={dense}", f"init_values={dense}"], "init_values: expected null beside init"),
        (
            [f"init_from={dense}", f"model.checkpoint={dense}"],
            "init_from: expected null beside model.checkpoint=",
        ),
        (
            [f"init_from={dense}", "transform=sparse_wide", "sparsity=0.75"],
            "transform: expected none with weights that are loaded, got SparseWide",
        ),
        (["init_score=saliency"], "init_score: expected magnitude where no trained weights choose"),
        (["init_score=best"], "init_score: expected magnitude or saliency, got 'best'"),
        (["init_batches=0"], "init_batches: expected at least 1, got 0"),
        ([f"init_topology={tmp_path}/nowhere"], "init_topology: expected a run directory or a "),
        ([f"init_topology={dense}"], "init_topology: expected a run with structure NM "),
        ([f"init_topology={sparse}", *nm, "structure.group=8"], "init_topology: expected a run"),
        ([f"init_topology={sparse}", *nm, "sparsity=0.75"], "init_topology: expected a run like "),
        ([f"init_topology={sparse}", *nm, "dst=gmp"], "init_topology: expected a run"),
        ([f"init_topology={sparse}", *nm, "model.depth=2"], "init_topology: expected a run"),
        ([f"init_topology={sparse}", *DENSE], "init_topology: expected null with structure=dense"),
        ([f"init_permutation={soft}"], "init_permutation: expected a run whose permutations"),
        ([f"init_permutation={dense}"], "init_permutation: expected a run with permutations, got "),
        ([f"init_permutation={sparse}", *nm, "model.depth=2"], "init_permutation: expected a run"),
        (
            [f"init_permutation={sparse}", *nm, "permutation=none"],
            "init_permutation: expected a run like this one, got ",
        ),
        (
            [f"init_permutation={sparse}", *nm, "permutation.side=both"],
            "init_permutation: expected a run like this one, got ",
        ),
        ([f"init_topology={dense}/config.yaml"], "init_topology: expected a run directory or a ch"),
    ]  # fmt: skip


def test_what_cannot_be_taken_over_is_one_line(dense: Path, sparse: Path, tmp_path: Path) -> None:
    for overrides, message in mistakes(dense, sparse, tmp_path):
        with pytest.raises(UserError) as error:
            built(*overrides)
        assert str(error.value).startswith(message), overrides
        assert "\n" not in str(error.value), overrides


def test_a_classifier_for_other_classes_starts_fresh(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def widen(payload: dict[str, Any]) -> None:
        for name in ("head.weight", "head.bias"):
            payload["model"][name] = torch.cat([payload["model"][name]] * 2)

    edited = edit(dense, tmp_path / "wide", widen)
    # The run of twenty classes cannot be rebuilt for these data; its export can.
    with pytest.raises(UserError, match=r"^init_from: "):
        built(f"init_from={edited}", "sparsity=0.5")
    folder = exported(dense, tmp_path / "plain", "dense")
    description = files.read_description(folder)
    state = files.read_state(folder, description)
    description["model"]["arguments"]["num_classes"] = 20
    widen({"model": state})
    files.write(folder, state, description, extra={}, overwrite=True)
    model = built(f"init_from={folder}", "sparsity=0.5", "permutation=none").model
    assert "starts fresh" in capsys.readouterr().err
    assert model.get_submodule("head").out_features == 10
    torch.testing.assert_close(model.state_dict()["cls_token"], state["cls_token"])


def edit(source: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text((source / "config.yaml").read_text())
    payload = checkpoint.read(source / "checkpoints" / "last.pt")
    change(payload)
    checkpoint.write(payload, folder / "checkpoints" / "last.pt")
    return folder


def test_weights_that_are_not_finite_are_refused(dense: Path, tmp_path: Path) -> None:
    def spoil(payload: dict[str, Any]) -> None:
        payload["model"]["head.bias"][0] = torch.inf

    edited = edit(dense, tmp_path / "spoilt", spoil)
    with pytest.raises(UserError, match=r"^init_from: [^\n]*finite[^\n]*$"):
        built(f"init_from={edited}", "sparsity=0.5")


@pytest.mark.thorough
def test_a_trained_model_survives_pruning_under_any_permutation(tmp_path: Path) -> None:
    sizes = ["logger=none", "device=cpu", "model.dim=64", "model.depth=2", "model.heads=2"]

    def train(name: str, *overrides: str) -> float:
        finish(start("padst_exp.train", *sizes, f"name={name}", *overrides, cwd=tmp_path))
        summary = json.loads((tmp_path / "runs" / name / "summary.json").read_text())
        return float(summary["final"]["top1"])

    trained = train("dense", *DENSE, "trainer.steps=500")
    finish(start("padst_exp.export", "run=runs/dense", "format=dense", "device=cpu", cwd=tmp_path))
    still = ("trainer.steps=1", "optimizer.lr=1e-12", "sparsity=0.3", "structure=nm")
    found = {
        learner: train(learner, *still, f"permutation={learner}", source)
        for learner, source in (
            ("none", "init_from=runs/dense"),
            ("random", "init_from=runs/dense"),
            (
                "doubly_stochastic",
                "model.checkpoint=runs/dense/export-dense/model.safetensors",
            ),
        )
    }
    assert trained > 90, trained
    assert found["none"] > trained - 6, found
    assert found["random"] > found["none"] - 3, found
    assert found["doubly_stochastic"] > found["none"] - 8, found
    # And some training at a higher sparsity brings back what is lost.
    gradual = ("dst=gmp", "trainer.steps=200", "structure=nm", "sparsity=0.8")
    again = train("gradual", "init_from=runs/dense", *gradual, "permutation=random")
    assert again > trained - 6, again
    # What a run started from may be gone when it goes on.
    os.rename(tmp_path / "runs" / "dense", tmp_path / "elsewhere")
    again = train("gradual", "init_from=runs/dense", *gradual, "permutation=random", "resume=auto")
    assert again > trained - 6, again
