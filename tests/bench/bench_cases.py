"""Sessions, keys and models small enough to run every suite within seconds."""

import sys
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from padst_exp.bench import __main__ as command
from padst_exp.bench import choices
from padst_exp.bench.choices import Keys, keys_of
from padst_exp.bench.session import Ceilings, Session, Timer, columns
from padst_exp.config import config_dir
from programs import exit_status

CPU = torch.device("cpu")
NM = {"structure": "nm", "group": 16, "permutations": ["hard"]}
STRUCTURES: list[dict[str, Any]] = [
    {**NM, "permutations": ["hard", "soft", "none"]},
    {"structure": "nm", "group": 1},
    {"structure": "block", "size": 8, "permutations": ["hard", "none"]},
    {"structure": "diag", "bundle": 1},
    {"structure": "unstructured", "permutations": ["none"]},
]
SMALL = {"dim": 32, "depth": 2, "heads": 2}
IMAGES = {"image_size": 32, "channels": 3, "num_classes": 10}
TEXT = {"vocab_size": 50, "context_length": 8}
MODELS: list[Any] = [
    {"model": "vit", "patch_size": 16, **SMALL},
    {"model": "gpt2", **SMALL},
    {"model": "resnet18", "width": 0.25},
]
VIT, GPT2, RESNET = (choices.model(entry, IMAGES, TEXT) for entry in MODELS)


def session(said: list[str] | None = None, timer: Timer | None = None) -> Session:
    """A session on the CPU that has measured no ceilings."""
    timer, ceilings = timer or Timer(CPU, "wall"), Ceilings(bandwidth=1e10, rate=1e11)
    said = [] if said is None else said
    about = columns(timer, torch.float32, ceilings)
    return Session(timer, torch.float32, None, ceilings, about, 2, said.append)


def keys(suite: str, **changes: Any) -> Keys:
    """Keys for tiny layers and models."""
    cfg: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "bench.yaml"))
    cfg = {key: value for key, value in cfg.items() if key not in ("defaults", "hydra")}
    tiny = {"device": "cpu", "rounds": 2, "sparsities": [0.75], "tokens": [5],
            "shapes": [{"inputs": 32, "outputs": 48}], "structures": STRUCTURES,
            "models": MODELS[:1], "batches": [2], "scopes": ["all"], "images": IMAGES,
            "text": TEXT}  # fmt: skip
    return keys_of({**cfg, **tiny, "suite": suite, **changes})


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The command line in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    return exit_status(command.main)
