"""Muon: the dense one at density 1, its rules on a support, and who goes where."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from dst.small_training import network, start
from engine.toy import assert_equal, double, toy_run
from from_yaml import from_yaml, leaf
from padst_exp.config import build
from padst_exp.engine.muon import SparseMuon, hidden_matrices, orthogonal
from padst_exp.engine.optimizers import OptimizerBuilder
from padst_exp.errors import UserError
from padst_exp.layers import SparseWeight, sparse_weights
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import FanIn, Storage, Structure, Unstructured
from structure_cases import STRUCTURES


def muon(**changes: Any) -> OptimizerBuilder:
    builder: OptimizerBuilder = from_yaml(
        "optimizer/muon", **{"lr": 0.01, "warmup": 0.0, "schedule": "constant", **changes}
    )
    return builder


def one_weight(
    structure: Structure, density: float, *, storage: Storage = "packed", shape: Any = (41, 67)
) -> tuple[SparseWeight, SparseMuon]:
    """A sparse weight in float64, and what trains it; the last layer is the model's output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]), nn.Linear(shape[0], 2)).double()
    sparsify(model, [Rule("0")], structure=structure, density=density, storage=storage)
    optimizer, _ = muon(weight_decay=0.1).create(model, 10)
    assert isinstance(optimizer, SparseMuon)
    return sparse_weights(model)["0.weights.0"], optimizer


def step(weight: SparseWeight, optimizer: SparseMuon, dense: Tensor) -> Tensor:
    """One step by the gradient `dense` of the whole weight; what S became."""
    optimizer.zero_grad()
    weight.matrix().backward(dense)
    optimizer.step()
    return weight.matrix().detach()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (7, 7)])
def test_a_dense_weight_moves_as_under_the_muon_of_torch(shape: tuple[int, int]) -> None:
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
    torch.manual_seed(0)
    # In bfloat16, in which torch iterates, all is equal bit by bit. (There, and without looking
    # ahead, torch divides its momentum itself by the norm.)
    for dtype, nesterov, momentum, atol in (
        (torch.bfloat16, True, 0.95, 0.0),
        (torch.float32, True, 0.95, 2e-3),
        (torch.float32, False, 0.8, 2e-3),
    ):
        how: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "ns_steps": 5}
        ours, theirs = (nn.Parameter(torch.ones(shape, dtype=dtype)) for _ in range(2))
        group = {"params": [ours], "muon": True}
        one = SparseMuon([group], weights=[], adamw_lr=1.0, **how, **settings)
        other = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **how, **settings)
        for _ in range(6):
            ours.grad = torch.randn(shape, dtype=dtype)
            theirs.grad = ours.grad.clone()
            one.step()
            other.step()
        assert (ours - 1).abs().max() > 0.01
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def test_a_full_sparse_weight_moves_as_a_dense_one() -> None:
    for structure in (Unstructured(), FanIn(group=16)):
        weight, optimizer = one_weight(structure, 1.0)
        dense = nn.Parameter(weight.matrix().detach().clone())
        group = {"params": [dense], "muon": True}
        plain = SparseMuon(
            [group], weights=[], lr=0.01, weight_decay=0.1, adamw_lr=1.0, momentum=0.95,
            nesterov=True, ns_steps=5,
        )  # fmt: skip
        for _ in range(4):
            dense.grad = torch.randn(weight.shape, dtype=torch.float64)
            moved = step(weight, optimizer, dense.grad)
            plain.step()
            torch.testing.assert_close(moved, dense.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", STRUCTURES)
def test_on_a_support_the_update_is_the_orthogonal_one_at_its_own_size(name: str) -> None:
    shape = (64, 96) if name == "diag-stride" else (41, 67)
    both = [
        one_weight(STRUCTURES[name], 0.4, storage=storage, shape=shape)
        for storage in get_args(Storage)
    ]
    weight = both[0][0]
    before, active = weight.matrix().detach(), weight.matrix().detach() != 0
    gradient = torch.randn(shape, dtype=torch.float64)
    packed, masked = (step(*one, gradient) for one in both)
    torch.testing.assert_close(packed, masked, rtol=0, atol=1e-12)
    assert not packed[~active].any()
    update = (before * (1 - 0.01 * 0.1) - packed)[active] / 0.01
    whole = orthogonal(gradient.where(active, 0), 5)
    size = 0.2 * max(shape) ** 0.5 * whole.square().mean().sqrt()
    expected = whole[active] / whole[active].square().mean().sqrt() * size
    torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-12)


def test_nothing_moves_without_a_gradient_but_by_decay() -> None:
    weight, optimizer = one_weight(Unstructured(), 0.3)
    before = weight.matrix().detach()
    moved = step(weight, optimizer, torch.zeros(weight.shape, dtype=torch.float64))
    torch.testing.assert_close(moved, before * (1 - 0.01 * 0.1))


