"""What becomes of a dense layer, and of what hangs on it, when it is made sparse."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from dst_cases import rigl
from from_yaml import from_yaml
from layers.layer_cases import SoftHalf
from padst_exp.config import options
from padst_exp.errors import UserError
from padst_exp.inference import pack
from padst_exp.inference.linear import PackedLinear
from padst_exp.layers import SparseLinear, sparse_layers, sparse_weights
from padst_exp.layers.surgery import Taken
from padst_exp.permutations import PermutationLearner, RandomPermutation, is_bijection
from padst_exp.soft import choices
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import NM, Block, Structure, Unstructured
from permutation_cases import learned
from structure_cases import STRUCTURES


class Tower(nn.Module):
    """One layer of each kind, on 24 features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, padding=1)
        self.fused = nn.Linear(24, 72)
        self.attention = nn.MultiheadAttention(24, 3, batch_first=True)
        self.fc = nn.Linear(24, 40)
        self.out = nn.Linear(40, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        x = x + sum(self.fused(x).chunk(3, dim=-1))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.out(self.fc(x).relu())


TOWER = [
    Rule("fused", 3), Rule("attention", 3), Rule("attention.out_proj"),
    Rule("conv"), Rule("fc"), Rule("out"),
]  # fmt: skip


def tower() -> Tower:
    torch.manual_seed(0)
    model = Tower()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def plain(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layers or (nn.Linear(8, 12), nn.Linear(12, 8))))


def state(model: nn.Module) -> tuple[str, dict[str, Tensor]]:
    return repr(model), {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_untouched(model: nn.Module, before: tuple[str, dict[str, Tensor]]) -> None:
    shown, values = state(model)
    assert shown == before[0] and values.keys() == before[1].keys()
    assert all(torch.equal(value, before[1][name]) for name, value in values.items())


def test_what_is_frozen_stays_frozen() -> None:
    for parameters in (("weight",), ("weight", "bias"), ("bias",)):
        model = plain()
        for name in parameters:
            getattr(model[0], name).requires_grad_(False)
        report = sparsify(
            model, [Rule("?")], structure=Unstructured(), density=0.5, learner=learned(),
            algorithm=SoftHalf(), low_rank=1,
        )  # fmt: skip
        frozen, other = (model.get_submodule(name) for name in "01")
        assert isinstance(frozen, SparseLinear) and isinstance(other, SparseLinear)
        trained = {name for name, p in frozen.named_parameters() if p.requires_grad}
        assert all(p.requires_grad for p in other.parameters())
        assert frozen.bias is not None
        assert frozen.bias.requires_grad == ("bias" not in parameters)
        if parameters == ("bias",):
            assert trained == {name for name, _ in frozen.named_parameters()} - {"bias"}
            continue
        assert trained <= {"bias"}
        assert not any(choice.soft for choice in choices(frozen).values())
        assert frozen.parts()[0].topology().density == 0.5
        assert [layer.static for layer in report.layers] == [True, False]
        # Also once the other hardens, and after its units changed.
        for choice in choices(model).values():
            choice.harden()
        for weight in sparse_weights(model).values():
            if (change := weight.settle()) is not None:
                weight.adopt(change)
        assert {name for name, p in frozen.named_parameters() if p.requires_grad} == trained


def test_a_layer_under_several_names_is_sparse_under_all_of_them() -> None:
    for pattern in ("[ab]", "b", "a", "c.0"):
        shared = nn.Linear(8, 8)
        model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.ModuleList([shared])})
        report = sparsify(model, [Rule(pattern)], structure=Unstructured(), density=0.5)
        layer = model["a"]
        assert isinstance(layer, SparseLinear) and model["b"] is layer is model["c"][0]
        assert [row.name for row in report.layers] == ["a.weights.0"]
        assert len(list(model.parameters())) == 2
    # Inside of a block that stands in two places.
    block = plain()
    model = nn.ModuleDict({"first": block, "second": block})
    sparsify(model, [Rule("second.0")], structure=Unstructured(), density=0.5)
    assert isinstance(model["first"][0], SparseLinear) and model["first"] is model["second"]


