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

from kernel_cases import DEVICE, Tiles, blocks, needs, vector_nm
from padst_kernels import Backend, devices
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
    tile_matmul,
    tile_matmul_fused,
)

Operation = Callable[..., Tensor]
BACKENDS: list[Backend] = ["native", "torch", "triton"]


def moved(index: TileIndex | EntryIndex | Condensed, device: str) -> list[Any]:
    return [t.to(device) if isinstance(t, Tensor) else t for t in index]


def operations(backend: Backend, device: str = DEVICE) -> dict[str, tuple[Operation, Tensor]]:
    """Every operation of x `[..., 45]` and a weight, and the weight, on `device`."""
    case = vector_nm(True)
    index = TileIndex._make(moved(case.index, device))
    entries = torch.randperm(45 * 30)[:200]
    single = EntryIndex(*moved(entry_index(entries, 30, 45), device))
    condensed = Condensed(*moved(condense(torch.randn(200), entries, 30, 45), device))
    offsets = torch.tensor([0, 3], dtype=torch.int32, device=device)
    columns = torch.randperm(45, device=device, dtype=torch.int32)
    made: dict[str, tuple[Operation, Tensor]] = {
        "tile_matmul": (
            lambda x, w: tile_matmul(x, w, index, 44, backend=backend),
            case.weight,
        ),
        "tile_matmul_fused": (
            lambda x, w: tile_matmul_fused(
                aligned_features(x), w, index, 44, backend=backend, gelu=True
            ).t(),
            case.weight,
        ),
        "condensed_matmul": (
            lambda x, v: condensed_matmul(x, condensed._replace(values=v), backend=backend),
            torch.randn(200),
        ),
    }
    if backend != "triton":
        made["entry_matmul"] = (
            lambda x, v: entry_matmul(x, v, single, 30, backend=backend),
            torch.randn(200),
        )
    if backend != "native":
        made["diagonal_matmul"] = (
            lambda x, v: diagonal_matmul(x, v, offsets, 30, columns=columns, backend=backend),
            torch.randn(2, 30),
        )
    return {name: (operation, weight.to(device)) for name, (operation, weight) in made.items()}


NAMES = [(backend, name) for backend in BACKENDS for name in operations(backend)]


def x_of(tokens: int, device: str = DEVICE) -> Tensor:
    return torch.randn(tokens, 45, device=device)


def differentiable(name: str) -> bool:
    return name != "condensed_matmul"


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


def run(operation: Operation, *inputs: Tensor) -> None:
    """Forward, and backward where there is a gradient."""
    y = operation(*inputs)
    if y.requires_grad:
        y.backward(torch.randn_like(y))


@pytest.mark.parametrize(("backend", "name"), NAMES)
def test_operators_pass_opcheck(backend: Backend, name: str) -> None:
    needs(backend)
    operation, weight = operations(backend)[name]
    # Of many tokens Triton reads copies in another layout.
    for tokens in (5, 70) if backend == "triton" else (5,):
        x = x_of(tokens).requires_grad_(differentiable(name))
        with Operators() as seen:
            run(operation, x, weight.requires_grad_(differentiable(name)))
        (func, args), *backward = seen.calls
        torch.library.opcheck(func, args)
        for func, args in backward:
            torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))


def test_only_the_gradients_asked_for_are_computed() -> None:
    for backend, name in NAMES:
        operation, weight = operations(backend)[name]
        if not differentiable(name) or (backend == "native" and DEVICE != "cpu"):
            continue
        called = []
        for needs_x, needs_weight in ((True, True), (True, False), (False, True), (False, False)):
            x, weight = (
                x_of(5).requires_grad_(needs_x),
                weight.detach().requires_grad_(needs_weight),
            )
            with Operators() as seen:
                run(operation, x, weight)
            assert (x.grad is not None, weight.grad is not None) == (needs_x, needs_weight)
            called.append(len(seen.calls))
        both, first, second, none = called
        assert none == 1 and first == second == both - 1


