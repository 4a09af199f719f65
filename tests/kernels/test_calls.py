"""What every operation promises whoever calls it: which graphs, devices and kinds of tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from padst_kernels import devices
from padst_kernels.diagonals import diagonal_matmul
from padst_kernels.entries import (
    Condensed,
    EntryIndex,
    condense,
    condensed_matmul,
    entry_index,
    entry_matmul,
)
from padst_kernels.tiles import (
    TileIndex,
    aligned_features,
    kernels,
    passes,
    tile_matmul,
    tile_matmul_fused,
)
from padst_kernels.tiles.kernels import product
from tile_cases import DEVICE, blocks, vector_nm

Operation = Callable[[Tensor], Tensor]
BACKENDS = ["native", "torch", "triton"]


def moved(index: TileIndex | EntryIndex | Condensed, device: str) -> list:
    return [t.to(device) if isinstance(t, Tensor) else t for t in index]


def operations(backend: str, device: str = DEVICE) -> dict[str, Operation]:
    """Every operation of `[..., 45]`, its weights on `device`."""
    case = vector_nm(True)
    weight = case.weight.detach().to(device).requires_grad_()
    index = TileIndex._make(None if t is None else t.to(device) for t in case.index)
    entries = torch.randperm(45 * 30)[:200]
    values = torch.randn(200, device=device, requires_grad=True)
    single = EntryIndex(*moved(entry_index(entries, 30, 45), device))
    condensed = Condensed(*moved(condense(torch.randn(200), entries, 30, 45), device))
    offsets = torch.tensor([0, 3], dtype=torch.int32, device=device)
    diagonals = torch.randn(2, 30, device=device, requires_grad=True)
    columns = torch.randperm(45, device=device, dtype=torch.int32)
    made = {
        "tile_matmul": lambda x: tile_matmul(x, weight, index, 44, backend=backend),
        "tile_matmul_fused": lambda x: tile_matmul_fused(
            aligned_features(x), weight, index, 44, backend=backend, gelu=True
        ).t(),
        "condensed_matmul": lambda x: condensed_matmul(x, condensed, backend=backend),
    }
    if backend != "triton":
        made["entry_matmul"] = lambda x: entry_matmul(x, values, single, 30, backend=backend)
    if backend != "native":
        made["diagonal_matmul"] = lambda x: diagonal_matmul(
            x, diagonals, offsets, 30, columns=columns, backend=backend
        )
    return made


NAMES = [(backend, name) for backend in BACKENDS for name in operations(backend)]


# Where a copy is aligned, PyTorch itself tells multiples of 16 tokens, whose rows are contiguous,
# from others. Eager `tile_matmul` on Triton makes no such copy of few tokens.
@pytest.mark.parametrize(
    ("backend", "name", "most"),
    [
        ("native", "tile_matmul", 1),
        ("native", "tile_matmul_fused", 2),
        ("native", "condensed_matmul", 1),
        ("native", "entry_matmul", 1),
        ("torch", "tile_matmul", 1),
        ("torch", "tile_matmul_fused", 2),
        ("torch", "diagonal_matmul", 1),
        ("torch", "condensed_matmul", 1),
        ("torch", "entry_matmul", 1),
        ("triton", "tile_matmul", 3),
        ("triton", "tile_matmul_fused", 2),
        ("triton", "diagonal_matmul", 1),
        ("triton", "condensed_matmul", 1),
    ],
)
def test_a_graph_serves_many_numbers_of_tokens(backend: str, name: str, most: int) -> None:
    operation = operations(backend)[name]
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(operation, fullgraph=True, backend=graphs)
    needs_grad = name != "condensed_matmul"
    for tokens in (197, 64, 130, 96, 63, 16, 5, 48, 33):
        x = torch.randn(tokens, 45, device=DEVICE, requires_grad=needs_grad)
        y, expected = compiled(x), operation(x)
        torch.testing.assert_close(y, expected)
        if needs_grad:
            dy = torch.randn_like(y)
            torch.testing.assert_close(*(torch.autograd.grad(out, x, dy) for out in (y, expected)))
    # And one of the first number alone.
    assert graphs.frame_count == 1 + most


class Operators(TorchDispatchMode):
    """Writes down which operators of ours are called, and with what."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "padst":
            first = not self.calls  # of the forward pass
            self.calls.append((func, tuple(copied(value, first) for value in args)))
        return func(*args, **(kwargs or {}))


