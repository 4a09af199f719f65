"""Damage to files of every kind, drawn: of their bytes, of what they say, of what they are."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hostile import DAMAGED, HOSTILE_YAML, Damage, broken_states, harmful_configs, resolving_configs
from padst_exp.files import sha256

# A reader that has no end to come to is for those that know how large a file may be.
WAYS = sorted(DAMAGED.keys() - {"no end"})
VALUES: list[Any] = [
    None, True, 0, -1, 1, 3, 10**6, 2**31, 2**62, 0.5, -0.5, 1e30, math.inf, math.nan, "", "x", "é",
    "NaN", "../..", "os.abort", "${oc.env:HOME}", [], [[]], {}, {"a": 1}, {"_target_": "os.abort"},
]  # fmt: skip
CELLS = ["", "x", "NaN", "inf", "-1", "0", "1e400", "9" * 30, "é", '"', "a,b,c", "\x00"]


SOME = [b"\xef\xbb\xbf", b"\xff\xfe", b"\x00" * 9, b"\n", b"\xff", b"9" * 40]
RAN = "it-ran"
TAR_TYPES = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"S", b"Z"]


class Running:
    """Leaves a file where it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return open, (RAN, "w")


@st.composite
def damages(draw: st.DrawFn, path: Path) -> tuple[str, Damage]:
    """A way to damage a file like the one at `path`, which is sound, and its name."""
    kinds = ["way", "bytes", "bytes", "another", "pickle"]
    if (meant := MEANT.get(path.name) or MEANT.get(path.suffix)) is not None:
        kinds += ["meant"] * 5
    kind = draw(st.sampled_from(kinds))
    if kind == "way":
        way = draw(st.sampled_from(WAYS))
        return way, DAMAGED[way]
    if kind == "pickle":
        return kind, lambda damaged: damaged.write_bytes(pickle.dumps(Running())) * 0
    if kind == "another":
        return draw(_another(path))
    if kind == "meant" and meant is not None:
        return draw(meant(path))
    return draw(_bytes())


@st.composite
def _bytes(draw: st.DrawFn) -> tuple[str, Damage]:
    """Cut, changed, longer: bytes that nobody has looked at."""
    what = draw(st.sampled_from(["cut", "flip", "insert", "before", "after", "twice"]))
    share, bit = draw(st.floats(0, 1)), draw(st.integers(0, 7))
    some = draw(
        st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"\x00" * 9, b"\n", b"\xff", b"9" * 40])
    )

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        place = min(int(share * len(content)), max(0, len(content) - 1))
        if what == "cut":
            del content[place:]
        elif what == "flip" and content:
            content[place] ^= 1 << bit
        elif what == "insert":
            content[place:place] = some
        elif what == "before":
            content[:0] = some
        elif what == "after":
            content += some
        elif what == "twice":
            content *= 2
        path.write_bytes(bytes(content))

    return f"{what} {some!r} at {share}, bit {bit}", damage


@st.composite
def _another(draw: st.DrawFn, path: Path) -> tuple[str, Damage]:
    """Another sound file of the same folder, or near it, under this name."""
    near = sorted(one for one in path.parent.rglob("*") if one.is_file() and one != path)
    if not near:
        return "empty", DAMAGED["empty"]
    other = draw(st.sampled_from(near))
    return f"a copy of {other.name}", lambda damaged: shutil.copy(other, damaged)


def _replaced(draw: st.DrawFn, whole: Any, values: list[Any] = VALUES) -> tuple[str, Any]:
    """Plain containers with a value somewhere in them replaced, or left out."""
    whole = copy.deepcopy(whole)
    node, key, trail = whole, None, []
    while isinstance(node, dict | list) and len(node):
        holder, key = (
            node,
            draw(
                st.sampled_from(
                    sorted(node, key=str) if isinstance(node, dict) else range(len(node))
                )
            ),
        )
        trail.append(str(key))
        node = holder[key]
        if draw(st.integers(0, 3)) == 0:
            break
    if key is None:
        return "nothing", whole
    if draw(st.integers(0, 4)) == 0:
        del holder[key]
        return f"{'.'.join(trail)} left out", whole
    value = draw(st.sampled_from(values))
    holder[key] = value
    return (
        f"{'.'.join(trail)}={value if not isinstance(value, torch.Tensor) else value.shape}",
        whole,
    )


def _writing(text: str) -> Damage:
    return lambda path: path.write_text(text, "utf-8", "surrogatepass") * 0


@st.composite
def _config(draw: st.DrawFn, path: Path) -> tuple[str, Damage]:
    sound = yaml.safe_load(path.read_text("utf-8"))
    hostile = [*harmful_configs(sound), *resolving_configs(sound, "HOME")]
    if draw(st.booleans()):
        what, config = draw(st.sampled_from(hostile))
        return what, _writing(yaml.safe_dump(config))
    if draw(st.integers(0, 3)) == 0:
        text = draw(st.sampled_from(HOSTILE_YAML))
        return text[:40], _writing(text)
    what, config = _replaced(draw, sound)
    return what, _writing(yaml.safe_dump(config))


@st.composite
def _json(draw: st.DrawFn, path: Path) -> tuple[str, Damage]:
    what, value = _replaced(draw, json.loads(path.read_text("utf-8")))
    return what, _writing(json.dumps(value))


@st.composite
def _rows(draw: st.DrawFn, path: Path) -> tuple[str, Damage]:
    rows = path.read_text("utf-8").splitlines()
    place = draw(st.integers(0, len(rows) - 1))
    what, value = _replaced(draw, json.loads(rows[place]))
    rows[place] = json.dumps(value)
    return f"row {place}: {what}", _writing("\n".join(rows))


