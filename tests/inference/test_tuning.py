"""Whatever is measured to be fastest takes its place, computes the same, and is reported."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inference.small_models import RULES, Family, assert_equal, dense_model, example, sparse_model
from inference.test_packing import Encoder
from padst_exp.dispatch import agreement
from padst_exp.inference import (
    PackedConv2d,
    PackedLinear,
    TuningReport,
    graphed,
    measuring,
    pack,
    tune,
    tuning,
)
from padst_exp.inference.blocks import FeatureStack
from padst_exp.inference.features import DenseFeatureLinear, TiledFeatureLinear
from padst_exp.inference.tuning import with_modules
from padst_exp.models.vision import mixer
from padst_exp.permutations import RandomPermutation
from padst_exp.sparsify import Rule, sparsify
from structure_cases import STRUCTURES

FAMILIES: list[Family] = ["vit", "gpt2"]


class Stopwatch:
    """Stands in for `timings`: runs every candidate, and finds one of the wanted ones fastest."""

    def __init__(self, *wanted: str) -> None:
        self.wanted = wanted
        self.measured: list[tuple[Mapping[str, object], set[str]]] = []

    def __call__(
        self,
        what: Mapping[str, object],
        calls: Callable[[], Mapping[str, Callable[[], object]]],
        *,
        device: torch.device,
    ) -> dict[str, float]:
        json.dumps(what)
        found = calls()
        for call in found.values():
            call()
        self.measured.append((what, set(found)))
        fastest = next(name for name in self.wanted if name in found)
        return {name: 1.0 if name == fastest else 2.0 for name in found}


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stopwatch]:
    def install(*wanted: str) -> Stopwatch:
        watch = Stopwatch(*wanted)
        monkeypatch.setattr(agreement, "timings", watch)
        monkeypatch.setattr(tuning, "timings", watch)
        return watch

    return install


def packed(family: Family, structure: str, life: Any = "random") -> Any:
    model = sparse_model(family, structure, life)
    pack(model)
    return model


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


def tuned(model: nn.Module, inputs: torch.Tensor, **options: Any) -> TuningReport:
    """Tune, and check that nothing else is computed."""
    expected = model(inputs)
    report = tune(model, inputs, **options)
    assert_equal(model(inputs), expected, report.form, 1e-4)
    return report


def test_fast_layers_stay_sparse(stopwatch: Callable[..., Stopwatch]) -> None:
    for family, structure in ((f, s) for f in FAMILIES for s in ("nm-16", "unstructured")):
        watch = stopwatch("native", "token-major")
        model = packed(family, structure)
        names = [*packed_layers(model)]
        report = tuned(model, example(family))
        assert [*report.layers] == names == [*packed_layers(model)] and len(names) == 8
        assert {pick.backend for pick in report.layers.values()} == {"native"}
        assert {layer.backend for layer in packed_layers(model).values()} == {"native"}
        assert {pick.speedup for pick in report.layers.values()} == {2.0}
        assert {p.tokens for p in report.layers.values()} == {30 if family == "vit" else 27}
        assert report.form == "token-major" and report.speedup == 2.0
        # Both blocks are alike; four layers are measured, by themselves and feature-major.
        is_tiled = structure == "nm-16"
        assert len(watch.measured) == 4 + (8 if is_tiled else 0) + 1
        assert all(k == {"native", "torch", "dense"} for _, k in watch.measured[:-1])
        assert ("feature-major" in report.seconds) == is_tiled == (not report.note)
        assert f"{names[0]}: native, 2.00x dense" in str(report)
        assert json.loads(json.dumps(asdict(report)))["form"] == report.form


def test_what_is_slower_than_dense_becomes_dense(stopwatch: Callable[..., Stopwatch]) -> None:
    for family, structure in ((f, s) for f in FAMILIES for s in ("nm-16", "unstructured")):
        # One by one, and as a whole.
        for wanted in (("token-major", "dense"), ("native", "dense")):
            stopwatch(*wanted)
            model = packed(family, structure)
            report = tuned(model, example(family))
            assert not packed_layers(model)
            assert report.form == "dense" and report.speedup == 1.0
            assert str(report).splitlines()[0].startswith("whole model: dense, 1.00x dense")
            one_by_one = wanted[0] == "token-major"
            assert {pick.speedup for pick in report.layers.values()} == {1.0 if one_by_one else 2.0}
            assert ("token-major" in report.seconds) != one_by_one


def test_feature_major_blocks_take_their_place(stopwatch: Callable[..., Stopwatch]) -> None:
    for family, kind in (
        ("vit", "native"),
        ("vit", "torch"),
        ("gpt2", "native"),
        ("gpt2", "dense"),
    ):
        stopwatch("feature-major", kind)
        model = packed(family, "nm-16")  # type: ignore[arg-type]
        report = tuned(model, example(family))  # type: ignore[arg-type]
        assert report.form == "feature-major"
        assert [pick.backend for pick in report.feature_layers.values()] == [kind] * 8
        assert {pick.tokens for pick in report.feature_layers.values()} == {32}
        assert sum(isinstance(module, FeatureStack) for module in model.modules()) == 1
        layer = DenseFeatureLinear if kind == "dense" else TiledFeatureLinear
        assert sum(isinstance(module, layer) for module in model.modules()) == 8


def test_alike_layers_are_multiplied_in_turn(
    stopwatch: Callable[..., Stopwatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    for together in (2, 1):
        if together == 1:
            monkeypatch.setattr(measuring, "ROTATED", 1)
        watch = stopwatch("native", "token-major")
        (first, *_) = tuned(packed("vit", "nm-16"), example("vit")).layers.values()
        layers = [what for what, _ in watch.measured if "rotated" in what]
        assert [what["rotated"] for what in layers] == [together] * 4
        assert first.seconds == {
            "native": 1.0 / together, "torch": 2.0 / together, "dense": 2.0 / together
        }  # fmt: skip


def test_timings_are_kept_under_all_that_changes_them(stopwatch: Callable[..., Stopwatch]) -> None:
    """Dtypes of weights and of autocast, which sides are permuted, a companion, biases."""
    inputs = example("vit")
    keys: dict[str, set[str]] = {}
    for case in (
        "float32", "bfloat16", "autocast bfloat16", "autocast float16", "no permutation",
        "companion", "no bias",
    ):  # fmt: skip
        watch = stopwatch("native", "token-major")
        model, given = packed("vit", "nm-16"), inputs
        if case == "no permutation":
            model = packed("vit", "nm-16", "none")
        if case == "companion":
            model = sparse_model("vit", "nm-16", "random", low_rank=1)
            pack(model)
        if case == "no bias":
            for layer in packed_layers(model).values():
                layer.bias = None
        if case == "bfloat16":
            model, given = model.bfloat16(), inputs.bfloat16()
        dtype = torch.float16 if case.endswith(" float16") else torch.bfloat16
        with torch.autocast("cpu", dtype, enabled=case.startswith("autocast")):
            report = tune(model, given)
        assert ("autocast is on" in report.note) == case.startswith("autocast")
        keys[case] = {json.dumps(what, sort_keys=True) for what, _ in watch.measured}
    # Four kinds of layers, alone and in feature-major blocks, and the model.
    assert [len(kept) for kept in keys.values()] == [9, 9, 5, 5, 9, 5, 9]
    assert len(set().union(*keys.values())) == sum(len(kept) for kept in keys.values())
    shown = set()
    for side in ("in", "out", "both"):
        model = dense_model("vit")
        learner = RandomPermutation(side=side)
        structure = STRUCTURES["block-8"]
        sparsify(model, RULES["vit"], structure=structure, density=0.3, learner=learner)
        pack(model)
        shown.add(repr(model.get_submodule("blocks.0.mlp.fc1")))
    assert len(shown) == 3


def test_whatever_computes_something_else_is_not_picked(
    stopwatch: Callable[..., Stopwatch],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Kernels of layers, products of feature-major blocks, and whole blocks."""

    class OutOfResources(Exception):
        """Triton's has no narrower base either."""

    def failing(self: nn.Module, x: torch.Tensor, *_: object) -> torch.Tensor:
        raise OutOfResources("no room")

    def ones(self: nn.Module, x: torch.Tensor, *_: object) -> torch.Tensor:
        return x.new_ones(len(x), self.tiles.out_features)

    for wrong, reason in ((failing, "no room"), (ones, "its results differ by")):
        with monkeypatch.context() as patch:
            patch.setattr(TiledFeatureLinear, "forward", wrong)
            watch = stopwatch("feature-major", "native", "torch", "dense", "token-major")
            report = tuned(packed("vit", "nm-16"), example("vit"))
        assert {pick.backend for pick in report.feature_layers.values()} == {"dense"}
        assert f"backend native is not used here: {reason}" in caplog.text
        assert all(kinds == {"dense"} for what, kinds in watch.measured if "fusion" in what)
    from padst_kernels.tiles import native

    product = native.product

    def larger(*arguments: Any) -> torch.Tensor | None:
        y = product(*arguments)
        return None if y is None else 1.5 * y

    with monkeypatch.context() as patch:
        patch.setattr(native, "product", larger)
        stopwatch("feature-major", "native", "torch", "token-major")
        report = tuned(packed("vit", "nm-16"), example("vit"))
    assert {pick.backend for pick in report.layers.values()} == {"torch"}
    assert {pick.backend for pick in report.feature_layers.values()} == {"torch"}
    with monkeypatch.context() as patch:
        patch.setattr(FeatureStack, "forward", lambda self, x, *_: 1.5 * x)
        stopwatch("feature-major", "native", "token-major")
        report = tuned(packed("vit", "nm-16"), example("vit"))
    assert report.form == "token-major"
    assert report.note == "they compute something else here"


