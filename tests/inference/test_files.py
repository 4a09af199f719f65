"""Exports are written whole or not at all; what cannot be read is said in one line."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hostile import DAMAGED, broken_states, undone
from inference.small_models import (
    assert_equal,
    constructor,
    dense_model,
    example,
    exported,
    sparse_model,
)
from padst_exp.errors import UserError
from padst_exp.files import sha256
from padst_exp.inference import files, load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = sparse_model("vit", "nm-16", "random", low_rank=2)
    return exported(tmp_path / "export", model, constructor("vit"))


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


def test_what_is_no_export_or_more_than_one_is_never_touched(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for overwrite in (False, True):
        for name in ("home", "file"):
            with pytest.raises(UserError, match=rf"^out: .*{name} exists and is no export"):
                files.write(tmp_path / name, {}, {}, extra={}, overwrite=overwrite)
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


def test_a_disk_that_fails_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any step: writing, syncing, moving the old export out of the way, or the new one in."""
    replace = os.replace

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def failing(call: int) -> Callable[[Path, Path], None]:
        calls: list[Path] = []

        def one_fails(source: Path, target: Path) -> None:
            calls.append(target)
            if len(calls) == call:
                full()
            replace(source, target)

        return one_fails

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for owner, name, wrong in (
        (files, "save_file", full),
        (files, "sync", full),
        (files, "_replace", full),
        (os, "replace", failing(1)),
        (os, "replace", failing(2)),
    ):
        wanted = r"^out: cannot write .*No space left.*nothing was changed"
        with monkeypatch.context() as context, pytest.raises(UserError, match=wanted):
            context.setattr(owner, name, wrong)
            files.write(folder, {"w": torch.ones(2)}, {}, extra={}, overwrite=True)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, name
        assert os.listdir(folder.parent) == ["export"], name


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


FC1 = ("layers", "blocks.0.mlp.fc1")
DELETED, LIKE_FC1 = object(), object()


def test_a_damaged_description_is_one_line(folder: Path) -> None:
    at = r"model.safetensors: damaged at layer"
    cases: list[tuple[tuple[str, ...], object, str]] = [
        (("format",), 99, "model.json: export format 99, this version reads 3"),
        (("model", "_target_"), "os.system", "model.json: its model 'os.system' is none of padst_"),
        (
            ("model", "arguments", "colour"),
            "red",
            "its model cannot be built: .*colour",
        ),
        (("model", "arguments", "mlp_ratio"), -1.0, "model.json: its model cannot be built: "),
        (("model", "arguments", "heads"), 3, "model.json: its model cannot be built: model.heads"),
        (("model", "arguments", "depth"), 3, "does not fit its model.json: Missing key"),
        (("model",), "x", "model.json: damaged, model: Input should be a valid dictionary"),
        (("layers",), DELETED, "model.json: damaged, layers: Field required"),
        (("layers",), [], "model.json: damaged, layers: Input should be a valid dictionary"),
        (("config",), DELETED, "model.json: damaged, config: Field required"),
        (("tensors",), DELETED, "model.json: damaged, tensors: Field required"),
        (("tensors",), "0" * 64, r"got \S+model.safetensors \(its digest is another one\)"),
        (("shared", "head.weight"), "head.bias", "head.weight is there twice"),
        (("shared", "extra"), "head.bias", "does not fit its model.json: Unexpected key"),
        (("shared", "extra"), "nothing", "it has no 'nothing'"),
        (("model", "_target_"), "padst_exp.models.weights.load", "load is no constructor"),
        (("model", "_target_"), "padst_exp.models.weights.Tensor", "none of ours, it is from "),
        (("shared",), [], "model.json: damaged, shared: Input should be a valid dictionary"),
        ((*FC1, "parts"), DELETED, r"model.json: damaged, layers\.\S+\.parts: Field required"),
        ((*FC1, "parts"), [], rf"{at} \S+: 0 features out, 96 in the dense layer"),
        ((*FC1, "in_features"), 3, rf"{at} \S+: 3 features in, 64 in the dense layer"),
        ((*FC1, "in_features"), 2**62, rf"{at} \S+: \d+ features in, 64 in the dense layer"),
        ((*FC1, "rank"), -1, rf"{at} blocks\.0\.mlp\.fc1: "),
        ((*FC1, "rank"), 0, "does not fit its model.json: Unexpected key"),
        ((*FC1, "rank"), 3, "does not fit its model.json: size mismatch"),
        (("layers", "blocks.7.fc"), LIKE_FC1, rf"{at} blocks\.7\.fc: "),
        (("layers", "norm"), LIKE_FC1, rf"{at} norm: "),
    ]
    text = (folder / "model.json").read_text()
    for path, value, message in cases:
        description = json.loads(text)
        node = description
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = node[FC1[1]] if value is LIKE_FC1 else value
        if value is DELETED:
            del node[path[-1]]
        (folder / "model.json").write_text(json.dumps(description))
        with pytest.raises(UserError, match=rf"^.*{message}[^\n]*$"):
            load(folder)


