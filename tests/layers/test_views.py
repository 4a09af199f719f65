"""Layers other than `nn.Linear`: convolutions, attention, transposed weights."""

import copy
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from layers.layer_cases import LIVES, sparse_layer
from layers.reference import assert_close, expected, run
from padst_exp.dst import Change
from padst_exp.errors import UserError
from padst_exp.layers import SparseConv2d, SparseLinear, sparse_layers, sparse_weights
from padst_exp.layers.sparse_conv import Window
from padst_exp.permutations import RandomPermutation
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import Unstructured
from permutation_cases import learned
from structure_cases import STRUCTURES

CPU = torch.device("cpu")

# 24 channels in, 32 out, unless said otherwise; sides that strides and blocks do not divide too.
CONVOLUTIONS: dict[str, dict[str, object]] = {
    "3x3": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    "dilated": {"kernel_size": 3, "dilation": (2, 1), "padding": 2},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "1x1": {"kernel_size": 1},
    "1x1 strided": {"kernel_size": 1, "stride": 2},
    "1x1 padded": {"kernel_size": 1, "padding": 1, "bias": False},
    "rectangular": {"kernel_size": (2, 5), "stride": (1, 3), "padding": (0, 2)},
}


def convolution(name: str) -> nn.Conv2d:
    torch.manual_seed(1)
    return nn.Conv2d(24, 32, **CONVOLUTIONS[name])  # type: ignore[arg-type]


