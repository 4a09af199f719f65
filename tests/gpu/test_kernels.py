"""Every kernel on a GPU at the widths and densities that are timed.

python -m pytest tests/gpu -n 8 [--dtype float16] [--structures '[{"structure": "nm"}]']
"""

import json
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from omegaconf import OmegaConf

from gpu.kernel_checks import checks
from padst_exp.bench import choices
from padst_exp.bench.choices import Layer, Sparsity
from padst_exp.bench.session import EVERY
from padst_exp.config import config_dir
from padst_exp.errors import UserError

# Joined projections, odd token counts, and enough tokens for split sums.
POINTS = [
    (Layer(768, 3072), 0.1, (1, 50, 197, 6001)),
    (Layer(3072, 768), 0.1, (1, 50, 197, 6001)),
    (Layer(768, 2304, split=3), 0.1, (197,)),
    (Layer(1024, 4096), 0.2, (197,)),
    (Layer(1600, 1600), 0.05, (197,)),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    given = metafunc.config.getoption("--structures", None)
    usual = OmegaConf.load(config_dir() / "bench.yaml").usual.layers.structures
    entries = json.loads(given) if given else OmegaConf.to_container(usual)
    kinds = [choices.sparsity(entry) for entry in entries]
    metafunc.parametrize("structure", kinds, ids=[kind.label for kind in kinds])


@pytest.mark.gpu
@pytest.mark.parametrize("point", POINTS, ids=lambda point: point[0].label)
def test_kernels_agree_with_float64(
    structure: Sparsity,
    point: tuple[Layer, float, tuple[int, ...]],
    verdict: Callable[[str, str], None],
    request: pytest.FixtureRequest,
) -> None:
    layer, density, token_counts = point
    dtype = getattr(torch, request.config.getoption("--dtype", "bfloat16"))
    reasons: dict[str, str] = defaultdict(str)
    legal = True
    for num_tokens in token_counts:
        try:
            for check in checks(structure, layer, density, num_tokens, dtype, torch.device("cuda")):
                reasons[check.kernel] = reasons[check.kernel] or check.reason
        except UserError:
            legal = False  # the structure cannot hold that density there, and nothing is timed
    for kernel, reason in reasons.items():
        verdict(kernel, reason)
    verdict(EVERY, "")
    assert (reasons or not legal) and not any(reasons.values()), dict(reasons)
