"""`tile_matmul_fused`: every epilogue, in both layouts, on every backend."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from kernel_cases import (
    DEVICE,
    TILES,
    Tiles,
    activation,
    assert_agrees,
    blocks,
    dtypes_of,
    needs,
    relative_error,
    vector_nm,
)
from padst_kernels import Backend
from padst_kernels.activations import has_aligned_rows
from padst_kernels.tiles import aligned_features, tile_matmul_fused
from padst_kernels.tiles.reference import dense_weight

BACKENDS: list[Backend] = ["native", "torch", "triton"]
EPILOGUES = ["", "bias", "gelu", "bias gelu residual", "residual"]
# Whether x, and whether y, are feature-major.
LAYOUTS = [(True, True), (True, False), (False, True), (False, False)]


def lies(x: Tensor, feature_major: bool) -> bool:
    return has_aligned_rows(x) if feature_major else x.t().is_contiguous()


def check(
    case: Tiles,
    backend: Backend,
    epilogue: str,
    tokens: int,
    layouts: tuple[bool, bool],
    dtype: torch.dtype = torch.float32,
) -> None:
    reads, writes = layouts
    out_features, in_features = case.shape
    inputs = [activation(in_features, tokens, reads, dtype), case.weight.to(dtype)]
    names = [name for name in ("bias", "residual") if name in epilogue]
    for name in names:
        bias = torch.randn(out_features, device=DEVICE).to(dtype)
        inputs.append(bias if name == "bias" else activation(out_features, tokens, writes, dtype))

    def product(x: Tensor, weight: Tensor, *more: Tensor) -> Tensor:
        return tile_matmul_fused(
            x, weight, case.index, out_features, backend=backend, gelu="gelu" in epilogue,
            feature_major=writes, **dict(zip(names, more, strict=True)),
        )  # fmt: skip

    def reference(x: Tensor, weight: Tensor, *more: Tensor) -> Tensor:
        given = dict(zip(names, more, strict=True))
        y = dense_weight(weight, case.index, out_features) @ x
        y = y + given["bias"][:, None] if "bias" in given else y
        y = gelu(y) if "gelu" in epilogue else y
        return y + given["residual"] if "residual" in given else y

    # Gradients come in any layout.
    aligned = activation(out_features, tokens, dtype=dtype)
    about = epilogue, tokens, layouts, dtype
    for dy in (aligned, aligned.clone(memory_format=torch.contiguous_format)):
        y, dx, *_ = assert_agrees(product, reference, *inputs, dy=dy, about=about)
        assert lies(y, writes) and lies(dx, reads), about


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_reference(backend: Backend) -> None:
    needs(backend)
    for make in TILES.values():
        check(make(False), backend, "bias gelu residual", 5, (True, True))
        check(make(True), backend, "bias gelu residual", 67, (False, False))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_reference_with_every_epilogue(backend: Backend) -> None:
    needs(backend)
    case = vector_nm(True)
    for dtype in dtypes_of(backend):
        check(case, backend, "bias gelu residual", 5, (True, True), dtype)
    for epilogue, layouts in itertools.product(EPILOGUES, LAYOUTS):
        check(case, backend, epilogue, 21, layouts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_folds_layer_norm(backend: Backend) -> None:
    needs(backend)
    case = vector_nm(True)
    x = activation(45, 21)
    x.copy_(3 * x + 2)
    bias, residual = torch.randn(44, device=DEVICE), activation(44, 21)
    variance, mean = torch.var_mean(x, 0, correction=0)
    dense = case.dense().double()
    norm = mean, (variance + 1e-6).rsqrt(), dense.sum(1).float()
    options = {"backend": backend, "bias": bias, "gelu": True, "residual": residual}
    normal = layer_norm(x.T.double(), (45,), eps=1e-6).T
    expected = gelu(dense @ normal + bias[:, None]) + residual
    loose = [torch.stack([t, t], 1)[:, 0] for t in norm]
    with torch.no_grad():
        for vectors in (norm, loose):
            y = tile_matmul_fused(x, case.weight, case.index, 44, norm=tuple(vectors), **options)
            assert relative_error(y, expected) < 1e-5
    weight = case.weight.requires_grad_()
    with pytest.raises(ValueError, match="norm has no gradient"):
        tile_matmul_fused(x, weight, case.index, 44, backend=backend, norm=norm)


def test_aligned_features() -> None:
    for tokens in (0, 1, 16, 21):
        x = torch.randn(tokens, 3, requires_grad=True)
        y = aligned_features(x)
        assert torch.equal(y, x.t()) and has_aligned_rows(y)
        assert tokens == 0 or y.data_ptr() != x.data_ptr()
        dy = torch.randn(3, tokens)
        assert torch.equal(torch.autograd.grad(y, x, dy)[0], dy.t())
    # One row of memory, 32 elements long, as 45 rows: no padding follows them.
    assert not has_aligned_rows(torch.randn(32).expand(45, 32))
    assert not has_aligned_rows(torch.randn(64).as_strided((3, 21), (16, 1)))
    assert has_aligned_rows(torch.randn(96).as_strided((3, 21), (32, 1)))


def test_names_what_is_not_aligned_or_disagrees() -> None:
    case = vector_nm(False)
    x, residual = activation(45, 5), activation(44, 5)

    def run(x: Tensor, **options: Tensor | tuple[Tensor, ...]) -> None:
        tile_matmul_fused(x, case.weight, case.index, 44, **options)

    for wrong in (
        x.clone(memory_format=torch.contiguous_format),
        activation(45, 21)[:, 1:6],
        torch.randn(21, device=DEVICE).expand(45, 21),
    ):
        with pytest.raises(ValueError, match="x has strides"):
            run(wrong)
    with pytest.raises(ValueError, match="residual has strides"):
        run(x, residual=residual.clone(memory_format=torch.contiguous_format))
    with pytest.raises(ValueError, match=r"residual is \(44, 4\), expected \(44, 5\)"):
        run(x, residual=residual[:, :4])
    with pytest.raises(ValueError, match=r"bias is \(45,\), expected \(44,\)"):
        run(x, bias=torch.zeros(45))
    with pytest.raises(ValueError, match=r"residual is torch\.float16, expected torch\.float32"):
        run(x, residual=residual.half())
    norm = torch.zeros(5), torch.zeros(5), torch.zeros(44, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"row_sums is torch\.float64, expected torch\.float32"):
        run(x, norm=tuple(t.to(DEVICE) for t in norm))


def test_every_operand_is_on_the_device_of_x() -> None:
    case = vector_nm(False)
    vectors = {
        "bias": torch.zeros(44),
        "residual": torch.zeros(5, 44).t(),
        "mean": torch.zeros(5),
        "rstd": torch.zeros(5),
        "row_sums": torch.zeros(44),
    }
    for what in vectors:
        given = {name: t.to("meta" if name == what else DEVICE) for name, t in vectors.items()}
        norm = tuple(given.pop(name) for name in ("mean", "rstd", "row_sums"))
        with torch.no_grad(), pytest.raises(ValueError, match=f"{what} is on meta"):
            tile_matmul_fused(activation(45, 5), case.weight, case.index, 44, norm=norm, **given)


def test_saves_neither_y_nor_what_stands_before_gelu_nor_the_residual() -> None:
    case = vector_nm(True)
    x, residual = activation(45, 21).requires_grad_(), activation(44, 21)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tile_matmul_fused(
            x, case.weight, case.index, 44, backend="triton", gelu=True, residual=residual
        )
    kept = {t.untyped_storage().data_ptr() for t in saved if t.is_floating_point()}
    assert kept == {t.untyped_storage().data_ptr() for t in (x, case.weight)}


def mlp(x: Tensor, up: Tiles, down: Tiles, bias: Tensor, weights: list[Tensor]) -> Tensor:
    hidden = tile_matmul_fused(
        aligned_features(x), weights[0], up.index, 40, backend="triton", bias=bias, gelu=True
    )
    y = tile_matmul_fused(
        hidden, weights[1], down.index, 67, backend="triton", residual=x.t(), feature_major=False
    )
    return y.t()


# Inductor chooses strides of its own; a compiler of C++ takes seconds.
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiles_whole(compiler: str) -> None:
    torch._dynamo.reset()
    up, down = blocks((40, 67), 8, True), blocks((67, 40), 8, True)
    compiled: Callable[..., Tensor] = torch.compile(mlp, fullgraph=True, backend=compiler)

    def reference(x: Tensor, bias: Tensor, *weights: Tensor) -> Tensor:
        return down.reference(gelu(up.reference(x, weights[0]) + bias), weights[1]) + x

    bias = torch.randn(40, device=DEVICE)
    for run in (mlp, compiled):
        assert_agrees(
            lambda x, b, *w, run=run: run(x, up, down, b, list(w)),
            reference,
            up.x(21),
            bias,
            up.weight,
            down.weight,
        )