def cases() -> Iterator[tuple[str, str, SparseLinear]]:
    """A third of the structures for each convolution: packed in two lives, masked in one."""
    for number, name in enumerate(CONVOLUTIONS):
        for turn, (kind, structure) in enumerate(list(STRUCTURES.items())[number % 3 :: 3]):
            for step, storage in enumerate(("packed", "packed", "masked")):
                life = LIVES[(number // 3 + turn + step) % 4]
                layer = sparse_layer(
                    convolution(name),
                    structure,
                    life=life,
                    storage=storage,
                    low_rank=3 if (turn + step) % 2 else 0,
                    selected=life in ("soft", "none"),
                    density=0.5,
                )
                yield name, f"{name} {kind} {life} {storage}", layer


def test_a_sparse_convolution_is_a_convolution_with_its_weight() -> None:
    for name, where, layer in cases():
        assert isinstance(layer, SparseConv2d)
        dense, x = convolution(name), torch.randn(2, 24, 7, 8)
        y = dense(x)
        dy = torch.randn_like(y)
        wanted = expected(layer, x, dy)
        for backend in layer.backends(CPU):
            layer.use_backend(backend)
            assert_close(run(layer, x, dy), wanted, f"{where} {backend}")
            if backend == "scatter":  # another way where no dense gradient is asked for
                assert_close(run(layer, x, dy, collect=False), wanted, f"{where} convolved")
        kernel = layer.weight
        assert kernel.shape == dense.weight.shape
        y = dense._conv_forward(x, kernel, layer.bias)
        torch.testing.assert_close(y.double(), wanted["y"], atol=1e-4, rtol=1e-4)


def test_a_full_convolution_is_the_dense_one() -> None:
    for name in CONVOLUTIONS:
        dense, x = convolution(name), torch.randn(2, 24, 9, 11)
        layer = sparse_layer(convolution(name), Unstructured(), density=1.0)
        torch.testing.assert_close(layer(x), dense(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.weight, dense.weight)


def test_patches_are_those_of_unfold_bit_by_bit() -> None:
    for name in CONVOLUTIONS:
        window, dense = Window.of(convolution(name)), convolution(name)
        assert window.sides == list(dense._reversed_padding_repeated_twice)
        x = torch.randn(2, 24, 9, 11, requires_grad=True)
        ours, size = window.patches(x)
        mode = "constant" if window.padding_mode == "zeros" else window.padding_mode
        padded = nn.functional.pad(x, window.sides, mode=mode)
        theirs = nn.functional.unfold(
            padded, window.kernel_size, window.dilation, 0, window.stride
        ).unflatten(1, (24, -1))
        theirs = theirs.permute(0, 3, 2, 1).flatten(2)
        assert torch.equal(ours, theirs) and size == dense(x).shape[2:]
        dy = torch.randn_like(ours)
        gradients = [torch.autograd.grad(y, x, dy)[0] for y in (ours, theirs)]
        assert torch.equal(*gradients), name


def test_a_convolution_compiles_as_one_graph() -> None:
    layer = sparse_layer(convolution("padded"), STRUCTURES["nm-16"])
    x = torch.randn(2, 24, 9, 11)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_permutations_of_a_convolution_move_its_channels() -> None:
    layer = sparse_layer(convolution("padded"), STRUCTURES["nm-16"], life="random")
    plain = sparse_layer(convolution("padded"), STRUCTURES["nm-16"])
    (ours,), (theirs,) = layer.parts(), plain.parts()
    theirs.adopt(Change(ours.active.long()))
    theirs.values.data.copy_(ours.values)
    assert layer.input_permutation is not None and layer.input_permutation.size == 24
    inputs, outputs = layer.input_permutation.index, layer.output_permutations[0].index
    x = torch.randn(2, 24, 5, 5)
    assert layer.bias is not None and plain.bias is not None
    bias = layer.bias[:, None, None]
    y = (plain(x[:, inputs]) - plain.bias[:, None, None])[:, outputs] + bias
    torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)


def test_a_sparse_convolution_takes_autocast_other_sizes_and_a_state() -> None:
    source = sparse_layer(convolution("strided"), STRUCTURES["block-8"], life="hardened")
    fresh = sparse_layer(convolution("strided"), STRUCTURES["block-8"], life="soft")
    source.parts()[0].adopt(Change(source.parts()[0].active.long()[::2]))
    fresh.load_state_dict(copy.deepcopy(source.state_dict()))
    for size in ((9, 11), (8, 8), (17, 3)):
        x = torch.randn(3, 24, *size)
        for backend in source.backends(CPU):
            source.use_backend(backend)
            torch.testing.assert_close(fresh(x), source(x), atol=1e-5, rtol=1e-5)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                half = source(x)
            assert half.dtype == torch.bfloat16
            assert (half.float() - source(x)).norm() < 0.02 * source(x).norm()


def test_conv1d_of_transformers_multiplies_by_its_transposed_weight() -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 5, 24)
    dense = Conv1D(32, 24)
    full = sparse_layer(copy.deepcopy(dense), Unstructured(), density=1.0)
    torch.testing.assert_close(full(x), dense(x), atol=1e-5, rtol=1e-5)
    for structure in STRUCTURES.values():
        for life in LIVES:
            layer = sparse_layer(copy.deepcopy(dense), structure, life=life, split=2)
            x, dy = torch.randn(2, 5, 24), torch.randn(2, 5, 32)
            assert_close(run(layer, x, dy), expected(layer, x, dy), life)


def encoder() -> nn.TransformerEncoderLayer:
    torch.manual_seed(1)
    return nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)


FAST_PATH = "_transformer_encoder_layer_fwd"
RULES = [Rule("self_attn", 3), Rule("self_attn.out_proj"), Rule("linear?")]


def dense_twin(sparse: nn.TransformerEncoderLayer) -> nn.TransformerEncoderLayer:
    """The dense layer with the weights that the sparse one shows."""
    twin, attention = encoder(), sparse.self_attn
    with torch.no_grad():
        for name in ("in_proj_weight", "in_proj_bias"):
            getattr(twin.self_attn, name).copy_(getattr(attention, name))
        pairs = [(twin.self_attn.out_proj, attention.out_proj)]
        pairs += [(getattr(twin, n), getattr(sparse, n)) for n in ("linear1", "linear2")]
        for ours, theirs in pairs:
            ours.weight.copy_(theirs.weight)
            ours.bias.copy_(theirs.bias)
    twin.norm1.load_state_dict(sparse.norm1.state_dict())
    twin.norm2.load_state_dict(sparse.norm2.state_dict())
    return twin


