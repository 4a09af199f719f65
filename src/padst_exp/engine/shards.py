"""The parts of a checkpoint that each rank writes for itself: a folder of safetensors beside it.

PyTorch's distributed checkpoints (DCP) in their safetensors form: nothing in one is executed, and
any number of ranks can read it, each what it needs.
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from padst_exp.atomic import sync
from padst_exp.engine.checkpoint import PARTS_SUFFIX
from padst_exp.engine.distributed import World
from padst_exp.errors import UserError
from padst_exp.files import reading, reason, sha256

WANTED = "the parts of a checkpoint that training wrote"


def part_of(shape: tuple[int, ...], part: Tensor, mesh: DeviceMesh) -> DTensor:
    """The rows that this rank has of a tensor of `shape`, knowing that they are."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part.contiguous(), mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
    )


def rows_of(rows: int, rank: int, size: int) -> tuple[int, int]:
    """First and number of the rows that one of `size` ranks has, of so many; as FSDP2 cuts."""
    most = math.ceil(rows / size)
    first = min(rank * most, rows)
    return first, min(most, rows - first)


def write(payload: Mapping[str, Any], folder: Path, world: World) -> dict[str, Any]:
    """Write all parts in `payload`, the contents of a checkpoint, to a folder in `folder`.

    A collective, done when everything is on disk.

    Args:
        payload: with `DTensor` where a rank has a part only.
        folder: of the checkpoints.
        world: all ranks write.

    Returns:
        The payload without parts, and with "shards": where they are, which files there are with
        their digests, which tensors are others by another name. None where nothing is in parts.

    Raises:
        UserError: the disk is full or not writable. All earlier checkpoints are then intact.
    """
    rest, parts, same = _take_out(payload)
    if not parts:
        return {**payload, "shards": None}
    draft = world.from_main(world.first(lambda: _draft(folder, int(payload["step"]))))
    assert draft is not None
    writer = HuggingFaceStorageWriter(str(draft), save_distributed=True)
    try:
        save(dict(parts), storage_writer=writer)
    except CheckpointException as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise _cannot(draft, reason(next(iter(error.failures.values()))[0])) from error
    mine = draft.glob(f"shard-{world.rank + 1:05d}-*")  # as the library counts ranks
    files = {name: digest for each in world.gather(_digests(mine)) for name, digest in each.items()}
    name = world.from_main(world.first(lambda: _publish(draft)))
    return {**rest, "shards": {"folder": name, "files": files, "same": same}}


