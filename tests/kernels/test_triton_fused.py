"""`tile_matmul_fused` of both backends, in both layouts, against dense float64."""

import pytest
import torch
from torch import Tensor

from padst_kernels.activations import has_aligned_rows
from padst_kernels.tiles import aligned_features, kernels, tile_matmul_fused
from tile_cases import CASES, DEVICE, Case, blocks, relative_error, vector_nm

pytestmark = pytest.mark.usefixtures("poisoned_empty")

BACKENDS = ["torch", "triton"]
EPILOGUES = ["", "bias", "gelu", "bias gelu residual", "residual"]


LAYOUTS = ["feature-major", "token-major"]


def activation(num_features: int, num_tokens: int, layout: str = "feature-major") -> Tensor:
    """Standard normal, with NaN in the padding."""
    like, feature_major = torch.empty(0, device=DEVICE), layout == "feature-major"
    x = kernels.empty_features(num_features, num_tokens, like, feature_major)
    return x.copy_(torch.randn(num_features, num_tokens))


def exact(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double().requires_grad_()


def lies(x: Tensor, layout: str) -> bool:
    return has_aligned_rows(x) if layout == "feature-major" else x.t().is_contiguous()


def finish(y: Tensor, bias: Tensor | None, gelu: bool, residual: Tensor | None) -> Tensor:
    y = y if bias is None else y + bias[:, None]
    y = torch.nn.functional.gelu(y) if gelu else y
    return y if residual is None else y + residual


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("num_tokens", [5, 67])
def test_equals_the_dense_product(backend: str, name: str, epilogue: str, num_tokens: int) -> None:
    compare(CASES[name](epilogue != ""), backend, epilogue, num_tokens, *LAYOUTS[:1] * 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reads", LAYOUTS)
@pytest.mark.parametrize("num_tokens", [1, 67])
def test_layouts_mix(backend: str, name: str, reads: str, num_tokens: int) -> None:
    compare(CASES[name](True), backend, "bias gelu residual", num_tokens, reads, "token-major")


def compare(
    case: Case, backend: str, epilogue: str, num_tokens: int, reads: str, writes: str
) -> None:
    out_features, in_features = case.shape
    x = activation(in_features, num_tokens, reads).requires_grad_()
    bias = residual = None
    if "bias" in epilogue:
        bias = torch.randn(out_features, device=DEVICE, requires_grad=True)
    if "residual" in epilogue:
        residual = activation(out_features, num_tokens, writes).requires_grad_()
    gelu = "gelu" in epilogue
    y = tile_matmul_fused(
        x, case.weight, case.index, out_features, backend=backend, bias=bias, gelu=gelu,
        residual=residual, feature_major=writes == "feature-major",
    )  # fmt: skip
    assert y.shape == (out_features, num_tokens) and lies(y, writes)

    inputs = [x, case.weight, *(t for t in (bias, residual) if t is not None)]
    exact_bias, exact_residual = (None if t is None else exact(t) for t in (bias, residual))
    exact_x = exact(x)
    expected = finish(case.dense() @ exact_x, exact_bias, gelu, exact_residual)
    exact_inputs = [exact_x, case.weight, exact_bias, exact_residual]
    assert relative_error(y, expected) < 1e-5
    # Gradients come in any layout.
    aligned, loose = activation(out_features, num_tokens), torch.empty(out_features, num_tokens)
    for dy in (aligned, loose.to(DEVICE).copy_(aligned)):
        ours = torch.autograd.grad(y, inputs, dy, retain_graph=True)
        theirs = torch.autograd.grad(
            expected, [t for t in exact_inputs if t is not None], exact(dy), retain_graph=True
        )
        assert lies(ours[0], reads)
        ours = (ours[0], case.inside(ours[1]), *ours[2:])
        for actual, truth in zip(ours, theirs, strict=True):
            assert relative_error(actual, truth.double().cpu()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gelu", [False, True])
def test_folds_layer_norm(backend: str, gelu: bool) -> None:
    case = vector_nm(True)
    x = activation(45, 21)
    x.copy_(3 * x + 2)
    bias, residual = torch.randn(44, device=DEVICE), activation(44, 21)
    variance, mean = torch.var_mean(x, 0, correction=0)
    dense = case.dense().detach()
    norm = mean, (variance + 1e-6).rsqrt(), dense.sum(1).float().to(DEVICE)
    with torch.no_grad():
        y = tile_matmul_fused(
            x, case.weight, case.index, 44, backend=backend, bias=bias, gelu=gelu,
            residual=residual, norm=norm,
        )  # fmt: skip
    normal = torch.nn.functional.layer_norm(x.T.double().cpu(), (45,), eps=1e-6).T
    expected = finish(dense @ normal, exact(bias), gelu, exact(residual))
    assert relative_error(y, expected) < 1e-5
    with pytest.raises(ValueError, match="norm has no gradient"):
        tile_matmul_fused(x, case.weight, case.index, 44, backend=backend, norm=norm)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_may_have_any_strides(backend: str) -> None:
    case = vector_nm(True)
    x = activation(45, 21)
    bias, sums = torch.randn(44, 2, device=DEVICE).unbind(1)
    mean, rstd = torch.rand(21, 2, device=DEVICE).unbind(1)
    with torch.no_grad():
        loose, plain = (
            tile_matmul_fused(
                x, case.weight, case.index, 44, backend=backend, bias=vectors[0],
                norm=vectors[1:],
            )
            for vectors in ((bias, mean, rstd, sums), [t.clone() for t in (bias, mean, rstd, sums)])
        )  # fmt: skip
    assert not bias.is_contiguous() and torch.equal(loose, plain)


@pytest.mark.parametrize("num_tokens", [0, 1, 16, 21])
def test_aligned_features(num_tokens: int) -> None:
    x = torch.randn(num_tokens, 3, requires_grad=True)
    y = aligned_features(x)
    assert torch.equal(y, x.t()) and has_aligned_rows(y)
    assert num_tokens == 0 or y.data_ptr() != x.data_ptr()
    dy = torch.randn(3, num_tokens)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], dy.t())


@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses_what_is_not_aligned(backend: str) -> None:
    case = vector_nm(False)
    x, residual = activation(45, 5), activation(44, 5)
    arguments = case.weight, case.index, 44
    for wrong in (x.clone(memory_format=torch.contiguous_format), activation(45, 21)[:, 1:6]):
        with pytest.raises(ValueError, match="x has strides"):
            tile_matmul_fused(wrong, *arguments, backend=backend)
    loose = residual.clone(memory_format=torch.contiguous_format)
    with pytest.raises(ValueError, match="residual has strides"):
        tile_matmul_fused(x, *arguments, backend=backend, residual=loose)
    with pytest.raises(ValueError, match=r"residual is \(44, 4\), expected \(44, 5\)"):
        tile_matmul_fused(x, *arguments, backend=backend, residual=residual[:, :4])
    with pytest.raises(ValueError, match=r"bias is \(45,\), expected \(44,\)"):
        tile_matmul_fused(x, *arguments, backend=backend, bias=torch.zeros(45))
    with pytest.raises(ValueError, match=r"residual is torch\.float16, expected torch\.float32"):
        tile_matmul_fused(x, *arguments, backend=backend, residual=residual.half())
    norm = torch.zeros(5), torch.zeros(5), torch.zeros(44, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"row_sums is torch\.float64, expected torch\.float32"):
        tile_matmul_fused(x, *arguments, backend=backend, norm=[t.to(DEVICE) for t in norm])


def test_rows_that_share_memory_are_not_aligned() -> None:
    # One row of memory, 32 elements long, as 45 rows: no padding follows them.
    assert not has_aligned_rows(torch.randn(32).expand(45, 32))
    assert not has_aligned_rows(torch.randn(64).as_strided((3, 21), (16, 1)))
    assert has_aligned_rows(torch.randn(96).as_strided((3, 21), (32, 1)))
    case = vector_nm(False)
    with pytest.raises(ValueError, match="x has strides"):
        tile_matmul_fused(torch.randn(21).expand(45, 21), case.weight, case.index, 44)


def test_saves_neither_y_nor_what_stands_before_gelu() -> None:
    case = vector_nm(True)
    x = activation(45, 21).requires_grad_()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tile_matmul_fused(x, case.weight, case.index, 44, backend="triton", gelu=True)
    assert [t.shape for t in saved if t.is_floating_point()] == [x.t().shape, case.weight.shape]
    assert has_aligned_rows(saved[0].t())


def mlp(x: Tensor, up: Case, down: Case, bias: Tensor, weights: list[Tensor]) -> Tensor:
    hidden = tile_matmul_fused(
        aligned_features(x), weights[0], up.index, 40, backend="triton", bias=bias, gelu=True
    )
    y = tile_matmul_fused(
        hidden, weights[1], down.index, 67, backend="triton", residual=x.t(), feature_major=False
    )
    return y.t()


# Inductor chooses strides of its own; a compiler of C++ takes seconds.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(backend: str) -> None:
    torch._dynamo.reset()
    up, down = blocks((40, 67), 8, True), blocks((67, 40), 8, True)
    x = torch.randn(21, 67, device=DEVICE, requires_grad=True)
    bias = torch.randn(40, device=DEVICE, requires_grad=True)
    weights = [up.weight, down.weight]
    inputs = [x, bias, *weights]
    dy = torch.randn(21, 67, device=DEVICE)
    results = []
    for run in (mlp, torch.compile(mlp, fullgraph=True, backend=backend)):
        y = run(x, up, down, bias, weights)
        results.append((y, *torch.autograd.grad(y, inputs, dy)))
    torch.testing.assert_close(*results)
    hidden = torch.nn.functional.gelu(up.dense() @ exact(x).T + exact(bias)[:, None])
    assert relative_error(results[0][0], (down.dense() @ hidden).T + exact(x)) < 1e-5
