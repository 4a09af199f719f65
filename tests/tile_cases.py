"""Weights in tiles of every kind, with the same weight dense."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from padst_kernels.tiles import TileIndex, tile_index

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Case:
    """A weight in tiles, and the same weight dense."""

    weight: Tensor
    index: TileIndex
    shape: tuple[int, int]
    rows: Tensor  # [G, V], O for padding
    columns: Tensor  # [G, K], I for padding

    def dense(self) -> Tensor:
        """Float64 `[O, I]`; differentiable."""
        out_features, in_features = self.shape
        dense = torch.zeros(out_features + 1, in_features + 1, dtype=torch.float64)
        at = self.rows[:, None, :], self.columns[:, :, None]
        dense = dense.index_put(at, self.weight.cpu().double(), accumulate=True)
        return dense[:out_features, :in_features]

    def inside(self, dweight: Tensor) -> Tensor:
        """`dweight` with zeros where the weight is padding."""
        rows, columns = self.rows < self.shape[0], self.columns < self.shape[1]
        mask = rows[:, None, :] & columns[:, :, None]
        return torch.where(mask.to(dweight.device), dweight, 0.0)


def make_case(
    groups: Tensor,
    owner: Tensor | None,
    shape: tuple[int, int],
    *,
    height: int,
    num_row_groups: int,
    permuted: bool,
    positions: Tensor | None = None,
    num_column_groups: int | None = None,
    column_positions: Tensor | None = None,
) -> Case:
    """`groups` holds the columns of each tile before any permutation; I is padding."""
    out_features, in_features = shape
    columns = groups
    if permuted:
        inputs = torch.randperm(in_features)
        columns = torch.cat([inputs, torch.tensor([in_features])])[columns]
        if num_column_groups is not None:
            here = torch.arange(in_features) if column_positions is None else column_positions
            column_positions = torch.empty_like(here)
            column_positions[inputs] = here
        outputs = torch.randperm(out_features)
        positions = outputs if positions is None else positions[outputs]
    index = tile_index(
        columns,
        owner,
        positions,
        height=height,
        num_row_groups=num_row_groups,
        in_features=in_features,
        out_features=out_features,
        num_column_groups=num_column_groups,
        column_positions=column_positions,
    )
    places = torch.arange(out_features) if positions is None else positions
    rows = torch.full((num_row_groups * height,), out_features)
    rows[places] = torch.arange(out_features)
    rows = rows.view(num_row_groups, height)
    return Case(
        weight=torch.randn(*columns.shape, height).to(DEVICE).requires_grad_(),
        index=TileIndex._make(None if t is None else t.to(DEVICE) for t in index),
        shape=shape,
        rows=rows if owner is None else rows[owner],
        columns=columns,
    )


def vector_nm(permuted: bool) -> Case:
    columns = torch.stack([torch.randperm(45)[:13] for _ in range(3)])
    columns[1, 4] = 45
    return make_case(columns, None, (44, 45), height=16, num_row_groups=3, permuted=permuted)


def tiles_of_any_columns(permuted: bool) -> Case:
    columns = torch.stack([torch.randperm(33)[:5] for _ in range(6)])
    owner = torch.tensor([2, 0, 2, 3, 3, 3])
    return make_case(columns, owner, (29, 33), height=8, num_row_groups=4, permuted=permuted)


def blocks(shape: tuple[int, int], size: int, permuted: bool) -> Case:
    rows, columns = (-(-features // size) for features in shape)
    active = torch.randperm(rows * columns)[: rows * columns // 2]
    groups = (active % columns)[:, None] * size + torch.arange(size)
    return make_case(
        groups.clamp(max=shape[1]),
        active // columns,
        shape,
        height=size,
        num_row_groups=rows,
        permuted=permuted,
        num_column_groups=columns,
    )


def strides(shape: tuple[int, int], stride: int, classes: int, permuted: bool) -> Case:
    height, width = shape[0] // stride, shape[1] // stride
    rows = torch.arange(stride).repeat(classes)
    shift = torch.randperm(stride)[:classes].repeat_interleave(stride)
    groups = ((rows + shift) % stride)[:, None] + torch.arange(width) * stride

    def positions(features: int) -> Tensor:
        feature = torch.arange(features)
        return feature % stride * (features // stride) + feature // stride

    return make_case(
        groups,
        None if classes == 1 else rows,
        shape,
        height=height,
        num_row_groups=stride,
        permuted=permuted,
        positions=positions(shape[0]),
        num_column_groups=stride,
        column_positions=positions(shape[1]),
    )


CASES: dict[str, Callable[[bool], Case]] = {
    "nm": vector_nm,
    "any": tiles_of_any_columns,
    "blocks8": lambda permuted: blocks((40, 67), 8, permuted),
    "blocks16": lambda permuted: blocks((75, 48), 16, permuted),
    "stride wide": lambda permuted: strides((24, 39), 3, 2, permuted),
    "stride tall": lambda permuted: strides((40, 20), 5, 1, permuted),
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = actual.detach().cpu().double() - expected.detach()
    return float(difference.norm() / expected.detach().norm().clamp(min=1e-30))
