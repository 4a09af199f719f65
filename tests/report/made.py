"""Run directories as a training leaves them, made without one."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from padst_exp.config import config_dir
from padst_exp.engine.records import to_json

Config = dict[str, Any]


@cache
def _composed(overrides: tuple[str, ...]) -> Config:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    assert isinstance(cfg, dict)
    return {str(key): value for key, value in cfg.items()}


def made(
    folder: Path,
    name: str,
    value: float | None,
    *,
    overrides: tuple[str, ...] = (),
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    monitor: str = "top1",
) -> Path:
    """A finished run of so much top-1 accuracy, or one without a summary."""
    path = folder / name
    path.mkdir(parents=True)
    whole = {**copy.deepcopy(_composed(overrides)), "seed": seed, **(config or {})}
    (path / "config.yaml").write_text(yaml.dump(whole, Dumper=yaml.CSafeDumper))
    (path / "overrides.yaml").write_text(json.dumps([*overrides, f"seed={seed}"]))
    environment = {"git_commit": "0" * 40, "git_dirty": False, "device": "cpu", "threads": 1,
                   "processes": 1, "python": "3.11", "packages": {"torch": "2.14.1"}}  # fmt: skip
    (path / "env.json").write_text(json.dumps(environment))
    (path / "metrics.jsonl").write_text('{"kind": "train", "step": 7, "loss": 1.0}\n')
    if value is not None:
        final = {"step": 100, "loss": 0.5, monitor: value}
        curve = [{"step": step, "mean": 1 - step / 50, "least": 0, "largest": 1}
                 for step in (1, 25, 50)]  # fmt: skip
        events = [{"step": 50, "choice": "a", "penalty": 0.0, "reason": "delta"}]
        summary = {
            "steps": 100, "monitor": monitor, "final": final, "best": final, "baselines": {},
            "density_of_layers": 0.1, "density_of_model": 0.12, "parameters": 1000,
            "permutations": {"hardened": 1, "forced": 0, "still_soft": [], "penalty_curve": curve,
                             "largest_loss_jump": 0.01, "events": events},
            "sparsification": {"layers": []},
            "timing": {"seconds": 12.0, "device": "cpu", "samples_per_second": 500.0,
                       "input_wait_share": 0.25, "mfu": None, "peak_memory_mb": 900.0},
        }  # fmt: skip
        assert value is None or not math.isinf(value)
        (path / "summary.json").write_text(to_json(summary))
    return path


def swept(
    folder: Path, experiment: str, name: str, arm: str | None, seed: int, **more: object
) -> None:
    """A line in the manifest of a sweep."""
    manifest = folder / "sweeps" / f"{experiment}.jsonl"
    manifest.parent.mkdir(exist_ok=True)
    entry = {
        "experiment": experiment, "scale": "demo", "arm": arm, "swept": {}, "seed": seed,
        "run": name, "config_hash": "", "replicate": "", "overrides": [f"arm={arm}"], **more,
    }  # fmt: skip
    with manifest.open("a") as file:
        file.write(json.dumps(entry) + "\n")
