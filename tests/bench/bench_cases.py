"""Sessions and models small enough to run every suite within seconds."""

from collections.abc import Mapping
from pathlib import Path

import torch

from padst_exp.bench.accuracy import Accuracies
from padst_exp.bench.configurations import Model
from padst_exp.bench.environment import environment
from padst_exp.bench.keys import BenchSchema
from padst_exp.bench.roofline import Ceilings
from padst_exp.bench.session import Session
from padst_exp.bench.timing import Budget, Clock

CPU = torch.device("cpu")
VIT = Model(
    "vit",
    "tiny ViT",
    {"image_size": 32, "channels": 3, "num_classes": 10},
    {"dim": 32, "depth": 2, "heads": 2, "patch_size": 16},
)
GPT2 = Model(
    "gpt2",
    "tiny GPT-2",
    {"vocab_size": 50, "context_length": 8},
    {"dim": 32, "depth": 2, "heads": 2},
)


def session(
    said: list[str] | None = None,
    verdicts: Mapping[tuple[str, str, bool], str] | None = None,
    tables: Path = Path("nowhere"),
) -> Session:
    """A session on the CPU that has measured no ceilings."""
    return Session(
        clock=Clock(CPU, "cpu"),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float32,
        environment=environment(CPU, torch.float32, "cpu"),
        ceilings=Ceilings(bandwidth=1e10, rate=1e11),
        accuracies=Accuracies(tables),
        budget=Budget(None),
        rounds=2,
        say=(said if said is not None else []).append,
        verdicts=verdicts,
    )


def settings(suite: str = "layers") -> BenchSchema:
    """Keys for tiny layers."""
    return BenchSchema(
        suite=suite,  # type: ignore[arg-type]
        device="cpu",
        threads=1,
        clock="cpu",
        dtype=None,
        rounds=None,
        models=None,
        batches=None,
        budget=None,
        sparsities=[0.75],
        shapes=["48x32"],
        tokens=[5],
        structures=["nm-16", "nm-1", "block-8", "diag-1", "unstructured"],
        sparsity=0.75,
        scopes=["all", "dense_qkv"],
        out="results",
    )
