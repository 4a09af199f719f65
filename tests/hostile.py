"""Files as somebody may hand them over: damaged, unfinished, or made to do harm.

All are made from sound ones, so that whatever reads a file can be tried with each. A reader either
takes what it gets for what it is, or refuses it in one line; nothing outside is touched.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

from padst_exp.config import config_dir, results_config
from padst_exp.engine.distributed import World
from padst_exp.engine.loop import run
from padst_exp.engine.run_directory import RunDirectory
from padst_exp.train import build_experiment

Damage = Callable[[Path], None]
Config = dict[str, Any]
State = dict[str, Tensor]

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def trained_run(root: Path, *overrides: str) -> Path:
    """The directory of a real run: three steps of a small sparse ViT, permutations still soft."""
    small = ["model.dim=16", "model.depth=1", "model.heads=2", "sparsity=0.5", "backend=torch"]
    steps = ["trainer.steps=3", "trainer.eval_interval=3", "trainer.batch_size=16"]
    rest = ["structure=nm", "logger=none", "device=cpu", "trainer.workers=0"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("config", [*small, *steps, *rest, *overrides])
    world = World()
    directory = RunDirectory.open(
        root,
        "run",
        world,
        resume=cfg.resume,
        config=results_config(cfg),
        config_text=OmegaConf.to_yaml(cfg, resolve=True),
        overrides=[],
    )
    run(build_experiment(cfg, world), directory, world)
    return directory.path


# Of any file.


def _cut(share: float) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)]) * 0


def _content(content: bytes) -> Damage:
    def damage(path: Path) -> None:
        path.write_bytes(content)

    return damage


def _a_little_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 3, len(content), max(1, len(content) // 7)):
        content[place] ^= 0xA5
    path.write_bytes(bytes(content))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere/at-all")


def _circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGED: Mapping[str, Damage] = {
    "empty": _content(b""),
    "half": _cut(0.5),
    "begun": _cut(0.02),
    "a little short": _a_little_short,
    "flipped bytes": _flipped,
    "zeros": lambda path: _content(bytes(path.stat().st_size))(path),
    "a pointer of Git LFS": _content(LFS_POINTER),
    "a web page": _content(b"<!DOCTYPE html><html>404</html>"),
    "a list": _content(b"[1, 2]"),
    "a number": _content(b"5"),
    "null": _content(b"null"),
    "a word": _content(b"hello"),
    "another encoding": _content("schön".encode("utf-16")),
    "deep": _content(b"[" * 20000),
    "a folder": _folder,
    "a dangling link": _dangling,
    "a link to itself": _circle,
    "a pipe": _pipe,
    "no end": _endless,
    "missing": Path.unlink,
}
"""Ways to damage a file in place. Only who knows a digest can tell "flipped bytes", and some texts
that are "a little short" are whole all the same."""


def undone(path: Path, sound: bytes) -> None:
    """Make a damaged file sound again."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.write_bytes(sound)


# Of a training config.

HARMFUL_TARGETS = (
    "os.abort",
    "os.system",
    "subprocess.run",
    "builtins.exec",
    "huggingface_hub.upload_folder",
    "shutil.rmtree",
    "torch.hub.load",
    "planted.Thing",
    "planted",
    "padst_exp_planted.Thing",
    "padst_exp.planted.Thing",
    "padst_exp.restore.restore_run",
    "padst_exp.data.image_files.pickle.loads",
    "padst_exp.data.corpora.Tokenizer",
    "padst_exp.models.vision.nn.Module",
    "padst_exp.models.vision.timm",
    "padst_exp.models..vision.vit",
    ".padst_exp.models.vision.vit",
    "padst_exp.models",
    "",
    "${oc.env:HOME}",
    5,
    None,
    ["padst_exp.models.vision.vit"],
    {"_target_": "planted.Thing"},
)
"""None is a constructor of ours; `planted` is a module that a test may put where Python looks."""

GROUPS = (
    "model", "dataset", "transform", "structure", "dst", "permutation", "optimizer", "trainer",
    "logger",
)  # fmt: skip


