import pytest
import torch
from torch import Tensor, nn

from bench.bench_cases import GPT2, VIT, session
from padst_exp.bench.configurations import Model
from padst_exp.bench.work import Work

# Of both models: two blocks 32 wide, whose MLP is 128 wide.
LAYERS = {"all": 2 * 32 * (96 + 32 + 128 + 128), "dense_qkv": 2 * 32 * (32 + 128 + 128)}
# A class token and four patches; the context.
TOKENS = {VIT.name: 5, GPT2.name: 8}


def forward(module: nn.Module, inputs: Tensor) -> Tensor:
    output: Tensor = module(inputs)
    return output


@pytest.mark.parametrize("model", [VIT, GPT2], ids=["vit", "gpt2"])
def test_a_floor_is_the_arithmetic_that_sparsity_leaves(model: Model) -> None:
    inputs, _ = model.example(1, torch.Generator().manual_seed(0))
    work = Work(model, model.build().eval(), forward, inputs)
    tokens = TOKENS[model.name]
    attention = 2 * 2 * 2 * tokens * tokens * 32
    outside = {
        VIT.name: 2 * 4 * 3 * 16 * 16 * 32 + 2 * 32 * 10,  # patches, and one head
        GPT2.name: 2 * tokens * 32 * 50,
    }[model.name]
    assert work.operations == outside + attention + 2 * tokens * LAYERS["all"]

    of = session()
    batch = 10**6  # arithmetic, not weights, takes the time
    dense = work.floor(of, batch, "", 1.0)
    assert dense == pytest.approx(batch * work.operations / of.ceilings.rate)
    for scope, size in LAYERS.items():
        saved = 0.9 * 2 * tokens * size / work.operations
        assert work.floor(of, batch, scope, 0.1) == pytest.approx(dense * (1 - saved))
    assert work.floor(of, batch, "", 1.0, training=True) == pytest.approx(3 * dense)


def test_a_floor_is_no_less_than_reading_the_weights() -> None:
    inputs, _ = VIT.example(1, torch.Generator().manual_seed(0))
    work = Work(VIT, VIT.build().eval(), forward, inputs)
    slow = session()
    object.__setattr__(slow.ceilings, "rate", 1e30)
    reading = 4 * (work.weights - 0.9 * LAYERS["all"]) / slow.ceilings.bandwidth
    assert work.floor(slow, 1, "all", 0.1) == pytest.approx(reading)
