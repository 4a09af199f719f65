"""Options of the checks of kernels, and their verdict: one line, or a file for `suite=gpu_all`."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from padst_exp.bench.session import EVERY


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--verdicts", help="file to append lines of JSON to")
    parser.addoption("--structures", help="JSON; default: those of conf/bench.yaml")
    parser.addoption("--dtype", default="bfloat16", help="dtype of weights and activations")


@pytest.fixture
def verdict(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str], None]]:
    """Takes a kernel and why it is refused, "" if it passed; appends a line of JSON.

    Says beforehand that all kernels of the structure did not end, in case the test never does.
    """
    path = request.config.getoption("--verdicts", None)
    structure = request.getfixturevalue("structure").label

    def tell(kernel: str, reason: str) -> None:
        line = {"structure": structure, "kernel": kernel, "test": request.node.name}
        if path:
            with Path(path).open("a") as file:
                file.write(json.dumps({**line, "reason": reason}) + "\n")

    tell(EVERY, "its checks did not end")
    yield tell
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        # What an illegal access leaves behind would fail every test that follows in this process.
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed, failed = (
        sum("gpu/test_kernels" in report.nodeid for report in terminalreporter.getreports(name))
        for name in ("passed", "failed")
    )
    if passed or failed:
        terminalreporter.write_line(f"kernels: {passed} checks passed, {failed} failed")