def shifted(tensor: Tensor) -> Tensor:
    return (tensor.int() + 7).to(tensor.dtype)


def shortened(tensor: Tensor) -> Tensor:
    return tensor[:-1].contiguous()


def store(state: dict[str, Tensor], folder: Path) -> None:
    """Other tensors in an export, with the digest that belongs to them."""
    save_file(state, folder / "model.safetensors")
    description = json.loads((folder / "model.json").read_text())
    description["tensors"] = sha256(folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps(description))


def test_damaged_weights_are_one_line(folder: Path, tmp_path: Path) -> None:
    single = exported(tmp_path / "s", sparse_model("vit", "unstructured"), constructor("vit"))
    at = "damaged at layer"
    tiles = "blocks.0.mlp.fc1.parts.0."
    entries = "blocks.1.attn.proj.parts.0."
    cases: list[tuple[Path, str, Callable[[Tensor], Tensor | None], str]] = [
        (folder, f"{tiles}columns", shifted, f"{at} blocks.0.mlp.fc1: columns has features beyond"),
        (folder, f"{tiles}columns", shortened, f"{at} .* columns is"),
        (folder, f"{tiles}rows", torch.zeros_like, f"{at} .* rows do not name every feature once"),
        (folder, f"{tiles}rows", shortened, f"{at} .* rows is"),
        (folder, f"{tiles}values", lambda _: None, f"{at} .*values"),
        (folder, "blocks.0.mlp.fc1.companion.up", shortened, "does not fit .* size mismatch"),
        (folder, "blocks.0.mlp.fc1.companion.up", lambda _: None, "does not fit .* Missing key"),
        (folder, "head.weight", lambda _: None, "does not fit .* Missing key.*head.weight"),
        (folder, "head.weight", shortened, "does not fit .* size mismatch for head.weight"),
        (single, f"{entries}columns", shifted, rf"{at} blocks\.1\.attn\.proj: columns "),
        (single, f"{entries}rows", shifted, f"{at} .*: rows "),
        (single, f"{entries}rows", lambda t: t.flip(0), f"{at} .*: rows do not ascend"),
        (single, f"{entries}row_pointer", shifted, f"{at} .*: row_pointer does not lead"),
        (single, f"{entries}row_pointer", lambda _: None, f"{at} .*row_pointer"),
    ]
    for path, name, change, message in cases:
        file = path / "model.safetensors"
        state = whole = load_file(file)
        damaged = change(state[name])
        state = {n: t for n, t in whole.items() if n != name}
        if damaged is not None:
            state[name] = damaged.contiguous()
        store(state, path)
        with pytest.raises(UserError, match=rf"^.*model.safetensors: {message}[^\n]*$"):
            load(path)
        store(whole, path)


def test_no_damaged_file_loads(folder: Path) -> None:
    for name in ("model.safetensors", "model.json"):
        file = folder / name
        sound = file.read_bytes()
        for what, damage in DAMAGED.items():
            if (name, what) == ("model.json", "flipped bytes"):
                continue  # what is for people only may say anything
            damage(file)
            with pytest.raises(UserError) as error:
                load(folder)
            line = str(error.value)
            assert name in line and "\n" not in line and len(line) < 500, (what, line)
            undone(file, sound)
    load(folder)
    with pytest.raises(UserError, match=r"^export: expected a folder, got .*nowhere"):
        load(folder / "nowhere")


def test_no_broken_tensors_load(tmp_path: Path) -> None:
    """Whoever wrote them, with a digest that is right: kernels check nothing."""
    vit = constructor("vit")
    for structure in ("nm-16", "unstructured", "block-8"):
        folder = exported(tmp_path / structure, sparse_model("vit", structure, "random"), vit)
        sound = load_file(folder / "model.safetensors")
        for what, state in broken_states(sound):
            store(state, folder)
            with pytest.raises(UserError) as error:
                load(folder)
            line = str(error.value)
            assert "\n" not in line and len(line) < 600, (structure, what, line)
        store(sound, folder)
        load(folder)


def test_no_weights_come_from_anywhere_else(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.json"
    description = json.loads(path.read_text())
    inputs = example("vit")
    expected = load(folder)(inputs)
    description["model"]["arguments"] |= {"pretrained": True, "checkpoint": "/etc/passwd"}
    path.write_text(json.dumps(description))
    assert_equal(load(folder)(inputs), expected, "loaded")


def test_a_dense_export_loads_too(tmp_path: Path) -> None:
    plain = dense_model("vit")
    description = {"model": constructor("vit"), "layers": {}, "config": ""}
    files.write(tmp_path / "e", plain.state_dict(), description, extra={}, overwrite=False)
    inputs = example("vit")
    assert_equal(load(tmp_path / "e")(inputs), plain(inputs).detach(), "dense")