@pytest.mark.parametrize("shape", [(31, 12), (12, 31), (9, 9), (1, 5)])
def test_newton_schulz_keeps_directions_and_evens_sizes(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    made = orthogonal(matrix, 5)
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ made @ v.T
    torch.testing.assert_close(inside, inside.diagonal().diag(), rtol=0, atol=1e-9)
    # Where features stand is no matter: permutations may be folded in or not.
    rows, columns = (torch.randperm(size) for size in shape)
    again = orthogonal(matrix[rows][:, columns], 5)
    torch.testing.assert_close(again, made[rows][:, columns], rtol=0, atol=1e-9)


def test_hidden_matrices_go_to_muon_and_all_else_to_adamw() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    data: dict[str, Any] = {"image_size": 8, "channels": 1, "num_classes": 3}
    small: dict[str, Any] = {"patch_size": 4, "dim": 32, "depth": 1, "heads": 2}
    image = build(leaf("model/vit", **small), "model", data)
    text = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=11))
    narrow: dict[str, Any] = {"stem": "cifar", "width": 0.125, "depths": [1, 1, 1, 1]}
    convolutions = build(leaf("model/resnet18", **narrow), "model", data)
    for model, some, none in (
        (image, {"blocks.0.mlp.fc1.weight"}, {"patch_embed.proj.weight", "head.weight"}),
        (text, {"transformer.h.0.attn.c_attn.weight"}, {"transformer.wte.weight"}),
        (convolutions, {"layer1.0.conv1.weight"}, {"conv1.weight", "fc.weight"}),
    ):
        hidden = hidden_matrices(model)
        names = {name for name, parameter in model.named_parameters() if parameter in hidden}
        assert some <= names and not none & names
        assert all(model.get_parameter(name).ndim > 1 for name in names)
        assert not any("norm" in name or "pos_embed" in name for name in names)
    sparsify(image, [Rule("blocks.*.fc1")], structure=Unstructured(), density=0.3)
    hidden = hidden_matrices(image)
    assert image.get_parameter("blocks.0.mlp.fc1.weights.0.values") in hidden
    assert image.get_parameter("head.weight") not in hidden
    optimizer, _ = muon(adamw_lr=0.002).create(image, 10)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(trained) == len(set(trained)) == len(list(image.parameters()))
    for group in optimizer.param_groups:
        assert all((parameter in hidden) == group["muon"] for parameter in group["params"])


def test_a_sparse_output_layer_goes_to_adamw() -> None:
    model = network()
    sparsify(model, [Rule("2"), Rule("4")], structure=Unstructured(), density=0.3)
    assert hidden_matrices(model) == {sparse_weights(model)["2.weights.0"].values}


def test_the_rest_moves_as_under_adamw_at_its_own_rate() -> None:
    models = [network() for _ in range(2)]
    settings: dict[str, Any] = {"schedule": [[0.5, 0.1]], "weight_decay": 0.3}
    builders = [muon(adamw_lr=0.002, **settings)]
    builders.append(from_yaml("optimizer/adamw", lr=0.002, warmup=0.0, **settings))
    pairs = [builder.create(model, 6) for builder, model in zip(builders, models, strict=True)]
    for number in range(6):
        for model, (optimizer, schedule) in zip(models, pairs, strict=True):
            torch.manual_seed(number)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape)
            optimizer.step()
            schedule.step_update(number + 1)
    hidden = hidden_matrices(models[0])
    assert len(hidden) == 1
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert ours in hidden or torch.allclose(ours, theirs, rtol=0, atol=1e-7)


def test_what_is_grown_rises_over_the_warm_up() -> None:
    moved = []
    for warmup in (0, 4):
        algorithm = from_yaml("dst/set", interval=4)
        optimizer = muon(weight_decay=0.0, regrowth_warmup=warmup)
        training = start(algorithm, FanIn(group=1), steps=40, optimizer=optimizer).run(4)
        weight = sparse_weights(training.model)["0.weights.0"]
        assert (weight.values == 0).any()
        before = weight.values.detach().clone()
        training.run(1)
        moved.append(weight.values.detach() - before)
        born = training.state.optimizer.state[weight.values]["birth"].flatten() > 0
    assert 0 < int(born.sum()) < len(born)
    torch.testing.assert_close(moved[1][born], moved[0][born] / 4, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(moved[1][~born], moved[0][~born], rtol=0, atol=1e-7)


@pytest.mark.parametrize("dst", ["rigl", "gmp", "dynadiag"])
def test_it_goes_on_bit_by_bit(dst: str) -> None:
    def training(**changes: Any) -> Any:
        algorithm = from_yaml(f"dst/{dst}", **({"interval": 3} if dst != "dynadiag" else {}))
        return start(algorithm, FanIn(group=4), steps=24, optimizer=muon(lr=0.1), **changes)

    straight, broken = training().run(24), training().run(11)
    saved = broken.state.payload()
    resumed = training(saved=saved).run(13)
    assert_equal(
        straight.state.payload() | {"random": 0}, resumed.state.payload() | {"random": 0}, dst
    )
    assert sum(straight.state.losses[-5:]) < 0.9 * sum(straight.state.losses[:5])


def test_packed_and_masked_storage_train_alike(tmp_path: Path) -> None:
    matrices = []
    for storage in get_args(Storage):
        _, _, model = toy_run(
            tmp_path, name=storage, storage=storage, optimizer=muon(), **double(1)
        )
        matrices.append([weight.matrix().detach() for weight in sparse_weights(model).values()])
    for packed, masked in zip(*matrices, strict=True):
        torch.testing.assert_close(packed, masked, rtol=0, atol=1e-8)


def test_mistakes_name_their_key() -> None:
    for key, value in {
        "momentum": 1.0,
        "nesterov": True,
        "ns_steps": 0,
        "adamw_lr": 0.0,
        "regrowth_warmup": -1,
    }.items():
        others = {"momentum": 0.0} if key == "nesterov" else {}
        with pytest.raises(UserError, match=rf"^optimizer\.{key}: expected [^\n]*, got {value}$"):
            muon(**{key: value, **others})
    with pytest.raises(UserError, match=r"^optimizer\.ns_steps: expected [^\n]*, got 100$"):
        muon(ns_steps=100)
