"""Models of timm: trained by their names, and exported so that timm alone loads them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from from_yaml import asked, leaf
from inference.small_models import assert_equal
from inference.test_export import composed, first_images, hardened_logits, make_run
from padst_exp.config import build
from padst_exp.engine.distributed import World
from padst_exp.errors import UserError
from padst_exp.export import ExportSchema, export
from padst_exp.inference import load
from padst_exp.models import vision
from padst_exp.restore import restore
from padst_exp.train import build_experiment

CPU = "backend=torch"
BY_NAME = ["model=timm", "model.name=test_resnet", "sparse=[{pattern: layer1.*.conv?, split: 1}]"]
READER = """
import sys
import timm
import torch
x, expected = torch.load("example.pt")
model = timm.create_model("local-dir:folder", pretrained=True).eval()
with torch.no_grad():
    torch.testing.assert_close(model(x), expected)
assert not [name for name in sys.modules if name.startswith("padst")]
"""


def exported(run: Path, format: str = "timm") -> Path:
    return export(
        asked("export", ExportSchema, run=str(run), format=format, device="cpu"), World()
    )[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("vit") / "run", "model.layer_scale=0.5", CPU)


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    return exported(run)


def by_timm(folder: Path) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(images)
    return found


def test_timm_computes_what_the_run_does(run: Path, folder: Path) -> None:
    images, model = first_images(), by_timm(folder)
    assert_equal(outputs(model, images), hardened_logits(run, images), "timm")
    dense = load(exported(run, "dense"))
    assert torch.equal(outputs(model, images), outputs(dense, images))
    assert {k: v.shape for k, v in dense.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    # It is an export of ours as well.
    assert torch.equal(outputs(restore(folder, World()).model, images), outputs(dense, images))


@pytest.mark.thorough
def test_a_process_with_timm_alone_loads_it(run: Path, folder: Path, tmp_path: Path) -> None:
    images = first_images()
    (tmp_path / "folder").symlink_to(folder)
    torch.save((images, outputs(load(folder), images)), tmp_path / "example.pt")
    command = [sys.executable, "-c", READER]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_config_and_card_say_what_it_is(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("vit_base_patch16_224", 10)
    assert config["model_args"]["embed_dim"] == 32
    preprocessing = config["pretrained_cfg"]
    assert preprocessing["input_size"] == [1, 8, 8] and preprocessing["crop_pct"] == 1.0
    assert preprocessing["mean"] == pytest.approx([4.884 / 255])
    # None of it is of the weights that timm has under that name.
    assert not {"tag", "url", "hf_hub_id", "license", "paper_ids"} & set(preprocessing)
    card = (folder / "README.md").read_text()
    rows = "| top1 | 40 |", "| `blocks.*.mlp.fc1` | 0.5 |"
    for wanted in ("library_name: timm", "local-dir:", *rows):
        assert wanted in card


def test_a_model_by_its_name_goes_out_and_comes_in_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", *BY_NAME, CPU, sizes=())
    folder, images = exported(run), first_images()
    assert_equal(outputs(by_timm(folder), images), hardened_logits(run, images), "timm")
    places = f"init_from=local-dir:{folder}", f"model.checkpoint={folder / 'model.safetensors'}"
    for source in places:
        cfg = composed("config", "structure=dense", "sparsity=0", *BY_NAME, CPU, source)
        model = build_experiment(cfg, World()).model.eval()
        assert torch.equal(outputs(model, images), outputs(by_timm(folder), images)), source


SMALL = ["model.dim=32", "model.depth=1"]
WORDS = ["vocab_size=13", "context_length=9", "pool=8", "validation_samples=8"]
TEXT = ["dataset=synthetic_tokens", *(f"dataset.{key}" for key in WORDS)]
REFUSED = {
    "a stem for small images": (["model=resnet18", "model.width=0.25"], "resnet18 with these"),
    "sizes that timm fixes": (["model=mixer", *SMALL], "mixer_s16_224 with"),
    "another model": (["transform=sparse_wide", *SMALL], "a model with transform"),
    "text": (["model=gpt2", *SMALL, "model.heads=2", *TEXT], "padst_exp.models.language.gpt2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_none_of_timm_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    overrides, what = REFUSED[name]
    run = make_run(tmp_path / "run", *overrides, CPU, sizes=())
    message = rf"^format: expected packed or dense for {what}[^\n]*, got timm$"
    with pytest.raises(UserError, match=message):
        exported(run)
    assert not (run / "export-timm").exists()


@pytest.mark.thorough
def test_a_model_that_computes_something_else_in_timm_is_refused(tmp_path: Path) -> None:
    # Of the same tensors, but with other strides.
    run = make_run(tmp_path / "run", "model=mobilenet_v2", "model.width=1", CPU, sizes=())
    message = r"^format: expected packed or dense for mobilenetv2_100 .*something else\), got timm$"
    with pytest.raises(UserError, match=message):
        exported(run)


def test_a_name_of_another_model_is_no_source_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_hub(name: str, pretrained: bool = False, **sizes: Any) -> nn.Module:
        return timm.create_model(name, **sizes)

    monkeypatch.setattr(vision, "create_model", without_hub)
    cfg = composed("config", *BY_NAME, CPU, "init_from=test_efficientnet")
    message = "^init_from: expected weights of this model, got test_efficientnet, another one$"
    with pytest.raises(UserError, match=message):
        build_experiment(cfg, World())


def test_what_timm_cannot_make_of_a_name_is_one_line() -> None:
    shape = {"image_size": 8, "channels": 1, "num_classes": 3}
    for changes, message in (
        ({"name": "local-dir:/x"}, "model.name: expected a name of timm.list_models(), got local-"),
        ({"name": "test_vit"}, "model.name: expected a model for 1 x 8 x 8 images, and its wei"),
        ({"pretrained": True, "checkpoint": "x"}, "model.checkpoint: expected null beside "),
    ):
        with pytest.raises(UserError) as error:
            build(leaf("model/timm", **changes), "model", shape)
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
