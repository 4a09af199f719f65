from typing import Any

import pytest
import torch
from torch import nn

from bench.bench_cases import GPT2, MODELS, NM, VIT, keys, session
from padst_exp.bench import choices, contenders, models
from padst_exp.bench.models import Kind, weigh

KIND: Kind = (choices.sparsity(NM), 0.25, "all", "hard")
SOFT: Kind = (*KIND[:3], "soft")


def rows_of(suite: str, said: list[str], verdicts: Any = None, **changes: Any) -> list[Any]:
    own = keys(suite, structures=[NM], **changes)
    return [row for case in models.run(own, session(said, verdicts)) for row in case]


def test_dense_and_exported_models_compute_the_same() -> None:
    for model in (VIT, GPT2):
        inputs = model.example(2)[0]
        one = models.sparse(session(), model, 2, KIND, torch.float32)
        exported = contenders.exported_model(session(), one, inputs)
        alike = [[one, exported]]
        alike += [
            contenders.dense(session(), model, torch.float32, packed) for packed in (None, 16)
        ]
        for first, *others in alike:
            with torch.no_grad():
                expected = first.modules[0].eval()(inputs)
                assert others
                for other in others:
                    result = other.modules[0].eval()(inputs)
                    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


def test_scopes_and_logits() -> None:
    for model in (VIT, GPT2):
        assert [len(model.rules(scope)) for scope in ("all", "dense_qkv", "")] == [4, 3, 0]
    module, tokens = GPT2.build().eval(), GPT2.example(3)[0]
    with torch.no_grad():
        torch.testing.assert_close(models.last_logits(module, tokens), module(tokens)[:, -1])


def test_rows_of_models() -> None:
    logits = {"inference, logits of all positions", "inference, logits of the last position"}
    for suite, passes, states in (
        ("model_inference", {"inference", *logits}, {"hard"}),
        ("model_train", {"training step"}, {"hard", "soft"}),
    ):
        said: list[str] = []
        rows = rows_of(suite, said, models=MODELS, scopes=["all", "dense_qkv"])
        assert not any("skipped" in line for line in said), said
        assert {row["pass"] for row in rows} == passes
        sparse = [row for row in rows if row["structure"] != "dense"]
        assert {row["scope"] for row in sparse} == {"all", "dense_qkv"}
        assert {row["permutation"] for row in sparse} == states
        exported = any(row["form"] == "exported, compiled" for row in sparse)
        assert exported == (suite == "model_inference")
        assert all(row["p50_ms"] > 0 and row["ratio"] > 0 and row["dispatcher"] for row in sparse)
        # Floors shrink with what is sparse.
        own = [row for row in rows if row["case"] == rows[0]["case"]]
        floors = {row["scope"]: row["floor_ms"] for row in own}
        assert 0 < floors["all"] < floors["dense_qkv"] < floors[""]


def test_a_step_trains_weights_and_soft_permutations() -> None:
    for kind in (KIND, SOFT):
        one = models.sparse(session(), VIT, 2, kind, torch.float32)
        before = {n: p.detach().clone() for n, p in one.modules[0].named_parameters()}
        models.step(session(), VIT, one, 2)[0]()
        moved = [n for n, p in one.modules[0].named_parameters() if not p.equal(before[n])]
        assert any(name.endswith("values") for name in moved)
        assert any(name.endswith("logits") for name in moved) == (kind is SOFT)


def test_refused_kernels_are_neither_used_nor_exported() -> None:
    said: list[str] = []
    verdicts = {("nm group=16", "packed, scatter"): "", ("nm group=16", "packed, native"): "wrong"}
    rows = rows_of("model_inference", said, verdicts)
    sparse = [row for row in rows if row["structure"] != "dense"]
    assert sparse and all(row["dispatcher"].startswith("8 by scatter") for row in sparse)
    assert not any("exported" in row["form"] for row in rows)
    assert any("its kernels did not pass" in line for line in said)


def test_bytes_are_counted_exactly() -> None:
    dense = weigh(session(), VIT, 2, None)
    count = sum(parameter.numel() for parameter in VIT.build().parameters())
    assert dense["indices_bytes"] == 0 and dense["parameters_bytes"] == 4 * count
    assert dense["gradients_bytes"] == 4 * count and dense["moments_bytes"] == 8 * count
    hard, soft = (weigh(session(), VIT, 2, kind) for kind in (KIND, SOFT))
    linears = [m for m in VIT.build().get_submodule("blocks").modules() if isinstance(m, nn.Linear)]
    removed = sum(linear.weight.numel() for linear in linears) * (1 - KIND[1])
    assert hard["parameters_bytes"] == pytest.approx(4 * (count - removed))
    assert hard["gradients_bytes"] == hard["parameters_bytes"] == hard["moments_bytes"] // 2
    assert 0 < hard["indices_bytes"] < hard["parameters_bytes"] < soft["parameters_bytes"]
    assert soft["moments_bytes"] == 2 * soft["parameters_bytes"]


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own() -> None:
    rows = rows_of("memory", [])
    sides = [(row["structure"], row["permutation"]) for row in rows]
    assert sides == [("dense", "none"), ("nm group=16", "hard"), ("nm group=16", "soft")]
    assert rows[0]["kept_share"] == rows[0]["peak_share"] == 1 > rows[1]["kept_share"]