def copied(value: Any, with_gradient: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(with_gradient and value.requires_grad)


@pytest.mark.parametrize(("backend", "name"), NAMES)
def test_operators_pass_opcheck(backend: str, name: str) -> None:
    operation = operations(backend)[name]
    for tokens in (5, 70):
        x = torch.randn(tokens, 45, device=DEVICE, requires_grad=name != "condensed_matmul")
        with Operators() as seen:
            y = operation(x)
            if x.requires_grad:
                y.backward(torch.randn_like(y))
        assert len(seen.calls) == (3 + (name == "tile_matmul_fused") if x.requires_grad else 1)
        for func, args in seen.calls:
            torch.library.opcheck(func, args)


@pytest.mark.parametrize(("backend", "name"), NAMES)
def test_tensors_on_two_devices_are_refused(backend: str, name: str) -> None:
    with pytest.raises(ValueError, match="is on"):
        operations(backend, "meta")[name](torch.randn(5, 45, device=DEVICE))
    with torch.no_grad(), pytest.raises(ValueError, match="is on"):
        operations(backend, DEVICE)[name](torch.randn(5, 45, device="meta"))


@pytest.mark.parametrize("what", ["bias", "residual", "mean", "rstd", "row_sums"])
def test_every_operand_is_on_the_device_of_x(what: str) -> None:
    case = vector_nm(False)
    x = aligned_features(torch.randn(5, 45, device=DEVICE))
    tensors = {
        "bias": torch.zeros(44),
        "residual": torch.zeros(5, 44).t(),
        "mean": torch.zeros(5),
        "rstd": torch.zeros(5),
        "row_sums": torch.zeros(44),
    }
    tensors = {name: t.to("meta" if name == what else DEVICE) for name, t in tensors.items()}
    norm = tuple(tensors.pop(name) for name in ("mean", "rstd", "row_sums"))
    with torch.no_grad(), pytest.raises(ValueError, match=f"{what} is on meta"):
        tile_matmul_fused(x, case.weight, case.index, 44, norm=norm, **tensors)


@pytest.mark.parametrize(("backend", "name"), NAMES)
@torch.no_grad()
def test_tensors_without_memory_see_operators(backend: str, name: str) -> None:
    operation, x = operations(backend)[name], torch.randn(5, 45, device=DEVICE)
    expected = operation(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        # Also outside of the mode.
        fake = operation(mode.from_tensor(x))
    for y in (fake, operation(mode.from_tensor(x))):
        assert y.shape == expected.shape and y.stride() == expected.stride()
    graph = make_fx(operation)(x)
    x = torch.randn(5, 45, device=DEVICE)
    torch.testing.assert_close(graph(x), operation(x))


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("make", [vector_nm, lambda permuted: blocks((40, 67), 8, permuted)])
def test_a_copy_in_another_layout_serves_both_passes(
    make: Callable, backend: str, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, list[Tensor]] = {"x": [], "dy": []}
    product, weight_gradient = kernels.launch_product, kernels.launch_weight_gradient

    def launch_product(x: Tensor, *rest: object, **options: object) -> Tensor:
        read["dy" if options.get("transposed") else "x"].append(x)
        return product(x, *rest, **options)

    def launch_weight_gradient(x: Tensor, dy: Tensor, *rest: object, **options: object) -> Tensor:
        read["x"].append(x)
        read["dy"].append(dy)
        return weight_gradient(x, dy, *rest, **options)

    monkeypatch.setattr(kernels, "launch_product", launch_product)
    monkeypatch.setattr(kernels, "launch_weight_gradient", launch_weight_gradient)
    case = make(True)
    torch._dynamo.reset()
    operation = torch.compile(tile_matmul, backend="aot_eager") if compiles else tile_matmul
    x = torch.randn(70, case.shape[1], device=DEVICE, requires_grad=case.index.slots is None)
    y = operation(x, case.weight, case.index, case.shape[0], backend=backend)
    y.backward(torch.randn_like(y))
    assert len({t.data_ptr() for t in read["x"]}) == 1 and len(read["x"]) == 2
    assert len({t.data_ptr() for t in read["dy"]}) == 1
    assert len(read["dy"]) == 1 + x.requires_grad
    assert all(t.stride(1) == 1 for tensors in read.values() for t in tensors)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "name"), NAMES)
def test_the_host_never_waits_for_the_device(backend: str, name: str) -> None:
    operation = operations(backend)[name]
    x = torch.randn(70, 45, device=DEVICE, requires_grad=name != "condensed_matmul")
    for mode in ("default", "error"):  # Compiles, then runs.
        torch.cuda.set_sync_debug_mode(mode)
        try:
            y = operation(x)
            if x.requires_grad:
                y.backward(torch.ones_like(y))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["tile_matmul", "diagonal_matmul", "condensed_matmul"])
def test_kernels_run_on_the_device_of_their_tensors(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[Tensor] = []
    inside: list[int] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        entered.append(x)
        inside.append(1)
        yield
        inside.pop()

    def checked(launched: Callable[..., None]) -> Callable[..., None]:
        def run(*args: object, **options: object) -> None:
            assert inside
            launched(*args, **options)

        return run

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    kind = type(product._product_kernel)
    get = kind.__getitem__
    monkeypatch.setattr(kind, "__getitem__", lambda kernel, grid: checked(get(kernel, grid)))
    x = torch.randn(5, 45, device=DEVICE, requires_grad=name != "condensed_matmul")
    y = operations("triton")[name](x)
    if x.requires_grad:
        y.sum().backward()
    assert entered and all(t.device == x.device for t in entered)


def test_float64_is_copied_into_no_other_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "aligned_features", None)
    monkeypatch.setattr(devices, "aligned_features", None)
    case = vector_nm(True)
    x = torch.randn(70, 45, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weight = case.weight.detach().double().requires_grad_()
    tile_matmul(x, weight, case.index, 44, backend="triton").sum().backward()
    y = tile_matmul_fused(
        x.t(), weight, case.index, 44, backend="triton", gelu=True, feature_major=False
    )
    y.sum().backward()
    assert x.grad is not None
