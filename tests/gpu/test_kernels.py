"""Every kernel on a GPU at the widths and densities that are timed.

python -m pytest -m gpu tests/gpu -n 8 [--dtype float16] [--structures '[{"structure": "nm"}]']
"""

import json
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from omegaconf import OmegaConf

from gpu.kernel_checks import checks
from padst_exp.bench import choices
from padst_exp.bench.choices import Layer, Sparsity
from padst_exp.bench.keys import Shape
from padst_exp.config import config_dir
from padst_exp.errors import UserError
from padst_kernels import Backend

# Joined projections, odd token counts, and enough tokens for split sums.
POINTS = [
    (Shape(inputs=768, outputs=3072), 0.1, (1, 50, 197, 6001)),
    (Shape(inputs=3072, outputs=768), 0.1, (1, 50, 197, 6001)),
    (Shape(inputs=768, outputs=2304, split=3), 0.1, (197,)),
    (Shape(inputs=1024, outputs=4096), 0.2, (197,)),
    (Shape(inputs=1600, outputs=1600), 0.05, (197,)),
]
BACKENDS = [backend for backend in get_args(Backend) if backend != "native"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    given = metafunc.config.getoption("--structures", None)
    usual = OmegaConf.load(config_dir() / "bench.yaml").suites.layers.structures
    entries = json.loads(given) if given else OmegaConf.to_container(usual)
    kinds = [choices.sparsity(entry) for entry in entries]
    metafunc.parametrize("structure", kinds, ids=[kind.label for kind in kinds])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("point", POINTS, ids=lambda point: point[0].label)
def test_kernels_agree_with_float64(
    structure: Sparsity,
    backend: Backend,
    point: tuple[Shape, float, tuple[int, ...]],
    verdict: Callable[[str], None],
    request: pytest.FixtureRequest,
) -> None:
    shape, density, token_counts = point
    dtype, cuda = (
        getattr(torch, request.config.getoption("--dtype", "bfloat16")),
        torch.device("cuda"),
    )
    found = []
    for tokens in token_counts:
        try:
            found += checks(structure, Layer(shape), density, tokens, dtype, cuda, {backend})
        except UserError:
            break  # the structure cannot hold that density there, and nothing is timed
    reason = next((check.reason for check in found if check.reason), "")
    verdict(reason)
    assert not reason