def test_layers_that_the_example_does_not_reach_stay(stopwatch: Callable[..., Stopwatch]) -> None:
    stopwatch("token-major", "dense")
    model = packed("vit", "nm-16")
    del model.blocks[1]
    model.unused = packed("vit", "nm-16").blocks[1]
    assert len(tuned(model, example("vit")).layers) == 4
    assert isinstance(model.unused.mlp.fc1, PackedLinear)


def test_layers_whose_weights_are_read_become_dense(stopwatch: Callable[..., Stopwatch]) -> None:
    stopwatch("native", "token-major")
    model = nn.Sequential(Encoder(), nn.Linear(32, 32))
    rules = [Rule("*attn", split=3), Rule("*proj"), Rule("*linear?"), Rule("1")]
    sparsify(model, rules, structure=STRUCTURES["nm-16"], density=0.4)
    pack(model)
    with torch.no_grad():
        report = tuned(model, torch.randn(2, 7, 32))
    names = ["0.block.linear1", "0.block.linear2", "1"]
    assert [*report.layers] == names == [*packed_layers(model)]
    assert report.form == "token-major"


def test_convolutions_stay_packed_or_become_dense(stopwatch: Callable[..., Stopwatch]) -> None:
    for wanted, kinds in (("native", [PackedConv2d] * 2), ("dense", [nn.Conv2d] * 2)):
        watch = stopwatch(wanted, "token-major")
        model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 1, bias=False))
        sparsify(model, [Rule("?")], structure=STRUCTURES["block-8"], density=0.5)
        pack(model)
        report = tuned(model, torch.randn(2, 8, 6, 5))
        assert [type(module) for module in model] == kinds
        assert [pick.tokens for pick in report.layers.values()] == [60, 60]
        assert "kernel_size=(3, 3)" in str(watch.measured[0][0])
        # The first convolution writes channels fastest, and so the second is measured.
        assert "order=(0, 2, 3, 1)" in str(watch.measured[1][0])


