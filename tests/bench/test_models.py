from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from bench.bench_cases import GPT2, MODELS, NM, RESNET, VIT, keys, session
from padst_exp.bench import choices, contenders, models
from padst_exp.bench.models import Kind

HARD, SOFT = choices.sparsities({**NM, "permutations": ["hard", "soft"]})
KIND: Kind = (HARD, 0.25, "all")


def rows_of(suite: str, said: list[str], **changes: Any) -> pd.DataFrame:
    both = {**NM, "permutations": ["hard", "soft"]}
    own = keys(suite, **{"structures": [both], **changes})
    return pd.concat(models.run(own, session(said)))


def test_dense_and_exported_models_compute_the_same() -> None:
    for model in (VIT, GPT2, RESNET):
        inputs = model.example(2)[0]
        one = models.sparse(session(), model, 2, KIND)
        exported = contenders.exported_model(one, inputs)
        alike = [[one, exported]]
        alike += [contenders.dense(session(), model, packed) for packed in (None, 16)]
        for first, *others in alike:
            with torch.no_grad():
                expected = first.modules[0].eval()(inputs)
                assert others
                for other in others:
                    result = other.modules[0].eval()(inputs)
                    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


def test_what_is_sparse_in_a_scope() -> None:
    for model, counts in ((VIT, [4, 3, 0]), (GPT2, [4, 3, 0]), (RESNET, [2, 2, 0])):
        assert [len(model.rules(scope)) for scope in ("all", "dense_qkv", "")] == counts


def test_rows_of_models() -> None:
    for suite, chosen, what, scopes, states in (
        ("model_inference", MODELS[:2], "inference", ["all", "dense_qkv"], ["hard"]),
        ("model_train", [MODELS[0], MODELS[2]], "training step", ["all"], ["hard", "soft"]),
    ):
        said: list[str] = []
        structures = [{**NM, "permutations": states}]
        rows = rows_of(suite, said, models=chosen, scopes=scopes, structures=structures, rounds=1)
        assert not any("skipped" in line for line in said), said
        assert set(rows["pass"]) == {what} and len(set(rows["case"])) == 2
        sparse = rows[rows.structure != "dense"]
        assert set(sparse.scope) == set(scopes) and set(sparse.permutation) == set(states)
        exported = (sparse.form == "exported, compiled").any()
        assert exported == (suite == "model_inference")
        assert (rows.p50_ms > 0).all() and (rows.ratio > 0).all() and all(sparse.dispatcher)


def test_a_step_trains_weights_and_soft_permutations() -> None:
    for model, kind in ((VIT, HARD), (VIT, SOFT), (RESNET, SOFT)):
        one = models.sparse(session(), model, 2, (kind, *KIND[1:]))
        before = {n: p.detach().clone() for n, p in one.modules[0].named_parameters()}
        models.step(session(), model, one, 2)[0]()
        moved = [n for n, p in one.modules[0].named_parameters() if not p.equal(before[n])]
        assert any(name.endswith("values") for name in moved)
        assert any(name.endswith("logits") for name in moved) == (kind is SOFT)


def test_bytes_are_counted_exactly() -> None:
    rows = rows_of("memory", [])
    assert list(rows.structure) == ["dense", "nm group=16", "nm group=16"]
    assert list(rows.permutation) == ["none", "hard", "soft"]
    dense, hard, soft = (row for _, row in rows.iterrows())
    count = sum(parameter.numel() for parameter in VIT.build().parameters())
    assert dense.indices_bytes == 0 and dense.parameters_bytes == 4 * count
    # Beside two moments, a count of steps for each parameter.
    steps = 4 * len(list(VIT.build().parameters()))
    assert dense.gradients_bytes == 4 * count and dense.moments_bytes == 8 * count + steps
    linears = [m for m in VIT.build().get_submodule("blocks").modules() if isinstance(m, nn.Linear)]
    removed = sum(linear.weight.numel() for linear in linears) * (1 - KIND[1])
    assert hard.parameters_bytes == pytest.approx(4 * (count - removed))
    assert hard.gradients_bytes == hard.parameters_bytes < hard.moments_bytes / 2
    assert 0 < hard.indices_bytes < hard.parameters_bytes < soft.parameters_bytes
    assert soft.moments_bytes > 2 * soft.parameters_bytes
    for row in (dense, hard, soft):
        assert row[list(models.KEPT.values())].sum() == row.kept_bytes
        assert row.peak_bytes > row.kept_bytes - row.gradients_bytes
    assert dense.kept_share == dense.peak_share == 1 > hard.kept_share
