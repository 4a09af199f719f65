"""Indices that were not made here: every public operation is right, or refuses in one line."""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from kernel_cases import DEVICE, blocks, random_entries, vector_nm
from padst_kernels import Backend
from padst_kernels.diagonals import diagonal_matmul
from padst_kernels.entries import Condensed, condense, condensed_matmul, entry_matmul
from padst_kernels.scatter import scatter_matmul
from padst_kernels.tiles import TileIndex, aligned_features, tile_matmul, tile_matmul_fused

Fields = dict[str, Tensor]
# Of index tensors by name, x and a backend.
Operation = Callable[[Fields, Tensor, Backend], Tensor]
BACKENDS: list[Backend] = ["native", "torch"] if DEVICE == "cpu" else ["torch"]
DTYPES = [torch.int64, torch.int32, torch.int16, torch.uint16, torch.uint8, torch.bool, torch.half]


def tile_operations(index: TileIndex, weight: Tensor, size: int) -> list[Operation]:
    def plain(fields: Fields, x: Tensor, backend: Backend) -> Tensor:
        return tile_matmul(x, weight, index._replace(**fields), size, backend=backend)

    def fused(fields: Fields, x: Tensor, backend: Backend) -> Tensor:
        own = index._replace(**fields)
        return tile_matmul_fused(aligned_features(x), weight, own, size, backend=backend).t()

    return [plain, fused]


def operations() -> list[tuple[Operation, Fields, Tensor]]:
    """Every operation, the index tensors that it takes, and an x that needs a gradient."""
    made: list[tuple[Operation, Fields, Tensor]] = []
    for case in (vector_nm(True), blocks((36, 48), 4, True)):
        fields = {name: t for name, t in case.index._asdict().items() if t is not None}
        for operation in tile_operations(case.index, case.weight, case.shape[0]):
            made.append((operation, fields, case.x(5).requires_grad_()))
    single = random_entries((30, 45), 200, 3)
    x, values, entries = single.x(5).requires_grad_(), single.values, single.entries
    condensed = condense(values, entries, 30, 45)
    diagonals = torch.randn(3, 30, device=DEVICE)

    def by_entry(fields: Fields, x: Tensor, backend: Backend) -> Tensor:
        return entry_matmul(x, values, single.index._replace(**fields), 30, backend=backend)

    def scattered(fields: Fields, x: Tensor, backend: Backend) -> Tensor:
        return scatter_matmul(x, values, fields["entries"], 30)

    def inference(fields: Fields, x: Tensor, backend: Backend) -> Tensor:
        own = Condensed(**{**condensed._asdict(), **fields})
        return condensed_matmul(x.detach(), own, backend=backend)

    def diagonal(fields: Fields, x: Tensor, backend: Backend) -> Tensor:
        return diagonal_matmul(x, diagonals, out_features=30, **fields)

    made.append((by_entry, {k: t for k, t in single.index._asdict().items() if t is not None}, x))
    made.append((scattered, {"entries": entries}, x))
    names = ("columns", "row_pointer", "rows")
    made.append((inference, {name: getattr(condensed, name) for name in names}, x))
    lines = {"offsets": 3, "columns": 45, "rows": 30}
    drawn = {
        name: torch.randperm(size, device=DEVICE, dtype=torch.int32) for name, size in lines.items()
    }
    return [*made, (diagonal, drawn, x)]


def outside(index: Tensor) -> Tensor:
    """One number is none of a feature, an entry or a tile."""
    least = 0 if index.dtype == torch.uint16 else -(2**31)
    number = random.choice([-1, least, 60_000]) if least else 60_000
    damaged = index.long().clone()
    damaged.view(-1)[random.randrange(index.numel())] = number
    return damaged.to(index.dtype)


DAMAGES: list[Callable[[Tensor], Tensor]] = [
    lambda index: torch.stack([index, torch.zeros_like(index)], -1)[..., 0],
    lambda index: index.long().to(random.choice(DTYPES)),
    lambda index: index[:-1].clone(),
    lambda index: torch.cat([index, index[-1:]]),
    lambda index: index.unsqueeze(0),
    outside,
]


def results(operation: Operation, fields: Fields, x: Tensor, backend: Backend) -> list[Tensor]:
    y = operation(fields, x, backend)
    return [y, *(torch.autograd.grad(y.sum(), x) if y.requires_grad else [])]


def test_other_indices_give_the_right_result_or_one_line() -> None:
    random.seed(0)
    torch.manual_seed(0)
    refused = right = 0
    for operation, fields, x in operations():
        for backend in BACKENDS:
            expected = results(operation, fields, x, backend)
            for _ in range(40):
                name, damage = random.choice(list(fields)), random.choice(DAMAGES)
                own, other = fields[name], damage(fields[name])
                try:
                    found = results(operation, {**fields, name: other}, x, backend)
                except (ValueError, IndexError) as error:
                    refused += 1
                    assert "\n" not in str(error) and "_matmul" in str(error), error
                    # What is as it was made is not refused.
                    as_made = other.dtype == own.dtype and other.is_contiguous()
                    assert not (as_made and torch.equal(other.long(), own.long())), (name, error)
                    continue
                right += 1
                for actual, wanted in zip(found, expected, strict=True):
                    torch.testing.assert_close(actual, wanted)
    assert refused > 400 and right > 20, (refused, right)


def test_a_graph_is_made_without_reading_indices() -> None:
    case = vector_nm(True)

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        return tile_matmul(x, weight, case.index, case.shape[0])

    x, compiled = case.x(5), torch.compile(multiply, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, case.weight), case.reference(x, case.weight))