def test_tokens_are_mixed_through_transposed_inputs(stopwatch: Callable[..., Stopwatch]) -> None:
    watch = stopwatch("native", "token-major")
    model = mixer(
        name="mixer_s16_224", pretrained=False, checkpoint=None, patch_size=4, dim=32, depth=1,
        mlp_ratio=[2.0, 2.0], drop_path=0.0, image_size=12, channels=1, num_classes=5,
    )  # fmt: skip
    sparsify(model, [Rule("blocks.*.mlp_*.fc?")], structure=STRUCTURES["nm-16"], density=0.3)
    pack(model.eval())
    report = tuned(model, example("vit"))
    assert report.note == "it has no stack of blocks of a timm ViT or of GPT-2"
    assert [pick.tokens for pick in report.layers.values()] == [96, 96, 27, 27]
    assert "order=(0, 2, 1)" in str(watch.measured[0][0])


def test_a_real_measurement_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("padst_exp.cache.cache_folder", lambda: tmp_path)
    reports = []
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        inputs = example("vit").to(dtype)
        first = packed("vit", "nm-16").to(dtype)
        expected = first(inputs)
        report = tune(first, inputs)
        assert_equal(first(inputs), expected, dtype, tolerance)
        second = packed("vit", "nm-16").to(dtype)
        assert tune(second, inputs) == report
        assert repr(second) == repr(first)
        assert min(report.seconds, key=report.seconds.__getitem__) == report.form
        for pick in report.layers.values():
            assert pick.seconds[pick.backend] == min(pick.seconds.values())
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


