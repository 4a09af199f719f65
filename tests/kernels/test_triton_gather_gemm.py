"""Numerics of the Triton kernels against dense float64; interpreted where there is no GPU."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from padst_kernels.gather_gemm import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    """Tensors made by `empty` hold NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Case:
    """A weight in tiles, and the same weight dense."""

    weight: Tensor
    columns: Tensor
    row_pointer: Tensor | None
    rows: Tensor | None
    owner: list[int]
    out_features: int
    dense: Tensor


def int32(values: list[int] | Tensor) -> Tensor:
    return torch.as_tensor(values).to(DEVICE, torch.int32)


def make_case(
    height: int,
    width: int,
    tiles_per_group: list[int],
    in_features: int,
    out_features: int,
    *,
    permuted: bool = True,
    blocks: bool = False,
) -> Case:
    """Random columns; `blocks` instead draws runs of `width` neighbouring inputs on a grid."""
    num_groups = len(tiles_per_group)
    rows = None
    if permuted:
        places = torch.randperm(out_features)
        padding = torch.full((num_groups * height - out_features,), out_features)
        rows = torch.cat([places, padding])
    owner = [group for group, count in enumerate(tiles_per_group) for _ in range(count)]
    columns = torch.empty(len(owner), width, dtype=torch.int64)
    at = 0
    for count in tiles_per_group:
        if blocks:
            first = torch.randperm(in_features // width)[:count, None] * width
            columns[at : at + count] = first + torch.arange(width)
        else:
            columns[at : at + count] = torch.randperm(in_features)[: count * width].view(-1, width)
        at += count
    weight = torch.randn(len(owner), width, height)
    dense = torch.zeros(out_features, in_features, dtype=torch.float64)
    for tile, group in enumerate(owner):
        for v in range(height):
            row = group * height + v if rows is None else int(rows[group * height + v])
            if row < out_features:
                dense[row, columns[tile]] = weight[tile, :, v].double()
            else:
                weight[tile, :, v] = torch.nan
    pointer = [0, *torch.tensor(tiles_per_group).cumsum(0).tolist()]
    return Case(
        weight=weight.to(DEVICE),
        columns=int32(columns),
        row_pointer=None if set(tiles_per_group) == {1} else int32(pointer),
        rows=None if rows is None else int32(rows),
        owner=owner,
        out_features=out_features,
        dense=dense,
    )


def activation(num_features: int, num_tokens: int, feature_major: bool) -> Tensor:
    """Standard normal, with NaN in the padding."""
    like = torch.empty(0, device=DEVICE)
    x = kernels.empty_features(num_features, num_tokens, like, feature_major)
    return x.copy_(torch.randn(num_features, num_tokens))


def assert_close(value: Tensor, expected: Tensor) -> None:
    error = (value.double().cpu() - expected).norm() / expected.norm()
    assert error < 1e-4, float(error)


CASES = {
    # height, width, tiles of each row group, inputs, outputs
    "nm16": (16, 40, [1, 1, 1], 60, 41),
    "nm64": (64, 7, [1, 1], 33, 100),
    "nm8_wide": (8, 77, [1, 1, 1], 80, 24),
    "uneven": (16, 7, [2, 0, 3], 40, 48),
    "tall": (144, 16, [1], 20, 130),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_tokens", [1, 33])
def test_product_of_any_shape(name: str, num_tokens: int) -> None:
    case = make_case(*CASES[name])
    x = activation(case.dense.shape[1], num_tokens, True)
    y = kernels.launch_product(
        x, case.weight, case.columns, case.row_pointer, case.out_features, rows=case.rows
    )
    assert_close(y, case.dense @ x.double().cpu())
