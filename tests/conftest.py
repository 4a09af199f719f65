"""Every test runs seeded and on one thread; `gpu` tests are skipped where there is no GPU."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small finished run; whoever changes something in it takes a copy."""
    from hostile import trained_run

    return trained_run(tmp_path_factory.mktemp("real"))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds torch's default generator before each test; returns the seed."""
    torch.manual_seed(0)
    return 0
