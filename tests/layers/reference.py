"""What a sparse layer must compute, by its definition: P_out S P_in x + U V x + b, all dense."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from padst_exp.layers import SparseConv2d, SparseLinear
from padst_exp.permutations import Permutation
from padst_exp.structures import gather_entries

Results = dict[str, Tensor]


def run(layer: SparseLinear, x: Tensor, dy: Tensor, *, collect: bool = True) -> Results:
    """Output and every gradient of the layer; those of masked values per active entry."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    for weight in layer.parts():
        weight.collect_dense_gradient, weight.dense_gradient = collect, None
    y = layer(x)
    y.backward(dy)
    results = {"y": y.detach(), **_gradients(layer, x)}
    for i, weight in enumerate(layer.parts()):
        weight.collect_dense_gradient = False
        assert (weight.dense_gradient is not None) == collect
        if weight.dense_gradient is not None:
            results[f"dense gradient {i}"] = weight.dense_gradient
    return results


def expected(layer: SparseLinear, x: Tensor, dy: Tensor) -> Results:
    """The same in float64 through one dense matrix that is built here, step by step."""
    layer = copy.deepcopy(layer).double()
    x, dy = x.double().clone().requires_grad_(), dy.double()
    matrices = [weight.matrix() for weight in layer.parts()]
    for matrix in matrices:
        matrix.retain_grad()
    outputs = [
        _matrix(permutation) @ matrix if isinstance(permutation, Permutation) else matrix
        for permutation, matrix in zip(layer.output_permutations, matrices, strict=True)
    ]
    whole = torch.cat(outputs)
    if layer.input_permutation is not None:
        at_every_tap = [_matrix(layer.input_permutation)] * layer.taps
        whole = whole @ torch.block_diag(*at_every_tap)
    if layer.companion is not None:
        whole = whole + layer.companion.up @ layer.companion.down
    y = _dense(layer, x, whole)
    y.backward(dy)
    results = {"y": y.detach(), **_gradients(layer, x)}
    for i, matrix in enumerate(matrices):
        assert matrix.grad is not None
        results[f"dense gradient {i}"] = matrix.grad
    return results


def assert_close(ours: Results, theirs: Results, where: object) -> None:
    """Values are equal within float32, relative to the size of each quantity."""
    missing = {key for key in theirs.keys() ^ ours.keys() if not key.startswith("dense gradient")}
    assert not missing, (where, missing)
    for key, tensor in ours.items():
        scale = float(theirs[key].abs().max().clamp(min=1.0))
        error = float((tensor.double() - theirs[key]).abs().max())
        assert error <= 2e-5 * scale, f"{where}: {key} is off by {error / scale:.2g}"


def _gradients(layer: SparseLinear, x: Tensor) -> Results:
    assert x.grad is not None
    found = {"x": x.grad}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    for i, weight in enumerate(layer.parts()):
        if weight.storage == "masked":
            name = f"weights.{i}.values"
            found[name] = gather_entries(found[name], weight.entries())
    return found


def _matrix(permutation: Permutation) -> Tensor:
    return permutation.matrix().double()


def _dense(layer: SparseLinear, x: Tensor, matrix: Tensor) -> Tensor:
    if not isinstance(layer, SparseConv2d):
        return nn.functional.linear(x, matrix, layer.bias)
    dense = layer.window.convolution(1, 1, bias=False)
    kernel = matrix.unflatten(1, (*dense.kernel_size, -1)).permute(0, 3, 1, 2)
    return dense._conv_forward(x, kernel, layer.bias)
