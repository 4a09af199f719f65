"""Options of the checks of kernels, and their verdict: one line, or a file for `suite=gpu_all`."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--verdicts", help="file to append lines of JSON to")
    parser.addoption("--structures", help="JSON; default: those of conf/bench.yaml")
    parser.addoption("--dtype", default="bfloat16", help="dtype of weights and activations")


@pytest.fixture
def verdict(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    """Takes why a backend is refused, "" if it passed; appends a line of JSON.

    Says beforehand that the test did not end, in case it never does.
    """
    path = request.config.getoption("--verdicts", None)
    structure, backend = (request.getfixturevalue(name) for name in ("structure", "backend"))

    def tell(reason: str) -> None:
        line = {"structure": structure.label, "backend": backend, "test": request.node.name}
        if path:
            with Path(path).open("a") as file:
                file.write(json.dumps({**line, "reason": reason}) + "\n")

    tell("its checks did not end")
    yield tell
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        # What an illegal access leaves behind would fail every test that follows in this process.
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise
