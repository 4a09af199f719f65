"""Whatever is measured to be fastest takes its place, computes the same, and is reported."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inference.small_models import RULES, Family, dense_model, example, sparse_model
from padst_exp.dispatch import Decision
from padst_exp.inference import graphed, measuring, pack, tune, tuning
from padst_exp.inference.blocks import FeatureStack
from padst_exp.inference.features import DenseFeatureLinear, TiledFeatureLinear
from padst_exp.inference.linear import PackedLinear
from padst_exp.inference.tuning import with_modules
from padst_exp.permutations import RandomPermutation
from padst_exp.sparsify import Rule, sparsify
from structure_cases import STRUCTURES


class Stopwatch:
    """Stands in for `fastest`: runs every candidate, and finds one of the wanted ones fastest."""

    def __init__(self, *wanted: str) -> None:
        self.wanted = wanted
        self.measured: list[tuple[Mapping[str, object], set[str]]] = []

    def __call__(
        self,
        what: Mapping[str, object],
        calls: Callable[[], Mapping[str, Callable[[], object]]],
        *,
        device: torch.device,
    ) -> Decision:
        json.dumps(what)
        found = calls()
        for call in found.values():
            call()
        self.measured.append((what, set(found)))
        choice = next(name for name in self.wanted if name in found)
        return Decision(choice, {name: 1.0 if name == choice else 2.0 for name in found})


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stopwatch]:
    def install(*wanted: str) -> Stopwatch:
        watch = Stopwatch(*wanted)
        monkeypatch.setattr(measuring, "fastest", watch)
        monkeypatch.setattr(tuning, "fastest", watch)
        return watch

    return install


def packed(family: Family, structure: str) -> Any:
    model, _ = sparse_model(family, structure, "random")
    pack(model)
    return model


@pytest.mark.parametrize("structure", ["nm-16", "unstructured"])
@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_fast_layers_stay_sparse(
    family: Family, structure: str, stopwatch: Callable[..., Stopwatch]
) -> None:
    watch = stopwatch("torch", "token-major")
    model, inputs = packed(family, structure), example(family)
    expected = model(inputs)
    names = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    report = tune(model, inputs)
    torch.testing.assert_close(model(inputs), expected)
    assert [row.name for row in report.layers] == names and len(names) == 8
    assert {row.choice for row in report.layers} == {"torch"}
    assert {row.speedup for row in report.layers} == {2.0}
    assert {row.tokens for row in report.layers} == {30 if family == "vit" else 27}
    assert report.layout == "token-major" and report.speedup == 2.0
    assert all(isinstance(model.get_submodule(name), PackedLinear) for name in names)
    # Both blocks are alike; four layers are measured, by themselves and feature-major.
    tiled = structure == "nm-16"
    assert len(watch.measured) == 4 + (8 if tiled else 0) + 1
    assert ("feature-major" in report.seconds) == tiled == (not report.note)
    assert f"{names[0]}: torch, 2.00x dense" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["speedup"] == 2.0


@pytest.mark.parametrize("structure", ["nm-16", "unstructured"])
@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_what_is_slower_than_dense_becomes_dense(
    family: Family, structure: str, stopwatch: Callable[..., Stopwatch]
) -> None:
    stopwatch("token-major", "dense")
    model, inputs = packed(family, structure), example(family)
    expected = model(inputs)
    report = tune(model, inputs)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    torch.testing.assert_close(model(inputs), expected, atol=2e-5, rtol=1e-5)
    assert {row.speedup for row in report.layers} == {1.0}
    # Nothing is left to compare with the dense model, which it is.
    assert report.layout == "dense"


def test_the_whole_model_may_become_dense(stopwatch: Callable[..., Stopwatch]) -> None:
    stopwatch("torch", "dense")
    model, inputs = packed("vit", "nm-16"), example("vit")
    expected = model(inputs)
    report = tune(model, inputs)
    assert report.layout == "dense" and report.speedup == 1.0
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    torch.testing.assert_close(model(inputs), expected, atol=2e-5, rtol=1e-5)
    assert str(report).splitlines()[0].startswith("whole model: dense, 1.00x dense")


@pytest.mark.parametrize("kind", ["torch", "dense"])
@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_feature_major_blocks_take_their_place(
    family: Family, kind: str, stopwatch: Callable[..., Stopwatch]
) -> None:
    stopwatch("feature-major", kind)
    model, inputs = packed(family, "nm-16"), example(family)
    expected = model(inputs)
    report = tune(model, inputs)
    assert report.layout == "feature-major"
    assert [row.choice for row in report.feature_layers] == [kind] * 8
    assert {row.tokens for row in report.feature_layers} == {32}
    assert sum(isinstance(module, FeatureStack) for module in model.modules()) == 1
    layer = TiledFeatureLinear if kind == "torch" else DenseFeatureLinear
    assert sum(isinstance(module, layer) for module in model.modules()) == 8
    torch.testing.assert_close(model(inputs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("together", [2, 1])
def test_alike_layers_are_multiplied_in_turn(
    together: int, stopwatch: Callable[..., Stopwatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    if together == 1:
        monkeypatch.setattr(measuring, "ROTATED", 1)
    watch = stopwatch("torch", "token-major")
    model, inputs = packed("vit", "nm-16"), example("vit")
    row = tune(model, inputs).layers[0]
    layers = [what for what, _ in watch.measured if "rotated" in what]
    assert [what["rotated"] for what in layers] == [together] * 4
    assert row.seconds == {"torch": 1.0 / together, "dense": 2.0 / together}


def test_decisions_are_kept_under_all_that_changes_them(
    stopwatch: Callable[..., Stopwatch],
) -> None:
    """Dtypes of weights and of autocast, and which sides are permuted."""
    inputs = example("vit")
    keys: dict[str, set[str]] = {}
    for case in ("float32", "bfloat16", "autocast bfloat16", "autocast float16", "no permutation"):
        watch = stopwatch("torch", "token-major")
        model, given = packed("vit", "nm-16"), inputs
        if case == "no permutation":
            model, _ = sparse_model("vit", "nm-16", "none")
            pack(model)
        if case == "bfloat16":
            model, given = model.bfloat16(), inputs.bfloat16()
        dtype = torch.float16 if case.endswith(" float16") else torch.bfloat16
        with torch.autocast("cpu", dtype, enabled=case.startswith("autocast")):
            report = tune(model, given)
        assert ("autocast is on" in report.note) == case.startswith("autocast")
        keys[case] = {json.dumps(what, sort_keys=True) for what, _ in watch.measured}
    # Four kinds of layers, alone and in feature-major blocks, and the model.
    assert [len(kept) for kept in keys.values()] == [9, 9, 5, 5, 9]
    assert len(set().union(*keys.values())) == 9 + 9 + 5 + 5 + 9


def test_the_speed_of_tiles_depends_on_which_sides_are_permuted() -> None:
    shown = set()
    for side in ("in", "out", "both"):
        model = dense_model("vit", 64, 2)
        learner = RandomPermutation(side=side)
        structure = STRUCTURES["block-8"]
        sparsify(model, RULES["vit"], structure=structure, density=0.3, learner=learner)
        pack(model)
        shown.add(repr(model.get_submodule("blocks.0.mlp.fc1")))
    assert len(shown) == 3


@pytest.mark.parametrize("wrong", ["values", "error"])
def test_a_candidate_that_computes_something_else_is_not_chosen(
    wrong: str,
    stopwatch: Callable[..., Stopwatch],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    watch = stopwatch("feature-major", "torch", "dense", "token-major")

    class OutOfResources(Exception):
        """Triton's has no narrower base either."""

    def forward(self: nn.Module, x: torch.Tensor, *_: object) -> torch.Tensor:
        if wrong == "error":
            raise OutOfResources("no room")
        return x.new_ones(len(x), self.out_features)

    monkeypatch.setattr(TiledFeatureLinear, "forward", forward)
    model, inputs = packed("vit", "nm-16"), example("vit")
    report = tune(model, inputs)
    assert {row.choice for row in report.feature_layers} == {"dense"}
    reason = "no room" if wrong == "error" else "its results differ by"
    assert f"backend torch is not used here: {reason}" in caplog.text
    assert all("torch" not in kinds for what, kinds in watch.measured if "around" in what)


def test_layers_that_the_example_does_not_reach_stay(stopwatch: Callable[..., Stopwatch]) -> None:
    stopwatch("token-major", "dense")
    model: Any = packed("vit", "nm-16")
    del model.blocks[1]
    model.unused = packed("vit", "nm-16").blocks[1]
    report = tune(model, example("vit"))
    assert len(report.layers) == 4
    assert isinstance(model.unused.mlp.fc1, PackedLinear)


def test_tokens_are_mixed_through_transposed_inputs(stopwatch: Callable[..., Stopwatch]) -> None:
    from padst_exp.models.vision import mixer

    watch = stopwatch("torch", "token-major")
    torch.manual_seed(0)
    model = mixer(
        name="mixer_s16_224", pretrained=False, checkpoint=None, patch_size=4, dim=32, depth=1,
        mlp_ratio=[2.0, 2.0], drop_path=0.0, image_size=12, channels=1, num_classes=5,
    )  # fmt: skip
    sparsify(
        model, [Rule("blocks.*.mlp_*.fc?")], structure=STRUCTURES["nm-16"], density=0.3
    )  # fmt: skip
    pack(model)
    inputs = example("vit")
    expected = model(inputs)
    report = tune(model, inputs)
    torch.testing.assert_close(model(inputs), expected)
    assert report.note == "it has no stack of blocks of a timm ViT or of GPT-2"
    assert [row.tokens for row in report.layers] == [96, 96, 27, 27]
    assert "contiguous=False" in str(watch.measured[0][0])


def test_a_real_measurement_keeps_its_decisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PADST_CACHE", str(tmp_path))
    reports = []
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        inputs = example("vit").to(dtype)
        first = packed("vit", "nm-16").to(dtype)
        expected = first(inputs)
        report = tune(first, inputs)
        error = (first(inputs) - expected).float().norm() / expected.float().norm()
        assert error <= tolerance
        second = packed("vit", "nm-16").to(dtype)
        assert tune(second, inputs) == report
        assert repr(second) == repr(first)
        assert min(report.seconds, key=report.seconds.__getitem__) == report.layout
        reports.append(report)
    # Times are never the same twice: those of one dtype are not taken for those of the other.
    assert reports[0].seconds != reports[1].seconds


def test_nothing_is_measured_while_compiling() -> None:
    model, inputs = packed("vit", "nm-16"), example("vit")

    def inside(x: torch.Tensor) -> torch.Tensor:
        tune(model, x)
        return model(x)

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="tune measures"):
        torch.compile(inside, backend="eager", fullgraph=True)(inputs)


@pytest.mark.gpu
def test_nothing_is_measured_while_capturing() -> None:
    model, inputs = packed("vit", "nm-16").cuda(), example("vit").cuda()
    with pytest.raises(ValueError, match="tune measures"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        tune(model, inputs)


def test_copies_share_all_but_what_changed() -> None:
    model = packed("vit", "nm-16")
    twin = model.blocks[0].mlp.fc1.dense()
    changed: Any = with_modules(model, {"blocks.0.mlp.fc1": twin})
    assert changed.blocks[0].mlp.fc1 is twin and model.blocks[0].mlp.fc1 is not twin
    assert changed.blocks[1] is model.blocks[1]
    assert changed.head.weight is model.head.weight


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="graphed: CUDA graphs need a GPU"):
        graphed(packed("vit", "nm-16"), example("vit"))


def test_captures_are_measured_as_such(
    stopwatch: Callable[..., Stopwatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = stopwatch("torch", "token-major")
    captured: list[nn.Module] = []

    def capture(form: nn.Module, inputs: torch.Tensor) -> nn.Module:
        captured.append(form)
        return form

    monkeypatch.setattr(tuning, "graphed", capture)
    model, inputs = packed("vit", "nm-16"), example("vit")
    report = tune(model, inputs, captured=True)
    assert report.captured and len(captured) == 3 and captured[0] is not model
    whole, _ = watch.measured[-1]
    assert whole["captured"] is True


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_on_a_gpu_triton_is_measured_too(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PADST_CACHE", str(tmp_path))
    model, inputs = packed(family, "nm-16").cuda(), example(family).cuda()
    expected = model(inputs)
    report = tune(model, inputs, captured=True)
    torch.testing.assert_close(model(inputs), expected, atol=1e-3, rtol=1e-3)
    for row in (*report.layers, *report.feature_layers):
        assert set(row.seconds) == {"torch", "triton", "dense"}
    assert set(report.seconds) == {"token-major", "feature-major", "dense"}


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_a_graph_replays_for_its_shape_and_calls_the_model_for_others(family: Family) -> None:
    model = packed(family, "nm-16").cuda()
    inputs, others = example(family, 2).cuda(), example(family, 2).cuda()
    graph = graphed(model, inputs)
    with torch.no_grad():
        first = graph(inputs)
        second = graph(others)
        torch.testing.assert_close(first, model(inputs))
        torch.testing.assert_close(second, model(others))
        more = example(family, 3).cuda()
        torch.testing.assert_close(graph(more), model(more))