def outputs(layer: nn.TransformerEncoderLayer, x: Tensor) -> dict[str, Tensor]:
    """In training with the gradient of x, in evaluation, and by the fast path of evaluation."""
    padding = torch.zeros(x.shape[:2], dtype=torch.bool)
    padding[0, -2:] = True
    inputs = x.clone().requires_grad_()
    trained = layer.train()(inputs, src_key_padding_mask=padding)
    trained.square().sum().backward()
    layer.eval()
    with torch.no_grad():
        with mock.patch.object(torch, FAST_PATH, wraps=getattr(torch, FAST_PATH)) as path:
            fast = layer(x), layer(x, src_key_padding_mask=padding)[0, :-2]
        assert path.call_count == 2
        stack = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True).eval()
        stack.layers[0] = layer
        nested = stack(x, src_key_padding_mask=padding)[0, :-2]
    assert inputs.grad is not None
    return {
        "trained": trained.detach(),
        "gradient": inputs.grad,
        "evaluated": layer(x).detach(),
        "fast": fast[0],
        "fast padded": fast[1],
        "nested": nested,
    }


def test_attention_and_encoder_layers_train_and_evaluate_with_sparse_projections() -> None:
    x = torch.randn(2, 7, 32)
    learners = [None, RandomPermutation(side="both"), learned()]
    for number, (name, structure) in enumerate(STRUCTURES.items()):
        learner, sparse = learners[number % 3], encoder()
        report = sparsify(sparse, RULES, structure=structure, density=0.5, learner=learner)
        names = {layer.name for layer in report.layers}
        assert {"self_attn.in_proj.weights.2", "self_attn.out_proj.weights.0"} < names
        assert len(names) == 6 and len(sparse_layers(sparse)) == 4
        ours, theirs = outputs(sparse, x), outputs(dense_twin(sparse), x)
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], atol=2e-5, rtol=1e-4, msg=name + key)
        # The gradient reaches the packed values through the weight that attention reads.
        assert all(p.grad is not None for p in sparse.parameters()), name
        loaded = encoder()
        sparsify(loaded, RULES, structure=structure, density=0.5, learner=learner, seed=1)
        loaded.load_state_dict(copy.deepcopy(sparse.state_dict()))
        torch.testing.assert_close(outputs(loaded, x)["evaluated"], ours["evaluated"])


def test_rows_without_inputs_are_silent_on_every_path() -> None:
    x, sparse = torch.randn(2, 7, 32), encoder()
    sparsify(sparse, RULES, structure=STRUCTURES["fan-in-1"], density=0.5)
    with torch.no_grad():
        for layer in sparse_layers(sparse).values():
            layer.silences_rows = True
            for weight in layer.parts():
                rows = weight.topology().active // weight.shape[1]
                weight.adopt(Change(weight.topology().active[rows % 4 > 0]))
            assert layer.bias is not None
            layer._parameters["bias"].uniform_(1, 2)
            assert layer.bias.count_nonzero() < len(layer.bias)
    ours, theirs = outputs(sparse, x), outputs(dense_twin(sparse), x)
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], atol=2e-5, rtol=1e-4, msg=key)
    layer = sparse.linear1
    layer(x).sum().backward()
    assert not layer._parameters["bias"].grad[layer.bias == 0].any()
    assert torch.equal(layer.state_dict()["bias"], layer._parameters["bias"])


