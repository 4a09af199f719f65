"""An exported model on disk: a folder with `model.safetensors` and `model.json`."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from padst_exp.atomic import sync
from padst_exp.errors import UserError
from padst_exp.files import reading, reason, sha256
from padst_exp.inference.linear import PackedConv2d, PackedLinear
from padst_exp.inference.weights import PackedEntries, PackedTiles, PackedWeight
from padst_exp.layers import LowRank
from padst_exp.layers.sparse_conv import Window
from padst_exp.layers.views import LinearView
from padst_exp.targets import HOMES, constructor, within
from padst_kernels.entries import Condensed
from padst_kernels.tiles import TileIndex

FORMAT = 3
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
FOR_OTHERS = ("config.json", "README.md", "tokenizer.json", "tokenizer_config.json")
"""Further files of an export, which timm and transformers read."""

# Besides constructors of models, nothing else that a file names is ever called.
REBUILD = "padst_exp.transforms.rebuild"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Constructor(TypedDict):
    """What builds the dense model: `build`s target and all its arguments."""

    _target_: str
    arguments: dict[str, Any]


class Part(TypedDict):
    """One product: `PackedTiles` or `PackedEntries`."""

    kind: Literal["tiles", "entries"]
    out_features: int


class Layer(TypedDict):
    """A packed layer; `rank` is that of its companion, 0 where it has none."""

    in_features: int
    density: float
    rank: int
    parts: list[Part]


class Description(TypedDict):
    """What is read of `model.json`; the rest is for people.

    Args:
        model: the dense model.
        layers: the packed layers in it by module name.
        shared: names of tensors that are stored under another name, and that name.
        tensors: hex digest (SHA-256) of the file that stores them.
        config: YAML of the training.
    """

    model: Constructor
    layers: dict[str, Layer]
    shared: dict[str, str]
    tensors: str
    config: str


def write(
    folder: Path,
    state: Mapping[str, Tensor],
    description: Mapping[str, Any],
    *,
    extra: Mapping[str, str],
    overwrite: bool,
) -> None:
    """Write an export, whole or not at all.

    Args:
        folder: to make, its parents too.
        state: tensors by name. Of those that share memory the first is stored, and the others
            are named in the description.
        description: plain data.
        extra: text of further files by name.
        overwrite: whether an earlier export may be replaced; it stays until the new one is whole.

    Raises:
        UserError: the folder exists and may not be replaced, or the disk is full.
    """
    require_free(folder, overwrite=overwrite)
    folder = folder.resolve()  # a link stays and leads to the new one
    own, shared = _without_shared(state)
    try:
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"out: cannot write {folder}: {error.strerror}") from error
    try:
        # transformers reads only files that say so.
        save_file(own, temporary / WEIGHTS, metadata={"format": "pt"})
        whole = {
            "format": FORMAT,
            **description,
            "shared": shared,
            "tensors": sha256(temporary / WEIGHTS),
        }
        text = json.dumps(whole, indent=2) + "\n"
        for name, content in {**extra, DESCRIPTION: text}.items():
            (temporary / name).write_text(content, "utf-8")
        # safetensors lets nobody but its writer read a file.
        shutil.copymode(temporary / DESCRIPTION, temporary / WEIGHTS)
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        _replace(temporary, folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"out: cannot write {folder}: {error}; nothing was changed") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_free(folder: Path, *, overwrite: bool) -> None:
    """Raise a UserError unless an export may be written to `folder`."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / DESCRIPTION).is_file():
        raise UserError(f"out: {folder} exists and is no export; choose another folder")
    if not overwrite:
        raise UserError(
            f"out: {folder} holds an export already; overwrite=true replaces it, out=... keeps it"
        )
    known = {WEIGHTS, DESCRIPTION, *FOR_OTHERS}
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in known)
    if foreign:
        raise UserError(f"out: {folder} also holds {foreign[0]}, which would be lost; remove it")


def read_description(folder: Path) -> Description:
    """What `write` stored as description.

    Raises:
        UserError: there is none, or it is damaged, foreign, or of another version.
    """
    path = folder / DESCRIPTION
    if not folder.exists():
        raise UserError(f"export: expected a folder, got {folder} (there is none)")
    if (folder / "checkpoints").is_dir() and not path.exists():
        raise UserError(
            f"export: expected a folder of one, got {folder} (a run, of which "
            f"python -m padst_exp.export run={folder} writes it)"
        )
    wanted = f"the {DESCRIPTION} that padst_exp.export wrote"
    with reading("export", path, wanted):
        description = json.loads(path.read_text("utf-8"))
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else None
        raise UserError(f"{path}: export format {found}, this version reads {FORMAT}")
    try:
        return TypeAdapter(Description).validate_python(description, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: damaged, {where}: {first['msg']}") from error


def read_state(folder: Path, description: Description) -> dict[str, Tensor]:
    """All tensors by name, on the CPU; those that share memory are one tensor.

    Raises:
        UserError: the file is missing, damaged or another one, or holds what is no finite number.
    """
    path, wanted = folder / WEIGHTS, f"the tensors that {DESCRIPTION} describes"
    state = read_tensors("export", path, wanted, digest=description["tensors"])
    with reading("export", path, wanted):
        for name, source in description["shared"].items():
            if name in state:
                raise ValueError(f"{name} is there twice")
            state[name] = state[source]
    return state


def read_tensors(key: str, path: Path, wanted: str, *, digest: str | None) -> dict[str, Tensor]:
    """All tensors of one file by name, on the CPU.

    Args:
        key, path, wanted: as in `reading`.
        digest: of the file, where it is known.

    Raises:
        UserError: the file is missing, damaged or another one, or holds what is no finite number.
    """
    with reading(key, path, wanted):
        if digest is not None and sha256(path) != digest:
            raise ValueError("its digest is another one")
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                continue
            if tensor.dtype not in DTYPES:
                raise TypeError(f"{name} is of {tensor.dtype}")
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} is not finite")
    return state