def test_a_shared_layer_is_packed_once_for_all_its_names() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    sparsify(model, [Rule("0")], structure=STRUCTURES["nm-16"], density=0.5)
    x = torch.randn(3, 16)
    expected = model(x).detach()
    assert list(pack(model)) == ["0"]
    assert isinstance(model[0], PackedLinear) and model[2][0] is model[0]
    torch.testing.assert_close(model(x), expected)


def test_tied_weights_are_refused_and_a_shared_bias_stays_shared() -> None:
    def same(a: nn.Linear, b: nn.Linear) -> None:
        b.weight = a.weight

    def memory(a: nn.Linear, b: nn.Linear) -> None:
        b.weight = nn.Parameter(a.weight.detach())

    def transposed(a: nn.Linear, b: nn.Linear) -> None:
        b.weight = nn.Parameter(a.weight.detach().t())

    for tie in (same, memory, transposed):
        model = plain(nn.Linear(8, 8), nn.Linear(8, 8))
        tie(model[0], model[1])
        before = state(model)
        for pattern in ("?", "1"):
            with pytest.raises(UserError, match=r"^sparse: [^\n]*tied: 0\.weight and 1\.weight$"):
                sparsify(model, [Rule(pattern)], structure=Unstructured(), density=0.5)
            assert_untouched(model, before)
    model = plain(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].bias = model[0].bias
    sparsify(model, [Rule("?")], structure=Unstructured(), density=0.5)
    assert model[0].bias is model[1].bias


def test_hooks_go_with_the_layer_and_can_still_be_removed() -> None:
    calls: list[str] = []
    model = plain()
    dense = model[0]
    handles = [
        dense.register_forward_pre_hook(lambda *_: calls.append("before")),
        dense.register_forward_hook(
            lambda m, args, kwargs, y: calls.append(f"after {len(args)}"), with_kwargs=True
        ),
        dense.register_full_backward_pre_hook(lambda *_: calls.append("backward")),
        dense.register_full_backward_hook(lambda *_: calls.append("backward done")),
        dense.bias.register_hook(lambda _: calls.append("bias")),
    ]
    sparsify(model, [Rule("0")], structure=Unstructured(), density=0.5)
    model(torch.randn(3, 8)).sum().backward()
    assert sorted(calls) == ["after 1", "backward", "backward done", "before", "bias"]
    for handle in handles:
        handle.remove()
    model(torch.randn(3, 8)).sum().backward()
    assert len(calls) == 5
    # A hook that changes the output counts.
    model[0].register_forward_hook(lambda m, args, y: y * 0)
    torch.testing.assert_close(model[0](torch.randn(3, 8)), torch.zeros(3, 12))


class Held(nn.Linear):
    """With a parameter besides that its own forward would not show."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.scale = nn.Parameter(torch.ones(8))


class OwnConvolution(nn.Conv2d):
    """Computes something else below a forward that is not its own."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight * 2, bias)