@st.composite
def _table(draw: st.DrawFn, path: Path) -> tuple[str, Damage]:
    rows = [line.split(",") for line in path.read_text("utf-8").splitlines()]
    row = draw(st.integers(0, len(rows) - 1))
    column = draw(st.integers(0, len(rows[row]) - 1))
    rows[row][column] = draw(st.sampled_from(CELLS))
    return f"{row}, {column}: {rows[row][column]!r}", _writing(
        "\n".join(map(",".join, rows)) + "\n"
    )


TENSORS: list[Any] = [
    *VALUES, torch.zeros(0), torch.zeros(3), torch.zeros(2, 2), torch.full((3,), math.nan),
    torch.zeros(3, dtype=torch.int64), torch.full((5,), 2**40), torch.zeros(2, dtype=torch.bool),
    torch.zeros(3, dtype=torch.complex64), torch.tensor(7), (1, 2), (math.nan, -1),
]  # fmt: skip


@st.composite
def _checkpoint(draw: st.DrawFn, path: Path) -> tuple[str, Damage]:
    sound = torch.load(path, weights_only=True)
    if "model" in sound and draw(st.integers(0, 2)) == 0:
        what, state = draw(st.sampled_from([*broken_states(sound["model"])]))
        return what, lambda damaged: torch.save({**sound, "model": state}, damaged)
    what, payload = _replaced(draw, sound, TENSORS)
    return what, lambda damaged: torch.save(payload, damaged)


@st.composite
def _tensors(draw: st.DrawFn, path: Path) -> tuple[str, Damage]:
    what, state = draw(st.sampled_from([*broken_states(load_file(path))]))
    told = draw(st.booleans())

    def damage(damaged: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, damaged)
        description = damaged.with_name("model.json")
        if told and description.is_file():  # by whoever made it, with its digest
            with contextlib.suppress(ValueError, TypeError):  # unless it is damaged itself
                content = json.loads(description.read_text("utf-8"))
                content["tensors"] = sha256(damaged)
                description.write_text(json.dumps(content))

    return f"{what}, digest {told}", damage


@st.composite
def _idx(draw: st.DrawFn, path: Path) -> tuple[str, Damage]:
    """Another number in the header, or other values behind it."""
    content = bytearray(path.read_bytes())
    place, value = draw(st.integers(0, 15)), draw(st.integers(0, 255))
    if draw(st.booleans()):
        content[place] = value
    else:
        content[16:] = bytes([value]) * (len(content) - 16)
    return (
        f"byte {place} or all behind is {value}",
        lambda damaged: damaged.write_bytes(content) * 0,
    )


def _columns() -> dict[str, Callable[[Any], Any]]:
    import pyarrow as pa

    return {
        "no label": lambda t: t.drop_columns(["label"]),
        "text labels": lambda t: t.set_column(1, "label", pa.array(["x"] * len(t))),
        "null labels": lambda t: t.set_column(1, "label", pa.nulls(len(t), pa.int64())),
        "float labels": lambda t: t.set_column(1, "label", pa.array([math.nan] * len(t))),
        "huge labels": lambda t: t.set_column(1, "label", pa.array([2**62] * len(t))),
        "negative labels": lambda t: t.set_column(1, "label", pa.array([-1] * len(t))),
        "null images": lambda t: t.set_column(0, "image", pa.nulls(len(t), t.schema[0].type)),
        "number images": lambda t: t.set_column(0, "image", pa.array([1.5] * len(t))),
        "empty images": lambda t: t.set_column(
            0, "image", pa.array([{"bytes": b"", "path": None}] * len(t), t.schema[0].type)
        ),
        "no rows": lambda t: t.slice(0, 0),
    }


@st.composite
def _parquet(draw: st.DrawFn, path: Path) -> tuple[str, Damage]:
    import pyarrow.parquet as pq

    what = draw(st.sampled_from(sorted(_columns())))
    table = _columns()[what](pq.read_table(path))
    return what, lambda damaged: pq.write_table(table, damaged)


@st.composite
def _tar(draw: st.DrawFn, path: Path) -> tuple[str, Damage]:
    """A member that is something else, is called otherwise, or says something else."""
    with tarfile.open(path) as tar:
        members = [(one, tar.extractfile(one).read()) for one in tar]  # type: ignore[union-attr]
    number = draw(st.integers(0, len(members) - 1))
    what = draw(st.sampled_from(["type", "name", "content", "left out", "twice"]))
    info, content = members[number]
    if what == "type":
        info.type, info.linkname = draw(st.sampled_from(TAR_TYPES)), "/dev/zero"
    elif what == "name":
        info.name = draw(st.sampled_from(["../x.jpg", "/x.jpg", "x", ".x", "é.cls", "a/" * 99]))
    elif what == "content":
        content = draw(st.sampled_from([*SOME, b"", b"-1", b"7", b"x" * 600]))
        info.size, members[number] = len(content), (info, content)
    members[number : number + 1] = [(info, content)] * {"left out": 0, "twice": 2}.get(what, 1)

    def damage(damaged: Path) -> None:
        with tarfile.open(damaged, "w") as tar:
            for member, content in members:
                tar.addfile(member, io.BytesIO(content))

    return f"{what} of member {number}: {info.type!r} {info.name!r} {content[:9]!r}", damage


MEANT: dict[str, Callable[[Path], st.SearchStrategy[tuple[str, Damage]]]] = {
    "config.yaml": _config,
    ".json": _json,
    ".jsonl": _rows,
    ".csv": _table,
    ".pt": _checkpoint,
    ".safetensors": _tensors,
    "train-images-idx3-ubyte": _idx,
    "train-labels-idx1-ubyte": _idx,
    ".parquet": _parquet,
    ".tar": _tar,
}
"""Damage that keeps the format: what is said is wrong. By the name of a file, or its suffix."""