def test_a_dense_weight_is_built_once_for_a_forward_pass_and_until_it_changes() -> None:
    x, sparse = torch.randn(2, 7, 32), encoder()
    learner = learned()
    sparsify(sparse, RULES, structure=STRUCTURES["nm-16"], density=0.5, learner=learner)
    layers = [sparse.self_attn.in_proj, sparse.self_attn.out_proj, sparse.linear1, sparse.linear2]
    with mock.patch.object(SparseLinear, "_matrix", autospec=True, side_effect=_matrix) as built:
        sparse.train()(x).sum().backward()
        assert [call.args[0] for call in built.call_args_list] == layers[:2]
        built.reset_mock()
        sparse.eval()
        with torch.no_grad():
            before = sparse(x), sparse(x)
            assert built.call_count == 4 and torch.equal(*before)
            # Each of what a matrix is made of, in place or anew.
            weight = layers[2].parts()[0]
            weight.values[0] += 1
            weight.adopt(Change(weight.topology().active[1:]))
            for permutation in layers[3].permutations().values():
                permutation.harden()
            after = sparse(x)
            assert built.call_count == 6
            torch.testing.assert_close(after, copy.deepcopy(sparse)(x))
        sparse.train()
        assert all(layer._shown is None for layer in layers)


_matrix = SparseLinear._matrix


def test_attention_without_a_bias_and_over_other_keys_works() -> None:
    torch.manual_seed(1)
    attention = nn.MultiheadAttention(32, 4, bias=False, batch_first=True)
    model = nn.ModuleDict({"attention": attention})
    sparsify(model, [Rule("attention", 3)], structure=STRUCTURES["nm-16"], density=0.5)
    sparse = model["attention"]
    layer = sparse_layers(model)["attention.in_proj"]
    assert isinstance(layer, SparseLinear) and sparse.in_proj_bias is None
    twin = nn.MultiheadAttention(32, 4, bias=False, batch_first=True)
    with torch.no_grad():
        twin.in_proj_weight.copy_(layer.weight)
        twin.out_proj.weight.copy_(attention.out_proj.weight)
    query, key = torch.randn(2, 5, 32), torch.randn(2, 9, 32)
    for ours, theirs in zip(sparse(query, key, key), twin(query, key, key), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_who_reads_a_weight_has_the_dense_gradients_of_who_calls_the_layer() -> None:
    for number, (name, structure) in enumerate(STRUCTURES.items()):
        life = LIVES[number % 4]
        layer = sparse_layer(
            nn.Linear(24, 96),
            structure,
            life=life,
            storage="masked" if number % 3 == 1 else "packed",
            split=3,
            selected=life == "soft",
            density=0.5,
        )
        x, dy = torch.randn(2, 5, 24), torch.randn(2, 5, 96)
        gradients = []
        for read in (False, True):
            for weight in layer.parts():
                weight.collect_dense_gradient, weight.dense_gradient = True, None
            for part in range(2):
                y = nn.functional.linear(x[part], layer.weight) if read else layer(x[part])
                y.backward(dy[part])
            gradients.append([weight.dense_gradient for weight in layer.parts()])
        for wanted, found in zip(*gradients, strict=True):
            assert wanted is not None and found is not None, name
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_projections_of_attention_go_by_their_own_names_too() -> None:
    for patterns in (["attention", "attention.out_proj"], ["attention.in_proj", "*.out_proj"]):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4)})
        rules = [Rule(pattern) for pattern in patterns]
        sparsify(model, rules, structure=STRUCTURES["nm-16"], density=0.5)
        assert {*sparse_layers(model)} == {"attention.in_proj", "attention.out_proj"}


def test_what_cannot_be_sparse_is_refused_in_one_line() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    refused = {
        "grouped": nn.Conv2d(8, 8, 3, groups=2),
        "1d": nn.Conv1d(8, 8, 3),
        "own": Own(8, 8),
        "separate": nn.MultiheadAttention(8, 2, kdim=4, vdim=4),
        "norm": nn.LayerNorm(8),
    }
    for name in refused:
        model = nn.ModuleDict(copy.deepcopy(refused))
        with pytest.raises(UserError, match=rf"^sparse: pattern '{name}' matches '{name}'[^\n]*$"):
            sparsify(model, [Rule(name)], structure=Unstructured(), density=0.5)
        assert not sparse_weights(model)