def test_copies_share_all_but_what_changed() -> None:
    model = packed("vit", "nm-16")
    twin = model.blocks[0].mlp.fc1.dense()
    other: Any = with_modules(model, {"blocks.0.mlp.fc1": twin})
    assert other.blocks[0].mlp.fc1 is twin and model.blocks[0].mlp.fc1 is not twin
    assert other.head.weight is model.head.weight
    theirs, ours = (m.blocks[1].mlp.fc1.parts[0] for m in (other, model))
    assert theirs.values is ours.values and theirs.columns is ours.columns


def test_captures_are_measured_as_such_and_need_a_gpu(
    stopwatch: Callable[..., Stopwatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = packed("vit", "nm-16"), example("vit")
    with pytest.raises(ValueError, match="graphed: CUDA graphs need a GPU"):
        graphed(model, inputs)
    watch = stopwatch("native", "token-major")
    captured: list[nn.Module] = []

    def capture(form: nn.Module, inputs: torch.Tensor) -> nn.Module:
        captured.append(form)
        return form

    monkeypatch.setattr(tuning, "graphed", capture)
    report = tuned(model, inputs, captured=True)
    assert report.captured and len(captured) == 3 and captured[0] is not model
    whole, _ = watch.measured[-1]
    assert whole["captured"] is True


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is measured too; nothing while capturing; a graph replays for its shape alone."""
    monkeypatch.setattr("padst_exp.cache.cache_folder", lambda: tmp_path)
    for family in FAMILIES:
        model, inputs = packed(family, "nm-16").cuda(), example(family).cuda()
        refused = pytest.raises(ValueError, match="tune measures")
        with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
            tune(model, inputs)
        expected = model(inputs)
        report = tune(model, inputs, captured=True)
        assert_equal(model(inputs), expected, "tuned", 1e-3)
        for pick in (*report.layers.values(), *report.feature_layers.values()):
            assert set(pick.seconds) == {"torch", "triton", "dense"}
        assert set(report.seconds) == {"token-major", "feature-major", "dense"}
        graph = graphed(model, inputs)
        others, more = example(family).cuda(), example(family, 4).cuda()
        with torch.no_grad():
            first, second = graph(inputs), graph(others)
            for found, given in ((first, inputs), (second, others), (graph(more), more)):
                assert_equal(found, model(given), "replayed", 1e-4)
