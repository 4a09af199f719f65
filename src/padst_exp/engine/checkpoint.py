"""Checkpoints: one file each, written whole or not at all, read without executing anything."""

import os
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from padst_exp.atomic import replacing
from padst_exp.errors import UserError
from padst_exp.files import one_line, reading, reason
from padst_exp.identity import differences
from padst_exp.messages import say

FORMAT = 4
# Of folders beside checkpoints that hold what ranks wrote in parts.
PARTS_SUFFIX = ".parts"


def _any(value: Any) -> bool:
    return True


# Of each part its type, and what else holds.
PARTS: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "step": (int, lambda step: step >= 0),
    "model": (Mapping, _any),
    "average": (Mapping | None, _any),
    "optimizer": (Mapping, lambda state: {"state", "param_groups"} <= state.keys()),
    "schedule": (Mapping, _any),
    "learners": (list, _any),
    "topology": (Mapping, _any),
    "births": (Mapping | None, _any),
    "best": (tuple | None, lambda best: best is None or len(best) == 2),
    "losses": (list, _any),
    "norms": (list, _any),
    "random": (list, _any),
    "data": (Mapping, _any),
    "environment": (Mapping, _any),
    "backends": (Mapping, _any),
    "config": (Mapping, _any),
    "config_text": (str, _any),
}


