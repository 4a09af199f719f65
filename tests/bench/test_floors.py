import pytest
import torch

from bench.bench_cases import CPU, GPT2, VIT
from padst_exp.bench import floors
from padst_exp.bench.floors import Work, rotation


def test_a_twin_writes_every_word_from_what_it_reads() -> None:
    for reads, size in (([3, 2], 4), ([2, 1], 5), ([4], 4), ([1, 1, 6], 3)):
        sources = [torch.full((n,), i + 1, dtype=torch.int32) for i, n in enumerate(reads)]
        target = torch.full((size,), -1, dtype=torch.int32)
        for move in floors._moves(sources, target):
            move()
        read = torch.cat(sources)[:size]
        assert torch.equal(target[: len(read)], read) and not target[len(read) :].any()


def test_weights_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "last_level_cache", lambda device: 100)
    monkeypatch.setattr(floors, "MAX_ROTATION", 50)
    assert [rotation(size, CPU) for size in (1, 10, 1000)] == [50, 25, 2]


def test_a_floor_is_the_arithmetic_that_sparsity_leaves() -> None:
    # Two blocks 32 wide with an MLP of 128: 5 tokens of an image (one of class), 8 of a text.
    linears = {"all": 2 * 32 * (96 + 32 + 128 + 128), "dense_qkv": 2 * 32 * (32 + 128 + 128)}
    patches, heads = 2 * 4 * 3 * 16 * 16 * 32 + 2 * 32 * 10, 2 * 8 * 32 * 50
    for model, tokens, outside in ((VIT, 5, patches), (GPT2, 8, heads)):
        module = model.build().eval()
        work = Work(module, lambda module, x: module(x), model.example(1)[0])
        attention = 2 * 2 * 2 * tokens * tokens * 32
        total = outside + attention + 2 * tokens * linears["all"]
        parameters = sum(parameter.numel() for parameter in module.parameters())
        assert work.left([], 1.0) == (total, parameters)
        for scope, size in linears.items():
            operations, weights = work.left(model.rules(scope), 0.1)
            assert operations == pytest.approx(total - 0.9 * 2 * tokens * size)
            assert weights == pytest.approx(parameters - 0.9 * size)
