import functools
import platform
from collections.abc import Iterator

import pytest
import torch

from kernel_cases import needs
from padst_kernels import compiled as compiled_module
from padst_kernels.compiled import compiled
from padst_kernels.entries import native as entries
from padst_kernels.tiles import native as tiles


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    """Tensors made by `empty` hold NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["-mno-avx512bf16", "-mno-avx512f", "-march=x86-64"])
def other_instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native kernels for less than this CPU has: they take other paths through the C++ code."""
    needs("native")
    if platform.machine() != "x86_64":
        pytest.skip("instruction sets of another kind of CPU")
    monkeypatch.setattr(compiled_module, "COMPILE", [*compiled_module.COMPILE, request.param])
    for module, name in ((tiles, "library"), (entries, "functions")):
        monkeypatch.setattr(module, "compiled", compiled.__wrapped__)
        monkeypatch.setattr(module, name, functools.cache(getattr(module, name).__wrapped__))