def random_state() -> dict[str, Any]:
    """Return the state of every random number generator of this process."""
    algorithm, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "python": random.getstate(),
        "numpy": (algorithm, torch.tensor(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if cuda else None,
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set every random number generator of this process to what `random_state` returned."""
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def write(payload: Mapping[str, Any], path: Path) -> None:
    """Write `payload` (tensors and plain containers) to `path`, atomically and durably.

    Raises:
        OSError: the disk is full or not writable. What `path` held is then untouched.
    """
    try:
        with replacing(path) as file:
            torch.save({"format": FORMAT, **payload}, file)
    except RuntimeError as error:  # torch hides what the disk said
        hidden: BaseException | None = error
        while hidden is not None and not isinstance(hidden, OSError):
            hidden = hidden.__cause__ or hidden.__context__
        if hidden is None:
            raise
        raise hidden from error


def read(path: Path) -> dict[str, Any]:
    """Return what training stored in `path`, on the CPU; whole, if ranks wrote it in parts.

    Raises:
        UserError: when the file is missing, damaged, or not one of ours; names the part.
    """
    payload = read_file(path)
    if payload["shards"] is not None:
        from padst_exp.engine import shards  # whose imports take long

        shards.verify(payload, path)
        shards.join(payload, path)
    require_numbers(payload, path)
    return payload


def read_file(path: Path) -> dict[str, Any]:
    """Return what `write` stored in `path`, on the CPU, without what is in "shards" beside it.

    Raises:
        UserError: as `read`.
    """
    with reading("checkpoint", path, "one that training wrote"):
        with zipfile.ZipFile(path) as archive:
            # A little that is compressed may be very much.
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("it is compressed")
            if (damaged := archive.testzip()) is not None:  # torch does not look
                raise ValueError(f"{damaged} in it is damaged")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        found = payload.get("format") if isinstance(payload, dict) else None
        raise UserError(f"{path}: checkpoint format {found}, this version reads {FORMAT}")
    for name, (kind, valid) in PARTS.items():
        if name not in payload:
            raise UserError(f"{path}: damaged, it has no {name}")
        value = payload[name]
        if isinstance(value, bool) or not isinstance(value, kind) or not valid(value):
            found = value if isinstance(value, int | float) else type(value).__name__
            raise UserError(f"{path}: damaged, its {name} is {found}")
    shards = payload.setdefault("shards", None)
    kinds = {"folder": str, "files": Mapping, "same": Mapping}
    if shards is not None and not (
        isinstance(shards, Mapping)
        and all(isinstance(shards.get(name), kind) for name, kind in kinds.items())
    ):
        raise UserError(f"{path}: damaged, its shards are {type(shards).__name__}")
    return payload


def require_numbers(payload: Mapping[str, Any], path: Path) -> None:
    """Raise a `UserError` unless the models in a checkpoint are tensors without NaN."""
    for weights in (payload["model"], payload["average"] or {}):
        for name, tensor in weights.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise UserError(f"{path}: damaged, {name} of its model is no tensor")
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                raise UserError(f"{path}: {name} of its model is not a number in places")


def read_best(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of the best evaluation; the last one where there is none, or it is damaged.

    Returns:
        Its path and its contents.

    Raises:
        UserError: both are missing or damaged.
    """
    best, last = folder / "best.pt", folder / "last.pt"
    if not os.path.lexists(best):
        return last, read(last)
    try:
        return best, read(best)
    except UserError as error:
        if not last.exists():
            raise
        payload = read(last)
        say(f"warning: {error}; taking {last} of step {payload['step']} instead")
        return last, payload


@contextmanager
def restoring(path: Path, part: str) -> Iterator[None]:
    """A block that takes over a part of a checkpoint and does nothing else.

    Raises:
        UserError: for any error in it, since then the part is not what it should be.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: damaged, its {part} does not fit: {reason(error)}") from error


def require_same_config(
    stored: Mapping[str, object], current: Mapping[str, object], path: Path
) -> None:
    """Raise a `UserError` naming the first key in which two nested configs differ."""
    for difference in differences(stored, current):
        raise UserError(
            f"{path}: written by another configuration, {difference}; choose another name, or "
            "resume=never"
        )


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load what a checkpoint holds under "model" or "average" into `model`.

    Raises:
        UserError: when it is the state of another model, or holds infinities; names `path`.
    """
    expected = model.state_dict()
    for name, tensor in weights.items():
        like = expected.get(name, tensor)
        # Loading would convert it without a word.
        if tensor.is_floating_point() != like.is_floating_point() or tensor.is_complex():
            raise UserError(f"{path}: does not fit this model: {name} is of {tensor.dtype}")
    try:
        model.load_state_dict(weights)
    except (RuntimeError, IndexError, TypeError, AttributeError, KeyError, ValueError) as error:
        # torch lists one mismatch a line, below a title.
        lines = str(error).splitlines()
        first = one_line(lines[1]) if len(lines) > 1 else reason(error)
        raise UserError(f"{path}: does not fit this model: {first}") from error
    for name, parameter in model.named_parameters():
        if not bool(parameter.detach().isfinite().all()):
            raise UserError(f"{path}: {name} of its model is not finite")


class Checkpoints:
    """The checkpoints of one run: `last.pt`, `best.pt` and, if asked for, some before the last.

    Args:
        folder: existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last = folder / "last.pt"
        self.best = folder / "best.pt"
        self._last_step: int | None = None

    def save(self, payload: Mapping[str, Any], *, is_best: bool, keep_last: int = 1) -> None:
        """Write `last.pt`, and `best.pt` before it, so that a kill in between loses neither.

        Args:
            payload: contents, with the "step" at which they were taken.
            is_best: whether this is to be `best.pt` too.
            keep_last: how many of the latest to keep; those before `last.pt` are `step-<n>.pt`.

        Raises:
            UserError: the disk is full or not writable. All earlier checkpoints are then intact.
        """
        try:
            if keep_last > 1 and self._last_step is not None:
                _copy(self.last, self.folder / f"step-{self._last_step:09d}.pt")
            write(payload, self.best if is_best else self.last)
            if is_best:
                _copy(self.best, self.last)
        except OSError as error:
            raise UserError(
                f"cannot write {self.last}: {error.strerror}; earlier checkpoints are intact, make "
                "room and start again with resume=auto"
            ) from error
        self._last_step = int(payload["step"])
        for path in sorted(self.folder.glob("step-*.pt"))[: -(keep_last - 1) or None]:
            path.unlink()
        _prune(self.folder)

    def load(self, read: Callable[[Path], dict[str, Any]] = read) -> dict[str, Any] | None:
        """Return the contents of `last.pt`, or None where there is none yet.

        Args:
            read: how it is read.
        """
        if not os.path.lexists(self.last):
            return None
        payload = read(self.last)
        self._last_step = int(payload["step"])
        return payload


def _prune(folder: Path) -> None:
    """Remove parts of which no checkpoint in `folder` speaks any more."""
    left = {path for path in folder.glob(f"step-*{PARTS_SUFFIX}") if path.is_dir()}
    if not left:
        return
    for path in folder.glob("*.pt"):
        try:
            shards = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["shards"]
        except Exception:  # nobody can tell what a damaged one speaks of
            return
        if shards is not None:
            left.discard(folder / shards["folder"])
    for path in left:
        if not path.is_symlink():
            shutil.rmtree(path)


def _copy(source: Path, target: Path) -> None:
    """Let `target` hold what `source` holds, atomically."""
    link = target.with_name(f".{target.name}.link.tmp")
    try:
        os.link(source, link)
        os.replace(link, target)
    except OSError:  # not every file system has hard links
        with open(source, "rb") as original, replacing(target) as copy:
            shutil.copyfileobj(original, copy)