@pytest.mark.parametrize(
    ("backend", "name"),
    [pair for pair in NAMES if pair[0] == "triton" or pair == ("torch", "entry_matmul")],
)
def test_a_graph_serves_many_numbers_of_tokens(backend: Backend, name: str) -> None:
    operation, weight = operations(backend)[name]
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(operation, fullgraph=True, backend=graphs)
    weight.requires_grad_(differentiable(name))
    for tokens in (70, 64, 80, 63, 16, 5, 33):
        x = x_of(tokens).requires_grad_(differentiable(name))
        y, expected = compiled(x, weight), operation(x, weight)
        torch.testing.assert_close(y, expected)
        if differentiable(name):
            dy = torch.randn_like(y)
            both = (torch.autograd.grad(out, (x, weight), dy) for out in (y, expected))
            torch.testing.assert_close(*both)
    # One of the first number alone, one of all others. Where a copy is aligned, PyTorch itself
    # tells multiples of 16 tokens, whose rows are contiguous, from others.
    copies = name == "tile_matmul_fused" or (backend, name) == ("triton", "tile_matmul")
    assert graphs.frame_count <= (4 if copies else 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_on_two_devices_and_unknown_backends_are_refused(backend: Backend) -> None:
    on_meta = operations(backend, "meta")
    for name, (operation, weight) in operations(backend).items():
        with pytest.raises(ValueError, match="is on"):
            on_meta[name][0](x_of(5), on_meta[name][1])
        with torch.no_grad(), pytest.raises(ValueError, match="is on"):
            operation(x_of(5, "meta"), weight)
        with pytest.raises(ValueError, match=r"backend is \'opencl\', expected one of"):
            operation, weight = operations("opencl")[name]  # type: ignore[arg-type]
            operation(x_of(5), weight)


@pytest.mark.skipif(DEVICE != "cpu", reason="Triton is at home on a GPU")
def test_says_where_a_backend_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for operation, weight in operations("triton").values():
        with pytest.raises(ValueError, match="backend 'triton' needs a GPU, got a tensor on cpu"):
            operation(x_of(5), weight)


@pytest.mark.gpu
def test_native_kernels_want_a_cpu() -> None:
    for operation, weight in operations("native").values():
        with pytest.raises(ValueError, match="backend 'native' needs a CPU"):
            operation(x_of(5), weight)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_tensors_without_memory_see_operators(backend: Backend) -> None:
    needs(backend)
    for operation, weight in operations(backend).values():
        x = x_of(5)
        expected = operation(x, weight)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            # Also outside of the mode.
            fake = operation(mode.from_tensor(x), weight)
        for y in (fake, operation(mode.from_tensor(x), weight)):
            assert y.shape == expected.shape and y.stride() == expected.stride()
        graph = make_fx(operation)(x, weight)
        x = x_of(5)
        torch.testing.assert_close(graph(x, weight), operation(x, weight))


def test_float64_goes_to_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    # And is copied into no other layout.
    monkeypatch.setattr(devices, "aligned_features", None)
    for backend in BACKENDS if DEVICE == "cpu" else BACKENDS[1:]:
        for name, (operation, weight) in operations(backend).items():
            if differentiable(name):
                x = x_of(70).double().requires_grad_()
                run(operation, x, weight.double().requires_grad_())
                inputs = x_of(2).double().requires_grad_(), weight.double().requires_grad_()
                assert torch.autograd.gradcheck(operation, inputs, fast_mode=True)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("make", [vector_nm, lambda permuted: blocks((40, 67), 8, permuted)])
def test_a_copy_in_another_layout_serves_both_passes(
    make: Callable[[bool], Tiles], compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, list[Tensor]] = {"x": [], "dy": []}
    product, weight_gradient = kernels.launch_product, kernels.launch_weight_gradient

    def launch_product(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        read["dy" if options.get("transposed") else "x"].append(x)
        return product(x, *rest, **options)

    def launch_weight_gradient(x: Tensor, dy: Tensor, *rest: Any, **options: Any) -> Tensor:
        read["x"].append(x)
        read["dy"].append(dy)
        return weight_gradient(x, dy, *rest, **options)

    monkeypatch.setattr(kernels, "launch_product", launch_product)
    monkeypatch.setattr(kernels, "launch_weight_gradient", launch_weight_gradient)
    case = make(True)
    torch._dynamo.reset()
    operation = torch.compile(tile_matmul, backend="aot_eager") if compiles else tile_matmul
    x = case.x(70).requires_grad_(case.index.slots is None)
    y = operation(x, case.weight.requires_grad_(), case.index, case.shape[0], backend="triton")
    y.backward(torch.randn_like(y))
    assert len({t.data_ptr() for t in read["x"]}) == 1 and len(read["x"]) == 2
    assert len({t.data_ptr() for t in read["dy"]}) == 1
    assert len(read["dy"]) == 1 + x.requires_grad
    assert all(t.stride(1) == 1 for tensors in read.values() for t in tensors)


@pytest.mark.gpu
def test_the_host_never_waits_for_the_device() -> None:
    for backend in BACKENDS[1:]:
        for name, (operation, weight) in operations(backend).items():
            x = x_of(70).requires_grad_(differentiable(name))
            for mode in ("default", "error"):  # Compiles, then runs.
                torch.cuda.set_sync_debug_mode(mode)
                try:
                    run(operation, x, weight)
                finally:
                    torch.cuda.set_sync_debug_mode("default")


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Tensor] = []
    inside: list[int] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        entered.append(x)
        inside.append(1)
        yield
        inside.pop()

    def checked(launched: Callable[..., None]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            assert inside
            launched(*args, **options)

        return launch

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    kind = type(kernels.product._product_kernel)
    get = kind.__getitem__
    monkeypatch.setattr(kind, "__getitem__", lambda kernel, grid: checked(get(kernel, grid)))
    for name, (operation, weight) in operations("triton").items():
        entered.clear()
        x = x_of(5).requires_grad_(differentiable(name))
        run(operation, x, weight)
        assert entered and all(t.device == x.device for t in entered)