def verify(payload: Mapping[str, Any], path: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Make sure that the parts of the checkpoint `payload` in `path` are there, undamaged.

    Args:
        payload: with its "shards".
        path: of the checkpoint.
        share: (r, n): of the contents, only every n-th file from the r-th on is looked at.

    Raises:
        UserError: says what is wrong.
    """
    if payload["shards"] is None:
        return
    folder, files = _folder(payload, path), payload["shards"]["files"]
    with reading("checkpoint", folder, WANTED):
        if folder.is_symlink():
            raise ValueError("it is a link")
        found = {each.name for each in folder.iterdir()}
        if found != files.keys():
            raise ValueError(f"it holds {len(found)} files, not the {len(files)} of its checkpoint")
        first, step = share
        for name in sorted(files)[first::step]:
            file = folder / name
            if file.is_symlink() or not file.is_file() or sha256(file) != files[name]:
                raise ValueError(f"{name} in it is damaged")


def join(payload: dict[str, Any], path: Path, mesh: DeviceMesh | None = None) -> None:
    """Put the parts of the checkpoint `payload` in `path` where they belong in it.

    Args:
        payload: with its "shards", which is None then.
        path: of the checkpoint, whose parts were verified.
        mesh: of the ranks that read together, each the rows it will have; None: all of everything.

    Raises:
        UserError: they are no such parts.
    """
    folder, described = _folder(payload, path), payload["shards"]
    if described is None:
        return
    with reading("checkpoint", folder, WANTED), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        reader = HuggingFaceStorageReader(str(folder))
        tensors: dict[str, Tensor] = {}
        for key, found in reader.read_metadata().state_dict_metadata.items():
            assert isinstance(found, TensorStorageMetadata)
            _require_rows(key, found)
            size, dtype = tuple(found.size), found.properties.dtype
            if mesh is None:
                tensors[key] = torch.empty(size, dtype=dtype)
            else:
                _, rows = rows_of(size[0], mesh.get_local_rank(), mesh.size())
                empty = torch.empty(rows, *size[1:], dtype=dtype, device=mesh.device_type)
                tensors[key] = part_of(size, empty, mesh)
        load(tensors, storage_reader=reader, no_dist=mesh is None)
        for key, tensor in tensors.items():
            _put(payload, key, tensor.to_local() if isinstance(tensor, DTensor) else tensor)
        for key, other in described["same"].items():
            kind, name = key.split("/", 1)
            payload[kind][name] = payload[kind][other.split("/", 1)[1]]
        payload["shards"] = None


def _take_out(
    payload: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, DTensor], dict[str, str]]:
    """The payload without what is in parts, the parts by a name, other names of some of them."""
    parts: dict[str, DTensor] = {}
    same: dict[str, str] = {}
    rest = dict(payload)
    for kind in ("model", "average"):
        if payload[kind] is None:
            continue
        rest[kind] = {n: t for n, t in payload[kind].items() if not isinstance(t, DTensor)}
        known: dict[tuple[int, ...], list[str]] = {}
        for name, tensor in payload[kind].items():
            if not isinstance(tensor, DTensor):
                continue
            key, alike = f"{kind}/{name}", known.setdefault(tuple(tensor.shape), [])
            for other in alike:
                if tensor.to_local().is_set_to(parts[other].to_local()):
                    same[key] = other
                    break
            else:
                parts[key] = tensor
                alike.append(key)
    state: dict[int, dict[str, Any]] = {}
    for index, kept in payload["optimizer"]["state"].items():
        state[index] = {n: v for n, v in kept.items() if not isinstance(v, DTensor)}
        found = {n: v for n, v in kept.items() if isinstance(v, DTensor)}
        parts.update({f"optimizer/{index}/{n}": v for n, v in found.items()})
    rest["optimizer"] = {**payload["optimizer"], "state": state}
    return rest, parts, same


def _require_rows(key: str, found: TensorStorageMetadata) -> None:
    """Raise a ValueError unless the parts of a tensor are its rows, each once."""
    # Of a little that is there, very much could be claimed.
    row = 0
    for chunk in sorted(found.chunks, key=lambda chunk: (chunk.offsets[0], chunk.sizes[0])):
        whole = chunk.sizes[1:] == found.size[1:] and not any(chunk.offsets[1:])
        if not whole or chunk.offsets[0] != row:
            raise ValueError(f"it does not hold each row of {key} once")
        row += chunk.sizes[0]


def _put(payload: Mapping[str, Any], key: str, tensor: Tensor) -> None:
    kind, name = key.split("/", 1)
    if kind == "optimizer":
        index, name = name.split("/", 1)
        payload[kind]["state"][int(index)][name] = tensor
    elif kind in ("model", "average"):
        payload[kind][name] = tensor
    else:
        raise ValueError(f"it has {key}")


def _draft(folder: Path, step: int) -> Path:
    """A new folder, by a name under which nobody reads it yet."""
    number = 1
    while True:
        name = f"step-{step:09d}" + (f"-{number}" if number > 1 else "") + PARTS_SUFFIX
        draft = folder / f".{name}.tmp"
        if not os.path.lexists(folder / name):
            shutil.rmtree(draft, ignore_errors=True)
            try:
                draft.mkdir(parents=True)
            except OSError as error:
                raise _cannot(draft, error.strerror) from error
            return draft
        number += 1


def _publish(draft: Path) -> str:
    name = draft.name.removeprefix(".").removesuffix(".tmp")
    try:
        sync(draft)
        os.rename(draft, draft.with_name(name))
        sync(draft.parent)
    except OSError as error:
        raise _cannot(draft, error.strerror) from error
    return name


def _cannot(draft: Path, why: str | None) -> UserError:
    return UserError(
        f"cannot write {draft}: {why}; earlier checkpoints are intact, make room and start again "
        "with resume=auto"
    )


def _digests(files: Iterator[Path]) -> dict[str, str]:
    return {file.name: sha256(file) for file in files}


def _folder(payload: Mapping[str, Any], path: Path) -> Path:
    """Where the parts are; nowhere but beside the checkpoint."""
    if (described := payload["shards"]) is None:
        return path.parent
    name = described["folder"]
    if not name.endswith(PARTS_SUFFIX) or name != Path(name).name:
        raise UserError(f"{path}: damaged, its shards are in {name!r}")
    return path.parent / name
