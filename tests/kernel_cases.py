"""Weights of every kind for the kernels, and how their products are compared with the truth."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from padst_kernels import Backend, entries, tiles
from padst_kernels.activations import empty_features
from padst_kernels.entries import EntryIndex, entry_index
from padst_kernels.tiles import TileIndex, tile_index

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Half precision may be twice as wrong as PyTorch's own product, others as wrong as this.
FLOORS = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def dtypes_of(backend: Backend) -> list[torch.dtype]:
    """Triton's interpreter multiplies the bits of bfloat16 as integers."""
    interpreted = backend in ("triton", "cuda") and DEVICE == "cpu"
    return [dtype for dtype in FLOORS if dtype != torch.bfloat16 or not interpreted]


def needs(backend: Backend) -> None:
    """Skip the test where there is no compiler for the native kernels, or no CPU tensor."""
    if backend == "native" and (DEVICE != "cpu" or tiles.native.library() is None):
        pytest.skip("no compiler, or a GPU")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = actual.detach().double() - expected.detach().double()
    return float(difference.norm() / expected.detach().double().norm().clamp(min=1e-30))


def assert_agrees(
    operation: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    *inputs: Tensor,
    dy: Tensor | None = None,
    backward: bool = True,
    about: object = "",
) -> list[Tensor]:
    """y, and the gradients of all `inputs`, are those of `reference` in float64; returns ours."""
    dtype = inputs[0].dtype

    def passes(product: Callable[..., Tensor], wanted: torch.dtype) -> list[Tensor]:
        nonlocal dy
        given = [t.detach().to(wanted).requires_grad_(backward) for t in inputs]
        y = product(*given)
        if dy is None:
            dy = torch.randn_like(y)
        return [y, *torch.autograd.grad(y, given, dy.to(wanted))] if backward else [y]

    ours = passes(operation, dtype)
    exact, plain = passes(reference, torch.float64), passes(reference, dtype)
    names = ["y", *(f"gradient {i}" for i in range(len(inputs)))][: len(ours)]
    for name, actual, expected, own in zip(names, ours, exact, plain, strict=True):
        assert actual.dtype == dtype and actual.shape == expected.shape, (about, name)
        error, bound = relative_error(actual, expected), relative_error(own, expected)
        assert error <= max(2 * bound, FLOORS[dtype]), (about, name, error)
    return ours


