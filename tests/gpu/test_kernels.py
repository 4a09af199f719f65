"""Every kernel on a GPU at the widths and densities that are timed.

python -m pytest -m gpu tests/gpu -n 8 [--dtype float16] [--structures '[{"structure": "nm"}]']
"""

import json

import pytest
import torch
from omegaconf import OmegaConf

from gpu.kernel_checks import checks
from padst_exp.bench import choices
from padst_exp.bench.choices import Layer, Sparsity
from padst_exp.config import config_dir
from padst_exp.errors import UserError

# Joined projections, odd token counts, and enough tokens for split sums.
POINTS = [
    (Layer(inputs=768, outputs=3072), 0.1, (1, 50, 197, 6001)),
    (Layer(inputs=3072, outputs=768), 0.1, (1, 50, 197, 6001)),
    (Layer(inputs=768, outputs=2304, split=3), 0.1, (197,)),
    (Layer(inputs=1024, outputs=4096), 0.2, (197,)),
    (Layer(inputs=1600, outputs=1600), 0.05, (197,)),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    given = metafunc.config.getoption("--structures", None)
    usual = OmegaConf.load(config_dir() / "bench.yaml").suites.layers.structures
    entries = json.loads(given) if given else OmegaConf.to_container(usual)
    kinds = [choices.sparsities(entry)[0] for entry in entries]
    metafunc.parametrize("structure", kinds, ids=[kind.label for kind in kinds])


@pytest.mark.gpu
@pytest.mark.parametrize("point", POINTS, ids=lambda point: point[0].label)
@pytest.mark.usefixtures("sound_device")
def test_kernels_agree_with_float64(
    structure: Sparsity,
    point: tuple[Layer, float, tuple[int, ...]],
    request: pytest.FixtureRequest,
) -> None:
    layer, density, token_counts = point
    dtype = getattr(torch, request.config.getoption("--dtype", "bfloat16"))
    reasons: dict[str, str] = {}
    for num_tokens in token_counts:
        try:
            found = list(checks(structure, layer, density, num_tokens, dtype, torch.device("cuda")))
        except UserError:
            return  # the structure cannot hold that density there
        assert found
        reasons |= {check.kernel: check.reason for check in found if check.reason}
    assert not reasons
