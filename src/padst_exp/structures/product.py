"""The product of sparse weights that read one input, by one backend or another."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from padst_exp.structures.geometry import Geometry, scatter_entries
from padst_exp.structures.index import Folding, permuted_tiles, tile_shape
from padst_kernels import Backend
from padst_kernels.diagonals import diagonal_matmul
from padst_kernels.entries import EntryIndex, entry_index, entry_matmul
from padst_kernels.scatter import scatter_matmul
from padst_kernels.tiles import TileIndex, tile_matmul
from padst_kernels.tiles.cuda import slices_on

Storage = Literal["packed", "masked"]

# Compute capability of a GPU from which on it multiplies 2:4 by sparse tensor cores.
TWO_FOUR = (8, 0)


class Product(nn.Module, abc.ABC):
    """y = P_out S P_in x for one weight S, or for several whose outputs are concatenated.

    Hard permutations cost nothing: they are folded into the indices, whatever computes. What
    `index` derives from a topology is rebuilt after every change, so it is never saved.
    """

    @abc.abstractmethod
    def index(self, folding: Folding) -> None:
        """Derive what the kernel gathers by.

        A topology of the same size changes tensors in place: compiled code and CUDA graphs stay
        valid.
        """

    @abc.abstractmethod
    def forward(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        """`[..., I]` and values of each S, packed `[N, E]` or masked `[O, I]`, to `[..., O]`."""

    def _set(self, name: str, new: Tensor | None) -> None:
        """Keep a derived tensor, in place where its size is the same."""
        old = self._buffers.get(name)
        if old is None and new is None and name in self._buffers:
            return
        if old is None or new is None or (old.shape, old.device) != (new.shape, new.device):
            self.register_buffer(name, new, persistent=False)
        else:
            old.copy_(new)


class MaskedProduct(Product):
    """A dense weight times a mask: the plain reference, for masked storage."""

    mask: Tensor
    input_index: Tensor | None
    output_index: Tensor | None

    def index(self, folding: Folding) -> None:
        kept = torch.ones_like(folding.entries, dtype=torch.bool)
        shape = folding.out_features, folding.in_features
        self._set("mask", scatter_entries(kept, folding.entries, shape))
        # The permutation's own tensor must not be written to.
        self.register_buffer("input_index", folding.input_index, persistent=False)
        self._set("output_index", folding.output_index)

    def forward(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        x = x if self.input_index is None else x[..., self.input_index]
        y = nn.functional.linear(x, _join(values) * self.mask)
        return y if self.output_index is None else y[..., self.output_index]


class ScatterProduct(Product):
    """A dense weight that lives only during a pass."""

    entries: Tensor

    def index(self, folding: Folding) -> None:
        self.out_features = folding.out_features
        self._set("entries", _narrow(folding.permuted_entries, folding))

    def forward(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        flat = _join([value.flatten() for value in values])
        return scatter_matmul(x, flat, self.entries, self.out_features, trusted=True)


class SemiStructuredProduct(Product):
    """2:4 by the sparse tensor cores of a GPU; densely while more is active, and in float32.

    Inputs and outputs are gathered, since a permuted weight would be 2:4 no more.
    """

    entries: Tensor
    input_index: Tensor | None
    output_index: Tensor | None

    def index(self, folding: Folding) -> None:
        self.out_features = folding.out_features
        self._set("entries", _narrow(folding.entries, folding))
        # The permutation's own tensor must not be written to.
        self.register_buffer("input_index", folding.input_index, persistent=False)
        self._set("output_index", folding.output_index)
        self.fits = is_two_four(folding.entries)

    def forward(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        x = x if self.input_index is None else x[..., self.input_index]
        flat = _join([value.flatten() for value in values])
        fits = self.fits and x.element_size() == 2 and not torch.compiler.is_compiling()
        y = scatter_matmul(
            x, flat, self.entries, self.out_features, semi_structured=fits, trusted=True
        )
        return y if self.output_index is None else y[..., self.output_index]


def is_two_four(entries: Tensor) -> bool:
    """Whether flat `entries` of rows of whole quadruples hold at most two of each."""
    return bool((torch.bincount(entries.flatten() // 4) <= 2).all())


def can_be_two_four(geometry: Geometry) -> bool:
    """Whether weights of a geometry may be 2:4, of a size that sparse tensor cores multiply."""
    (rows, columns), chunk = geometry.shape, geometry.chunk
    return chunk in (2, 4) and rows % 32 == 0 and columns % 64 == 0 and geometry.exact_frames


class TileProduct(Product):
    """Dense tiles whose rows share gathered inputs."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.backend: Backend = backend

    def index(self, folding: Folding) -> None:
        first = folding.geometries[0]
        tiling = first.tiling()
        assert tiling is not None
        num_slices = None
        if self.backend == "cuda":
            num_slices = slices_on(folding.device, folding.in_features, tiling.height)
        index, width = permuted_tiles(folding, num_slices=num_slices)
        self.out_features = folding.out_features
        self.tiles_shape = (-1, width, tiling.height)
        for name, tensor in index._asdict().items():
            self._set(name, tensor)

    def forward(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        tiles = _join([value.view(self.tiles_shape) for value in values])
        # Attributes of a module are found slowly; with few tokens that shows.
        buffers = self._buffers
        index = TileIndex._make([buffers[name] for name in TileIndex._fields])
        size, backend = self.out_features, self.backend
        return tile_matmul(x, tiles, index, size, backend=backend, trusted=True)


class EntryProduct(Product):
    """Entry by entry, each row with inputs of its own."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.backend: Backend = backend

    def index(self, folding: Folding) -> None:
        self.out_features = folding.out_features
        entries, in_features = folding.permuted_entries, folding.in_features
        rows = entries // in_features
        by_row = bool((rows[1:] >= rows[:-1]).all())
        index = entry_index(entries, folding.out_features, in_features, by_row=by_row)
        for name, tensor in index._asdict().items():
            # Kept as bytes: gloo, which broadcasts buffers, knows no integers of two.
            narrow = tensor is not None and tensor.dtype == torch.uint16
            self._set(name, tensor.view(torch.uint8) if narrow else tensor)

    def forward(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        buffers = self._buffers
        index = EntryIndex._make([_features(buffers[name]) for name in EntryIndex._fields])
        flat = _join([value.flatten() for value in values])
        size, backend = self.out_features, self.backend
        return entry_matmul(x, flat, index, size, backend=backend, trusted=True)


class DiagonalProduct(Product):
    """Single diagonals, one weight after the other, by the Triton kernel."""

    offsets: Tensor
    columns: Tensor | None
    rows: Tensor | None

    def index(self, folding: Folding) -> None:
        offsets = [
            geometry.diagonal_offsets(units)
            for geometry, units in zip(folding.geometries, folding.units, strict=True)
        ]
        self.heights = [geometry.shape[0] for geometry in folding.geometries]
        self.numbers = [len(units) for units in folding.units]
        self._set("offsets", torch.cat([part for part in offsets if part is not None]).int())
        index = folding.input_index
        self._set("columns", None if index is None else index.int())
        rows = None
        if folding.output_index is not None:
            parts = folding.output_index.split(self.heights)
            rows = torch.cat([part.argsort() for part in parts]).int()
        self._set("rows", rows)

    def forward(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        offsets = self.offsets.split(self.numbers)
        none = [None] * len(self.heights)
        rows = none if self.rows is None else self.rows.split(self.heights)
        parts = [
            diagonal_matmul(
                x, value, at, height, columns=self.columns, rows=to, backend="triton", trusted=True
            )
            for value, at, height, to in zip(values, offsets, self.heights, rows, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def backends(
    geometries: Sequence[Geometry], storage: Storage, device: torch.device
) -> list[Backend]:
    """What can multiply weights of these geometries on `device`, the usual choice first."""
    if storage == "masked":
        return ["torch"]
    if device.type == "cpu":
        return ["native", "torch", "scatter"]
    cores = torch.cuda.get_device_capability(device) >= TWO_FOUR
    if cores and all(can_be_two_four(geometry) for geometry in geometries):
        return [*_usual(geometries, device), "semi_structured"]
    return _usual(geometries, device)


def _usual(geometries: Sequence[Geometry], device: torch.device) -> list[Backend]:
    """What multiplies on a GPU, whichever it is."""
    tilings = [geometry.tiling() for geometry in geometries]
    if any(tiling is None for tiling in tilings):
        first = torch.zeros(1, dtype=torch.int64)
        diagonals = all(geometry.diagonal_offsets(first) is not None for geometry in geometries)
        return ["scatter", "torch", "triton"] if diagonals else ["scatter", "torch"]
    grouped = any(tiling is not None and tiling.num_column_groups for tiling in tilings)
    sliced = not grouped and all(
        slices_on(device, geometry.shape[1], tiling.height) is not None
        for geometry, tiling in zip(geometries, tilings, strict=True)
        if tiling is not None
    )
    return ["torch", "triton", "cuda", "scatter"] if sliced else ["torch", "triton", "scatter"]


def product(geometry: Geometry, storage: Storage, backend: Backend) -> Product:
    """An empty product for weights like one of `geometry`; `index` comes next."""
    if storage == "masked":
        return MaskedProduct()
    if backend == "scatter":
        return ScatterProduct()
    if backend == "semi_structured":
        return SemiStructuredProduct()
    if geometry.tiling() is not None:
        return TileProduct(backend)
    return DiagonalProduct() if backend == "triton" else EntryProduct(backend)


def runs(folding: Folding, storage: Storage) -> list[slice]:
    """Which neighbouring weights of a folding run as one product: x is then read once.

    Their tiles must have one shape, or none must have any.
    """
    if storage == "masked" or len(folding.geometries) == 1:
        return [slice(0, len(folding.geometries))]
    shapes = [
        tile_shape(geometry, units)
        for geometry, units in zip(folding.geometries, folding.units, strict=True)
    ]
    starts = [i for i in range(len(shapes)) if i == 0 or shapes[i] != shapes[i - 1]]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(shapes)], strict=True)]


def _narrow(entries: Tensor, folding: Folding) -> Tensor:
    """For single entries the index weighs as much as the values do: four bytes where they do."""
    return entries.int() if folding.out_features * folding.in_features < 2**31 else entries


def _features(kept: Tensor | None) -> Tensor | None:
    return kept.view(torch.uint16) if kept is not None and kept.dtype == torch.uint8 else kept


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