def activation(
    num_features: int,
    num_tokens: int,
    feature_major: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal `[num_features, num_tokens]`, with NaN in the padding."""
    like = torch.empty(0, device=DEVICE, dtype=dtype)
    x = empty_features(num_features, num_tokens, like, feature_major)
    return x.copy_(torch.randn(num_features, num_tokens))


# --- tiles ---


@dataclass
class Tiles:
    """A weight in tiles, `[G, K, V]`, of shape `[O, I]`."""

    weight: Tensor
    index: TileIndex
    shape: tuple[int, int]
    rows: Tensor  # [G, V], O for padding
    columns: Tensor  # [G, K], I for padding

    def dense(self) -> Tensor:
        """`[O, I]`, not by way of the index."""
        out_features, in_features = self.shape
        dense = self.weight.new_zeros(out_features + 1, in_features + 1)
        at = self.rows[:, None, :], self.columns[:, :, None]
        return dense.index_put(at, self.weight, accumulate=True)[:out_features, :in_features]

    def product(self, backend: Backend) -> Callable[[Tensor, Tensor], Tensor]:
        """Of x and weight."""
        return lambda x, w: tiles.tile_matmul(x, w, self.index, self.shape[0], backend=backend)

    def reference(self, x: Tensor, weight: Tensor) -> Tensor:
        return tiles.tile_matmul_reference(x, weight, self.index, self.shape[0])

    def x(self, *tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*tokens, self.shape[1], device=DEVICE).to(dtype)


def make_tiles(
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
    num_slices: int | None = None,
) -> Tiles:
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
        num_slices=num_slices,
    )
    places = torch.arange(out_features) if positions is None else positions
    rows = torch.full((num_row_groups * height,), out_features)
    rows[places] = torch.arange(out_features)
    rows = rows.view(num_row_groups, height)
    return Tiles(
        weight=torch.randn(*columns.shape, height).to(DEVICE),
        index=TileIndex._make(None if t is None else t.to(DEVICE) for t in index),
        shape=shape,
        rows=(rows if owner is None else rows[owner]).to(DEVICE),
        columns=columns.to(DEVICE),
    )


def random_tiles(
    inputs: int,
    num_tiles: int,
    width: int,
    height: int,
    groups: int,
    outputs: int,
    permuted: bool,
) -> Tiles:
    """Any columns, padding among them; some row groups may have no tiles, others several."""
    columns = torch.stack([torch.randperm(inputs + 1)[:width] for _ in range(num_tiles)])
    owner = None if num_tiles == groups else torch.randint(0, groups, (num_tiles,))
    positions = torch.randperm(groups * height)[:outputs] if permuted else None
    return make_tiles(
        columns,
        owner,
        (outputs, inputs),
        height=height,
        num_row_groups=groups,
        permuted=False,
        positions=positions,
    )


def vector_nm(permuted: bool) -> Tiles:
    columns = torch.stack([torch.randperm(45)[:13] for _ in range(3)])
    columns[1, 4] = 45
    return make_tiles(columns, None, (44, 45), height=16, num_row_groups=3, permuted=permuted)


def tiles_of_any_columns(permuted: bool) -> Tiles:
    columns = torch.stack([torch.randperm(33)[:5] for _ in range(6)])
    owner = torch.tensor([2, 0, 2, 3, 3, 3])
    return make_tiles(columns, owner, (29, 33), height=8, num_row_groups=4, permuted=permuted)


def blocks(shape: tuple[int, int], size: int, permuted: bool) -> Tiles:
    rows, columns = (-(-features // size) for features in shape)
    active = torch.randperm(rows * columns)[: rows * columns // 2]
    groups = (active % columns)[:, None] * size + torch.arange(size)
    return make_tiles(
        groups.clamp(max=shape[1]),
        active // columns,
        shape,
        height=size,
        num_row_groups=rows,
        permuted=permuted,
        num_column_groups=columns,
    )


def strides(shape: tuple[int, int], stride: int, classes: int, permuted: bool) -> Tiles:
    height, width = shape[0] // stride, shape[1] // stride
    rows = torch.arange(stride).repeat(classes)
    shift = torch.randperm(stride)[:classes].repeat_interleave(stride)
    groups = ((rows + shift) % stride)[:, None] + torch.arange(width) * stride

    def positions(features: int) -> Tensor:
        feature = torch.arange(features)
        return feature % stride * (features // stride) + feature // stride

    return make_tiles(
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


TILES: dict[str, Callable[[bool], Tiles]] = {
    "nm": vector_nm,
    "any": tiles_of_any_columns,
    "blocks8": lambda permuted: blocks((40, 67), 8, permuted),
    "blocks16": lambda permuted: blocks((75, 48), 16, permuted),
    "stride wide": lambda permuted: strides((24, 39), 3, 2, permuted),
    "stride tall": lambda permuted: strides((40, 20), 5, 1, permuted),
}


# --- single entries ---


@dataclass
class Entries:
    """A weight of single entries, of shape `[O, I]`."""

    values: Tensor
    entries: Tensor  # flat; O * I for padding
    index: EntryIndex
    shape: tuple[int, int]

    def dense(self) -> Tensor:
        """`[O, I]`, not by way of the index."""
        size = self.shape[0] * self.shape[1]
        inside = self.entries < size
        dense = self.values.new_zeros(size)
        return dense.index_put((self.entries[inside],), self.values[inside]).view(self.shape)

    def product(self, backend: Backend) -> Callable[[Tensor, Tensor], Tensor]:
        """Of x and values."""
        return lambda x, v: entries.entry_matmul(x, v, self.index, self.shape[0], backend=backend)

    def reference(self, x: Tensor, values: Tensor) -> Tensor:
        return entries.entry_matmul_reference(x, values, self.index, self.shape[0])

    def x(self, *tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*tokens, self.shape[1], device=DEVICE).to(dtype)


def make_entries(
    shape: tuple[int, int], entries: Tensor, padding: int = 0, by_row: bool = False
) -> Entries:
    """Every value in a frame of its own; rows in any order, padding anywhere, unless `by_row`."""
    entries = torch.cat([entries, torch.full((padding,), shape[0] * shape[1])])
    entries = entries.sort().values if by_row else entries[torch.randperm(len(entries))]
    entries = entries[:, None].to(DEVICE)
    return Entries(
        values=torch.randn(entries.shape).to(DEVICE),
        entries=entries,
        index=entry_index(entries, *shape, by_row=by_row),
        shape=shape,
    )


def random_entries(
    shape: tuple[int, int], count: int, padding: int, by_row: bool = False
) -> Entries:
    return make_entries(shape, torch.randperm(shape[0] * shape[1])[:count], padding, by_row)