class OwnCall(nn.Linear):
    """Computes something else above a forward that is not its own."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


def changed(change: Callable[[nn.Linear], object]) -> nn.Linear:
    layer = nn.Linear(8, 8)
    change(layer)
    return layer


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight_norm": (lambda: weight_norm(nn.Linear(8, 8)), "computed from weight_g, weight_v"),
    "spectral_norm": (lambda: spectral_norm(nn.Linear(8, 8)), "computed from weight_orig, "),
    "conv": (lambda: weight_norm(nn.Conv2d(8, 8, 3)), "computed from weight_g, weight_v"),
    "parametrized": (
        lambda: parametrizations.orthogonal(nn.Linear(8, 8)), "computed from parametrizations",
    ),
    "bias": (
        lambda: nn.utils.parametrize.register_parametrization(
            nn.Linear(8, 8), "bias", nn.Identity()
        ),
        "holds parametrizations besides",
    ),
    "pruned": (
        lambda: prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5), "computed from weight_mask",
    ),
    "pruned bias": (
        lambda: prune.l1_unstructured(nn.Linear(8, 8), "bias", 0.5), "holds bias_mask, bias_orig",
    ),
    "attention": (
        lambda: prune.l1_unstructured(nn.MultiheadAttention(8, 2), "in_proj_weight", 0.5),
        "computed from in_proj_weight_mask",
    ),
    "held": (Held, "holds scale besides"),
    "buffer": (
        lambda: changed(lambda layer: layer.register_buffer("seen", torch.ones(1))), "holds seen",
    ),
    "own convolution": (lambda: OwnConvolution(8, 8, 3), "a OwnConvolution; only linear"),
    "own call": (lambda: OwnCall(8, 8), "a OwnCall; only linear"),
    "patched": (
        lambda: changed(lambda layer: setattr(layer, "forward", layer.forward)), "was replaced",
    ),
    "state hook": (
        lambda: changed(lambda layer: layer.register_state_dict_pre_hook(lambda *_: None)),
        "has state_dict_pre_hooks",
    ),
    "weight hook": (
        lambda: changed(lambda layer: layer.weight.register_hook(lambda g: g)), "hooks on its ",
    ),
    "weight hook after": (
        lambda: changed(
            lambda layer: layer.weight.register_post_accumulate_grad_hook(lambda p: None)
        ),
        "hooks on its weight",
    ),
    "integer": (
        lambda: changed(
            lambda layer: setattr(
                layer, "weight", nn.Parameter(torch.ones(8, 8, dtype=torch.int8), False)
            )
        ),
        "whose weight is int8",
    ),
    "meta": (lambda: nn.Linear(8, 8, device="meta"), "'1' on the meta device"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_a_sparse_layer_would_lose_is_refused_and_the_model_stays_as_it_was() -> None:
    for name, (make, message) in REFUSED.items():
        model = plain(nn.Linear(8, 8), make())
        before = repr(model)
        # The layer before it can be sparse, and must not be yet.
        with pytest.raises(UserError) as error:
            sparsify(model, [Rule("0"), Rule("1")], structure=Unstructured(), density=0.5)
        assert str(error.value).startswith("sparse: "), name
        assert message in str(error.value) and "\n" not in str(error.value), name
        assert "'1'" in str(error.value) and repr(model) == before, name
        # Left alone it is in nobody's way.
        sparsify(model, [Rule("0")], structure=Unstructured(), density=0.5)


def test_layers_without_shapes_are_refused() -> None:
    for lazy in (nn.LazyLinear(8), nn.LazyConv2d(8, 3)):
        for pattern in ("0", "1"):
            model = plain(nn.Linear(8, 8), lazy)
            before = repr(model)
            with pytest.raises(UserError, match=r"^sparse: expected [^\n]*'1\.weight' without"):
                sparsify(model, [Rule(pattern)], structure=Unstructured(), density=0.5)
            assert repr(model) == before


def test_a_model_that_is_a_layer_itself_is_refused() -> None:
    for model in (nn.Linear(8, 8), nn.Conv2d(3, 8, 3)):
        for pattern in ("*", "", "0"):
            with pytest.raises(UserError, match=r"^sparse: [^\n]*the model itself is the [^\n]+$"):
                sparsify(model, [Rule(pattern)], structure=Unstructured(), density=0.5)


def test_an_error_at_any_layer_leaves_the_model_as_it_was() -> None:
    structures: list[tuple[Structure, dict[str, object]]] = [
        (Block(size=16, balanced=False), {"density": 0.3}),  # too large for the second
        (NM(n=9, m=None, group=1), {"density": 0.25}),
        (STRUCTURES["diag"], {"density": 0.25, "algorithm": from_yaml("dst/cht")}),
        (Unstructured(), {"density": 0.25, "low_rank": 3}),
    ]
    for structure, arguments in structures:
        model = plain(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(8, 8))
        before = state(model)
        with pytest.raises(UserError):
            sparsify(model, [Rule("?")], structure=structure, **arguments)  # type: ignore[arg-type]
        assert_untouched(model, before)


LEARNERS: dict[str, Callable[[], PermutationLearner]] = {
    "random": lambda: RandomPermutation(side="both"),
    "random in": lambda: RandomPermutation(side="in"),
    "random out": lambda: RandomPermutation(side="out"),
    "learned": learned,
}


def test_trained_weights_are_read_through_their_permutations() -> None:
    x = torch.randn(2, 3, 5, 7)
    for name, learner in LEARNERS.items():
        for storage in ("packed", "masked"):
            model = tower().double()
            expected = copy.deepcopy(model)(x.double())
            sparsify(
                model, TOWER, structure=Unstructured(), density=1.0, learner=learner(),
                topology="magnitude", rescale=False, storage=storage,
            )  # fmt: skip
            assert len(sparse_layers(model)) == 6
            if name == "learned":
                assert all(choice.soft for choice in choices(model).values())
            torch.testing.assert_close(model(x.double()), expected, msg=f"{name} {storage}")


def test_units_of_trained_weights_are_the_largest_that_the_permutations_leave() -> None:
    x = torch.randn(2, 3, 5, 7)
    for number, (name, structure) in enumerate(STRUCTURES.items()):
        if name == "diag-stride":
            structure = from_yaml("structure/diag", bundle="stride", stride=4)
        for key, learner in [*LEARNERS.items()][number % 2 :: 2]:
            model, dense = tower(), tower()
            # A kernel of 3 channels is too narrow for some.
            sparsify(
                model, TOWER[:3] + TOWER[4:], structure=structure, density=0.5, learner=learner(),
                topology="magnitude", rescale=False,
            )  # fmt: skip
            for choice in choices(model).values():
                choice.harden()
            for layer_name, layer in sparse_layers(model).items():
                found = layer.weight.detach()
                wanted = getattr(
                    dense.get_submodule(layer_name.removesuffix(".in_proj")),
                    "in_proj_weight" if layer_name.endswith("in_proj") else "weight",
                ).detach()
                where = f"{name} {key} {layer_name}"
                kept = found != 0
                if key != "learned":  # soft ones divide by what they leave
                    torch.testing.assert_close(found[kept], wanted[kept], msg=where)
                for weight, rows in zip(
                    layer.parts(), unpermuted(layer, wanted).chunk(len(layer.parts())), strict=True
                ):
                    scores = weight.geometry.unit_rms(rows)
                    active = torch.zeros(scores.numel(), dtype=torch.bool)
                    active[weight.active.long()] = True
                    active = active.view_as(scores)
                    exists = weight.topology().exists()
                    for row, on, there in zip(scores, active, exists, strict=True):
                        if on.any() and not on[there].all():
                            assert row[on].min() >= row[there & ~on].max() - 1e-6, where
            assert model(x).isfinite().all()


def unpermuted(layer: SparseLinear, dense: Tensor) -> Tensor:
    """P_out^T W P_in^T by matrices."""
    parts = list(dense.chunk(len(layer.parts())))
    for (side, part), permutation in layer.permutations().items():
        if side == "out":
            parts[part] = permutation.matrix().T @ parts[part]
    whole = torch.cat(parts)
    permutation = layer.input_permutation
    return whole if permutation is None else whole @ permutation.matrix().T


def test_a_soft_start_that_would_scramble_trained_weights_is_refused() -> None:
    class Scrambling(RandomPermutation):
        create = learned().create

    model = plain()
    before = state(model)
    with pytest.raises(UserError, match=r"^permutation: expected one that [^\n]* got Scrambling"):
        sparsify(
            model, [Rule("?")], structure=Unstructured(), density=0.5,
            learner=Scrambling(side="in"), topology="magnitude", rescale=False,
        )  # fmt: skip
    assert_untouched(model, before)


def test_every_learner_keeps_trained_weights_or_says_that_it_cannot() -> None:
    x, kept = torch.randn(4, 24), set()
    for name in options("permutation"):
        torch.manual_seed(0)
        model = plain(nn.Linear(24, 40), nn.Linear(40, 24))
        expected = model(x)
        changes = {} if name == "none" else {"side": "both"}
        arguments = {"density": 1.0, "topology": "magnitude", "rescale": False}
        learner = from_yaml(f"permutation/{name}", **changes)
        try:
            sparsify(model, [Rule("?")], structure=Unstructured(), learner=learner, **arguments)
        except UserError as error:
            assert str(error).startswith("permutation: expected one that trained weights"), name
            continue
        torch.testing.assert_close(model.eval()(x), expected, atol=1e-4, rtol=1e-4, msg=name)
        kept.add(name)
    assert {"none", "random", "doubly_stochastic"} <= kept


def test_fitted_permutations_keep_more_of_trained_weights_on_either_side() -> None:
    structures = {"nm": STRUCTURES["nm-16"], "block": STRUCTURES["block-8"]}
    for structure in structures.values():
        for side in ("in", "out", "both"):
            kept, at = {}, {"side": side}
            for name in ("none", "random", "greedy", "search"):
                torch.manual_seed(0)
                model = plain(nn.Linear(64, 96))
                # Rows and columns of hidden groups, some of which matter.
                rows, columns = torch.randperm(96) % 6, torch.randperm(64) % 8
                matters = (torch.rand(6, 8) > 0.7).float()[rows][:, columns]
                with torch.no_grad():
                    model[0].weight.mul_(0.2 + 2 * matters)
                dense = model[0].weight.detach().clone()
                sparsify(
                    model, [Rule("0")], structure=structure, density=0.25, topology="magnitude",
                    learner=from_yaml(f"permutation/{name}", **({} if name == "none" else at)),
                    rescale=False,
                )  # fmt: skip
                found = model[0].weight.detach()
                assert torch.equal(found[found != 0], dense[found != 0])
                kept[name] = float(found.square().sum() / dense.square().sum())
            assert kept["greedy"] > max(kept["none"], kept["random"]) + 0.01, (side, kept)
            assert kept["search"] > kept["greedy"] - 0.02, (side, kept)


def test_importance_decides_where_it_is_given() -> None:
    torch.manual_seed(0)
    model = plain(nn.Linear(16, 16))
    dense, importance = model[0].weight.detach().clone(), torch.rand(16, 16)
    sparsify(
        model, [Rule("0")], structure=Unstructured(), density=0.25, topology={"0": importance},
        learner=RandomPermutation(side="both"), rescale=False,
    )  # fmt: skip
    kept = model[0].weight.detach() != 0
    assert importance[kept].min() > importance[~kept].max()
    assert torch.equal(model[0].weight.detach()[kept], dense[kept])


def test_units_and_permutations_can_be_taken_from_another_layer() -> None:
    source, model = plain(), plain()
    arguments = {"structure": STRUCTURES["nm-1"], "density": 0.5, "rescale": False}
    sparsify(source, [Rule("?")], learner=RandomPermutation(side="both"), seed=1, **arguments)
    units = {name: weight.active.long() for name, weight in sparse_weights(source).items()}
    indices = {name: p.index for name, p in choices(source).items()}  # type: ignore[attr-defined]
    dense = [model[0].weight.detach().clone(), model[1].weight.detach().clone()]
    taken = Taken(units=units, indices=indices)
    sparsify(model, [Rule("?")], learner=learned(), taken=taken, **arguments)
    for name, weight in sparse_weights(model).items():
        assert torch.equal(weight.active.long(), units[name])
    for name, permutation in choices(model).items():
        assert not permutation.soft and torch.equal(permutation.index, indices[name])
        assert is_bijection(permutation.index)
    for layer, wanted in zip(model, dense, strict=True):
        kept = layer.weight.detach() != 0
        assert torch.equal(layer.weight.detach()[kept], wanted[kept])
        assert float(kept.double().mean()) == pytest.approx(0.5, abs=0.05)

    for wrong, message in [
        (Taken(units={}), "which has no weight 0.weights.0"),
        (Taken(units=units | {"1.weights.0": units["1.weights.0"][1:]}), "entries; it starts with"),
        (Taken(units=units | {"1.weights.0": units["1.weights.0"] + 50}), "there is no unit"),
        (Taken(indices={}), "which has no 0.input_permutation"),
        (Taken(indices=indices | {"1.input_permutation": torch.arange(3)}), "has 3 features"),
    ]:
        model = plain()
        before = state(model)
        with pytest.raises(UserError, match=message):
            sparsify(model, [Rule("?")], learner=learned(), taken=wrong, **arguments)
        assert_untouched(model, before)


def test_an_algorithm_never_changes_a_frozen_weight() -> None:
    model = plain(nn.Linear(16, 16).requires_grad_(False), nn.Linear(16, 16))
    report = sparsify(model, [Rule("?")], structure=Unstructured(), density=0.5, algorithm=rigl())
    assert [weight.frozen for weight in sparse_weights(model).values()] == [True, False]
    assert [layer.static for layer in report.layers] == [True, False]
