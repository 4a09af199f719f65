"""Exports are written whole or not at all; what cannot be read is said in one line."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.small_models import constructor, dense_model, example, sparse_model
from inference.test_packing import exported
from padst_exp.errors import UserError
from padst_exp.inference import files, load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, _ = sparse_model("vit", "nm-16", "random")
    return exported(tmp_path / "export", model, "vit")


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_an_export_is_not_replaced_unasked(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"^out: .* holds an export already; overwrite=true "):
        files.write(folder, {}, {}, extra={}, overwrite=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    new = {"w": torch.ones(2)}
    files.write(folder, new, {"new": 1}, extra={"config.json": "{}"}, overwrite=True)
    assert json.loads((folder / "model.json").read_text())["new"] == 1
    assert sorted(os.listdir(folder)) == ["config.json", "model.json", "model.safetensors"]
    assert os.listdir(folder.parent) == ["export"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_folder_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"^out: .*home exists and is no export"):
        files.write(tmp_path / "home", {}, {}, extra={}, overwrite=overwrite)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"^out: .*file exists and is no export"):
        files.write(tmp_path / "file", {}, {}, extra={}, overwrite=overwrite)


def test_what_else_lies_in_an_export_is_not_lost(folder: Path) -> None:
    (folder / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"^out: .* also holds notes.txt, which would be lost"):
        files.write(folder, {}, {}, extra={}, overwrite=True)
    assert (folder / "notes.txt").exists()


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    files.write(tmp_path / "empty", {}, {}, extra={}, overwrite=False)
    files.write(tmp_path / "a" / "b", {}, {}, extra={}, overwrite=False)
    assert (tmp_path / "empty" / "model.json").exists()
    assert (tmp_path / "a" / "b" / "model.json").exists()


@pytest.mark.parametrize("failing", ["save_file", "_sync", "_replace"])
def test_a_full_disk_changes_nothing(
    folder: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(files, failing, full)
    with pytest.raises(UserError, match=r"^out: cannot write .*No space left.*nothing was changed"):
        files.write(folder, {"w": torch.ones(2)}, {}, extra={}, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(folder.parent) == ["export"]


@pytest.mark.parametrize("failing", [1, 2])
def test_an_export_that_cannot_take_its_place_leaves_the_old_one(
    folder: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, calls = os.replace, []

    def one_fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == failing:
            raise OSError(5, "Input/output error")
        replace(source, target)

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(os, "replace", one_fails)
    with pytest.raises(UserError, match="nothing was changed"):
        files.write(folder, {"w": torch.ones(2)}, {}, extra={}, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(folder.parent) == ["export"]


def test_a_link_stays_and_leads_to_the_new_export(folder: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    (links / "elsewhere").mkdir(parents=True)
    for target in (folder, links / "elsewhere"):
        link = links / f"to-{target.name}"
        link.symlink_to(target)
        files.write(link, {"w": torch.ones(2)}, {"new": 1}, extra={}, overwrite=True)
        assert link.is_symlink()
        assert json.loads((target / "model.json").read_text())["new"] == 1
    assert os.listdir(tmp_path / "export") == os.listdir(links / "elsewhere")
    assert sorted(os.listdir(links)) == ["elsewhere", "to-elsewhere", "to-export"]
    assert sorted(os.listdir(tmp_path)) == ["export", "links"]


def set_format(description: dict[str, Any]) -> None:
    description["format"] = 99


def set_target(description: dict[str, Any]) -> None:
    description["model"]["_target_"] = "os.system"


def set_argument(description: dict[str, Any]) -> None:
    description["model"]["arguments"]["colour"] = "red"


def remove_layers(description: dict[str, Any]) -> None:
    del description["layers"]


def set_heads(description: dict[str, Any]) -> None:
    description["model"]["arguments"]["heads"] = 3


def rename_layer(description: dict[str, Any]) -> None:
    description["layers"]["blocks.7.fc"] = description["layers"].pop("blocks.0.mlp.fc1")


def set_features(description: dict[str, Any]) -> None:
    description["layers"]["blocks.0.mlp.fc1"]["in_features"] = 3


def remove_config(description: dict[str, Any]) -> None:
    del description["config"]


def list_layers(description: dict[str, Any]) -> None:
    description["layers"] = []


def list_shared(description: dict[str, Any]) -> None:
    description["shared"] = []


def set_model(description: dict[str, Any]) -> None:
    description["model"] = "x"


def remove_parts(description: dict[str, Any]) -> None:
    del description["layers"]["blocks.0.mlp.fc1"]["parts"]


def set_ratio(description: dict[str, Any]) -> None:
    description["model"]["arguments"]["mlp_ratio"] = -1.0


def deepen(description: dict[str, Any]) -> None:
    description["model"]["arguments"]["depth"] = 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_format, "model.json: export format 99, this version reads 1"),
        (set_target, r"model.json: its model 'os.system' is none of padst_exp.models"),
        (set_argument, "model.json: its model cannot be built: .*colour"),
        (remove_layers, "model.json: damaged, layers: Field required"),
        (remove_config, "model.json: damaged, config: Field required"),
        (list_layers, "model.json: damaged, layers: Input should be a valid dictionary"),
        (list_shared, "model.json: damaged, shared: Input should be a valid dictionary"),
        (set_model, "model.json: damaged, model: Input should be a valid dictionary"),
        (remove_parts, r"model.json: damaged, layers\.blocks\.0\.mlp\.fc1\.parts: Field required"),
        (set_ratio, "model.json: its model cannot be built: "),
        (set_heads, r"model.json: its model cannot be built: model.heads"),
        (rename_layer, r"model.safetensors: damaged at layer blocks\.7\.fc"),
        (set_features, r"model.safetensors: damaged at layer blocks\.0\.mlp\.fc1: columns has"),
        (deepen, r"model.safetensors: does not fit its model.json: Missing key"),
    ],
)
def test_a_damaged_description_is_one_line(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit(folder, change)
    with pytest.raises(UserError, match=rf"^.*{message}[^\n]*$"):
        load(folder)


def columns_beyond(state: dict[str, torch.Tensor]) -> None:
    state["blocks.0.mlp.fc1.columns"][0, 0] = 9999


def rows_twice(state: dict[str, torch.Tensor]) -> None:
    state["blocks.0.mlp.fc1.rows"][1] = state["blocks.0.mlp.fc1.rows"][0]


def fewer_columns(state: dict[str, torch.Tensor]) -> None:
    key = "blocks.0.mlp.fc1.columns"
    state[key] = state[key][:-1].contiguous()


def no_weight(state: dict[str, torch.Tensor]) -> None:
    del state["blocks.0.mlp.fc1.weight"]


def no_head(state: dict[str, torch.Tensor]) -> None:
    del state["head.weight"]


def wrong_head(state: dict[str, torch.Tensor]) -> None:
    state["head.weight"] = state["head.weight"][:-1].contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (columns_beyond, r"damaged at layer blocks\.0\.mlp\.fc1: columns has features beyond 64"),
        (rows_twice, "damaged at layer .* rows do not name every feature once"),
        (fewer_columns, "damaged at layer .* columns is"),
        (no_weight, "damaged at layer .*weight"),
        (no_head, "does not fit its model.json: Missing key.*head.weight"),
        (wrong_head, "does not fit its model.json: size mismatch for head.weight"),
    ],
)
def test_damaged_weights_are_one_line(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    edit_weights(folder, change)
    with pytest.raises(UserError, match=rf"^.*model.safetensors: {message}[^\n]*$"):
        load(folder)


def test_other_damage_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^.*nowhere: no exported model, there is no model.json$"):
        load(tmp_path / "nowhere")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-1], content[:20], b"", b"not safetensors at all"):
        weights.write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"^.*model.safetensors: damaged, or not a safeten[^\n]*$"
        ):
            load(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"^.*model.safetensors: there is no such file$"):
        load(folder)
    (folder / "model.json").write_text('{"format": ')
    with pytest.raises(UserError, match=r"^.*model.json: damaged, or not written by padst_exp"):
        load(folder)


@pytest.mark.parametrize("key", ["columns", "rows", "row_pointer"])
def test_damaged_indices_of_single_entries_are_refused(key: str, tmp_path: Path) -> None:
    model, _ = sparse_model("vit", "unstructured")
    folder = exported(tmp_path / "export", model, "vit")

    def change(state: dict[str, torch.Tensor]) -> None:
        tensor = state[f"blocks.1.attn.proj.{key}"]
        state[f"blocks.1.attn.proj.{key}"] = (tensor.int() + 7).to(tensor.dtype)

    edit_weights(folder, change)
    with pytest.raises(UserError, match=rf"damaged at layer blocks\.1\.attn\.proj: {key} "):
        load(folder)


def test_a_dense_export_loads_too(tmp_path: Path) -> None:
    plain = dense_model("vit", 64, 2)
    description = {"model": constructor("vit", 64, 2), "layers": {}, "config": ""}
    files.write(tmp_path / "e", plain.state_dict(), description, extra={}, overwrite=False)
    inputs = example("vit")
    torch.testing.assert_close(load(tmp_path / "e")(inputs), plain(inputs).detach())


def test_loading_needs_no_hydra(folder: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from padst_exp.inference import load; load(sys.argv[1]); "
        "print('hydra' in sys.modules or 'omegaconf' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