def construct(model: Constructor, path: Path) -> nn.Module:
    """The dense model that a description names, on the meta device.

    Raises:
        UserError: it is not one of ours, or its arguments do not fit.
    """
    target = model["_target_"]
    home = REBUILD if target == REBUILD else HOMES["model"]
    if not within(target, home):
        raise UserError(
            f"{path}: its model {target!r} is none of {home}.*, which alone are called for a "
            "file; build it yourself and give it to load(..., model=...)"
        )
    try:
        with torch.device("meta"):
            made = constructor(target, home)(**_bare(model["arguments"]))
        if not isinstance(made, nn.Module):
            raise TypeError(f"{target} makes a {type(made).__name__}")
        return made
    except Exception as error:  # constructors fail in any way when called with anything
        raise UserError(f"{path}: its model cannot be built: {reason(error)}") from error


def _bare(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same without weights from anywhere: all of them are in the file."""
    none: dict[str, object] = {"pretrained": False, "checkpoint": None}
    return {
        key: none.get(key, _bare(value) if isinstance(value, dict) else value)
        for key, value in arguments.items()
    }


def empty_layer(
    described: Layer, state: Mapping[str, Tensor], prefix: str, dense: LinearView
) -> PackedLinear:
    """A layer as `packing.pack` described it, with the tensors of `state` under `prefix`.

    Args:
        described: what is said of it.
        state: all tensors by name.
        prefix: of its own.
        dense: the layer that it replaces, which says how a convolution moves.

    Raises:
        KeyError, TypeError, ValueError, IndexError: they do not fit each other.
    """
    in_features, out_features = described["in_features"], 0
    if in_features != dense.matrix.shape[1]:
        raise ValueError(f"{in_features} features in, {dense.matrix.shape[1]} in the dense layer")
    parts = []
    for number, part in enumerate(described["parts"]):
        parts.append(_part(part, in_features, state, f"{prefix}parts.{number}."))
        out_features += part["out_features"]
    if out_features != dense.matrix.shape[0]:
        raise ValueError(f"{out_features} features out, {dense.matrix.shape[0]} in the dense layer")
    bias = state.get(f"{prefix}bias")
    if (bias is None) != (dense.bias_tensor is None):
        raise ValueError(f"{'no' if bias is None else 'a'} bias, unlike the dense layer")
    companion = None
    if described["rank"]:
        with torch.device("meta"):
            companion = LowRank(out_features, in_features, described["rank"], None)
    rest = parts, bias, companion
    if isinstance(dense.module, nn.Conv2d):
        return PackedConv2d(Window.of(dense.module), *rest)
    return PackedLinear(*rest)


def _part(
    described: Part, in_features: int, state: Mapping[str, Tensor], prefix: str
) -> PackedWeight:
    values, columns = state[f"{prefix}values"], state[f"{prefix}columns"]
    rows, row_pointer = state.get(f"{prefix}rows"), state.get(f"{prefix}row_pointer")
    out_features = described["out_features"]
    weight: PackedWeight
    if described["kind"] == "tiles":
        index = TileIndex(
            columns=columns,
            rows=rows,
            row_pointer=row_pointer,
            order=None,
            column_pointer=torch.zeros(in_features + 1, dtype=torch.int32),
            transposed_pointer=state.get(f"{prefix}column_groups"),
        )
        weight = PackedTiles(values, index, out_features)
    elif rows is None or row_pointer is None:
        raise KeyError(f"{prefix}row_pointer")
    else:
        entries = Condensed(values, columns, row_pointer, rows, in_features, out_features)
        weight = PackedEntries(entries)
    weight.check()
    return weight


def guards(layers: Iterable[str]) -> dict[str, Tensor]:
    """What stands in a file for plain transformers where it looks for weights of packed `layers`.

    It draws a weight that a file lacks at random, with a warning, and refuses one of another size.
    """
    return {f"{name}.weight": torch.zeros(1) for name in layers}


def _without_shared(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that own their memory, and the name of the owner for all others."""
    own: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    owners: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in state.items():
        key = tensor.data_ptr(), tensor.shape
        if tensor.numel() and key in owners:
            shared[name] = owners[key]
        else:
            owners[key] = name
            own[name] = tensor.detach().cpu().contiguous()
    return own, shared


def _replace(new: Path, folder: Path) -> None:
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(new, folder)
        return
    # No system call exchanges two folders everywhere: for a moment the old one has another name.
    old = new.with_name(f"{new.name}.old")
    os.replace(folder, old)
    try:
        os.replace(new, folder)
    except OSError:
        os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