def harmful_configs(sound: Config) -> Iterator[tuple[str, Config]]:
    """Training configs that name what is not ours to call, anywhere; none may be built from."""

    def changed(change: Callable[[Config], object]) -> Config:
        config = copy.deepcopy(sound)
        change(config)
        return config

    for target in HARMFUL_TARGETS:
        yield f"model is {target}", changed(lambda c, t=target: c["model"].update(_target_=t))
    evil = {"_target_": "planted.Thing"}
    for group in GROUPS:
        yield f"{group} is planted", changed(lambda c, g=group: c[g].update(evil))
        yield f"all of {group}", changed(lambda c, g=group: c.update({g: evil}))
        yield f"in {group}", changed(lambda c, g=group: c[g].update(deeper=evil))
        yield f"in a list in {group}", changed(lambda c, g=group: c[g].update(deeper=[[evil]]))
        key = next(key for key in sound[group] if key != "_target_") if len(sound[group]) > 1 else 0
        if key:
            yield f"{group}.{key}", changed(lambda c, g=group, k=key: c[g].update({k: evil}))
    for name in ("_partial_", "_args_", "_convert_", "_recursive_", "_mode_"):
        for value in (True, ["id"], "all", evil):
            yield f"{name}={value}", changed(lambda c, n=name, v=value: c["model"].update({n: v}))
    yield (
        "another group's",
        changed(lambda c: c["trainer"].update(_target_=c["logger"]["_target_"])),
    )
    yield "at the top", {**sound, **evil}
    yield "as a key of a run", {**sound, "sparse": [evil]}
    yield "as a distribution", {**sound, "distribution": evil}
    yield "in a key of its own", {**sound, "extra": evil}


def resolving_configs(sound: Config, variable: str) -> Iterator[tuple[str, Config]]:
    """Training configs that want something of their reader, such as a variable's value."""
    for value in (
        f"${{oc.env:{variable}}}",
        f"a ${{oc.env:{variable}}} b",
        f"${{oc.decode:${{oc.env:{variable}}}}}",
        "${oc.create:{a: b}}",
        "${now:%Y}",
        "${hydra:runtime.cwd}",
        "${name}",
        "${",
    ):
        yield f"name={value}", {**sound, "name": value}
        for group in ("model", "dataset", "logger"):
            yield f"{group}: {value}", {**sound, group: {**sound[group], "deeper": value}}
        yield f"a key {value}", {**sound, "distribution": {value: 0.5}}
        yield f"in a list: {value}", {**sound, "sparse": [{"pattern": value, "split": 1}]}


HOSTILE_YAML = (
    "!!python/object/apply:os.abort []",
    "!!python/name:os.abort",
    "model: !!python/object/new:os.abort []",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
    "a: &a\n  b: *a",
    "a: 1\na: 2",
    "? [a, b]\n: 1",
    "\x00",
    "- a\n- b",
    "{" * 3000,
)
"""Text that is no training config, whoever parses it."""


# Of tensors.


def broken_states(sound: State) -> Iterator[tuple[str, State]]:
    """States of a model that none of its readers may load: of wrong sizes, types, or values."""
    name = next(n for n, t in sound.items() if t.is_floating_point() and t.dim() == 2)
    weight = sound[name]
    yield "nothing", {}
    yield "one missing", {n: t for n, t in sound.items() if n != name}
    yield "one too many", {**sound, "extra": torch.zeros(3)}
    yield "renamed", {("x." + n if n == name else n): t for n, t in sound.items()}
    for what, tensor in {
        "transposed": weight.T.contiguous()[:, :-1].contiguous(),
        "longer": torch.cat([weight, weight[:1]]),
        "no dimension": weight.sum(),
        "empty": weight[:0].clone(),
        "NaN": weight.clone().index_fill_(0, torch.tensor([0]), float("nan")),
        "infinite": weight.clone().index_fill_(0, torch.tensor([0]), float("inf")),
        "integers": weight.to(torch.int32),
        "booleans": weight > 0,
        "complex numbers": weight.to(torch.complex64),
    }.items():
        yield f"{name}: {what}", {**sound, name: tensor}
    # One tensor of a kind stands for all.
    for name, index in {name.rpartition(".")[2]: (name, t) for name, t in sound.items()}.values():
        if index.is_floating_point() or index.dim() == 0 or not index.numel():
            continue
        wide = index.long()
        for what, tensor in {
            "beyond": wide + 100_000,
            "negative": wide - 50,
            "all the same": torch.zeros_like(wide),
            "shorter": wide[:-1],
            "of floats": wide.double(),
            "empty": wide[:0],
            "one dimension more": wide[None],
        }.items():
            changed = tensor.contiguous()
            if not torch.equal(changed.float(), wide.float()):
                fits = what in ("of floats", "negative", "beyond")
                yield f"{name}: {what}", {**sound, name: changed if fits else changed.to(index)}
