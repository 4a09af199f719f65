import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.bench_cases import GPT2, VIT, session
from padst_exp.bench import memory, model_inference, model_train, models
from padst_exp.bench.configurations import Model, structure
from padst_exp.bench.memory import Side
from padst_exp.dispatch import decision
from padst_exp.engine.step import compile_blocks
from padst_exp.layers import SparseLinear, permutations

NM = structure("nm-16")


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiling takes minutes; that compiled models compute the same is tested elsewhere."""
    monkeypatch.setattr(models, "compile_blocks", lambda module: None)
    monkeypatch.setattr(decision, "cache_folder", lambda: tmp_path)


@pytest.mark.parametrize("model", [VIT, GPT2], ids=["vit", "gpt2"])
def test_dense_variants_compute_the_same(model: Model) -> None:
    inputs, targets = model.example(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [
            variant.module.eval()(inputs)
            for variant in models.dense_variants(session(), model, training=False)
        ]
    assert len(outputs) > 1
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])
    gradients = []
    for variant in models.dense_variants(session(), model, training=True):
        variant.module.zero_grad()
        model_train._loss(variant.module, inputs, targets).backward()
        gradients.append([parameter.grad for parameter in variant.module.parameters()])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


@pytest.mark.parametrize("model", [VIT, GPT2], ids=["vit", "gpt2"])
@pytest.mark.parametrize(("scope", "layers"), [("all", 8), ("dense_qkv", 6)])
def test_scopes_say_which_layers_are_sparse(model: Model, scope: str, layers: int) -> None:
    eager, compiled = models.sparse_variants(
        session(), model, NM, 0.25, scope, batch=2, training=False
    )
    sparse = [m for m in eager.module.modules() if isinstance(m, SparseLinear)]
    assert len(sparse) == layers and eager.density == pytest.approx(0.25, abs=0.02)
    shared = {p.data_ptr() for p in eager.module.parameters()}
    assert shared == {p.data_ptr() for p in compiled.module.parameters()}
    assert not any(p.soft for p in permutations(eager.module).values())


def test_inference_rows_of_a_vision_model() -> None:
    rows = model_inference.case(session(), VIT, 2, [NM], 0.25, ["all", "dense_qkv"])
    forms = {(row["structure"], row["form"], row["scope"]) for row in rows}
    assert {("dense", "eager", ""), ("dense", "compiled", ""),
            ("nm group=16", "compiled", "all block linears"),
            ("nm group=16", "exported, compiled", "block linears, QKV dense")} <= forms  # fmt: skip
    assert {row["pass"] for row in rows} == {"inference"}
    assert all(row["p50_ms"] > 0 and row["ratio"] > 0 for row in rows)
    assert all(row["dispatcher"] for row in rows if row["structure"] != "dense")
    assert {row["case"] for row in rows} == {"tiny ViT, 32 pixels"}


def test_language_models_say_which_logits() -> None:
    rows = model_inference.case(session(), GPT2, 1, [NM], 0.25, ["all"])
    assert {row["pass"] for row in rows} == {
        "inference, logits of all positions",
        "inference, logits of the last position",
    }
    model = GPT2.build().eval()
    tokens, _ = GPT2.example(3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            model_inference._last_logits(model, tokens), model(tokens)[:, -1]
        )


@pytest.mark.parametrize("soft", [False, True])
def test_a_step_trains_weights_and_soft_permutations(soft: bool) -> None:
    variant = models.sparse_variants(
        session(), VIT, NM, 0.25, "all", batch=2, training=True, soft=soft
    )[0]
    before = {name: p.detach().clone() for name, p in variant.module.named_parameters()}
    model_train.step(session(), VIT, variant, 2)()
    moved = [name for name, p in variant.module.named_parameters() if not p.equal(before[name])]
    assert any(name.endswith("values") for name in moved)
    assert any(name.endswith("logits") for name in moved) == soft


def test_training_rows_tell_the_phases_apart() -> None:
    rows = model_train.case(session(), VIT, 2, [NM], 0.25, ["all"])
    phases = {row["permutation"] for row in rows if row["structure"] != "dense"}
    assert phases == {"soft", "hard"}
    assert all(row["p50_ms"] > 0 for row in rows)


def test_a_refused_kernel_is_neither_exported_nor_timed() -> None:
    said: list[str] = []
    verdicts = {("packed, scattered", "nm group=16", backward): "" for backward in (False, True)}
    verdicts["packed, torch", "nm group=16", False] = "failed its check"
    rows = model_inference.case(session(said, verdicts), VIT, 2, [NM], 0.25, ["all"])
    own = [row for row in rows if row["structure"] != "dense"]
    assert own and {str(row["dispatcher"]).partition(" (")[0] for row in own} == {"8 by dense"}
    assert not any("exported" in str(row["form"]) for row in rows)
    assert any("not exported" in line for line in said)


def test_bytes_are_counted_exactly() -> None:
    plain, density = memory.weigh(session(), VIT, 2, Side(None, 1.0, "", False))
    count = sum(parameter.numel() for parameter in VIT.build().parameters())
    assert density == 1 and plain.indices == 0
    assert plain.parameters == plain.gradients == 4 * count == plain.moments // 2

    sparse, density = memory.weigh(session(), VIT, 2, Side(NM, 0.25, "all", False))
    linears = [m for m in VIT.build().blocks.modules() if isinstance(m, nn.Linear)]
    removed = sum(linear.weight.numel() for linear in linears) * (1 - density)
    assert sparse.parameters == pytest.approx(4 * (count - removed))
    assert sparse.gradients == sparse.parameters == sparse.moments // 2
    assert 0 < sparse.indices < sparse.parameters
    soft, _ = memory.weigh(session(), VIT, 2, Side(NM, 0.25, "all", True))
    assert soft.parameters > sparse.parameters and soft.moments == 2 * soft.parameters


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own() -> None:
    rows = memory.case(session(), VIT, 2, [NM], 0.25, ["all"])
    assert [(row["structure"], row["permutation"]) for row in rows] == [
        ("dense", "none"), ("nm group=16", "hard"), ("nm group=16", "soft"),
    ]  # fmt: skip
    assert rows[0]["kept_share"] == rows[0]["peak_share"] == 1
    assert all(row["peak_bytes"] > 0 for row in rows)


@pytest.mark.slow
def test_compiled_sides_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "compile_blocks", compile_blocks)
    for model in (VIT, GPT2):
        inputs, _ = model.example(2, torch.Generator().manual_seed(0))
        variants = models.dense_variants(session(), model, training=False)
        for pair in (variants, models.sparse_variants(
            session(), model, NM, 0.25, "all", batch=2, training=False
        )):  # fmt: skip
            with torch.inference_mode():
                first, *others = (variant.module.eval()(inputs) for variant in pair)
            for other in others:
                torch.testing.assert_close(other, first)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; import padst_exp.bench.__main__; "
        "print({'torch', 'timm', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={"PYTHONPATH": ":".join(sys.path)}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "set()\n", "")
