"""The product of sparse weights that read one input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from padst_exp.structures.forms import Diagonals, Entries, Form, Masked, ThroughDense, Tiles
from padst_exp.structures.layout import Layout
from padst_kernels.tiles.cuda import slices_on

Storage = Literal["packed", "masked"]
Backend = Literal["torch", "triton", "cuda", "dense"]


class Product(nn.Module):
    """y = P_out S P_in x for one weight S, or for several whose outputs are concatenated.

    Hard permutations cost nothing: they are folded into the indices, whatever computes.

    Args:
        layouts: of the weights. Several (Q, K and V) must be `alike`; they then run as one.
        storage: of their values.
        backend: what computes packed values, one of `backends`.
    """

    def __init__(
        self, layouts: Sequence[Layout], storage: Storage, backend: Backend = "torch"
    ) -> None:
        super().__init__()
        self.layouts = list(layouts)
        self.storage = storage
        self.in_features = layouts[0].shape[1]
        self.out_features = sum(layout.shape[0] for layout in layouts)
        self.use_backend(backend)

    def backends(self, device: torch.device) -> list[Backend]:
        """What can compute this product on `device`, the usual choice first."""
        if self.storage == "masked":
            return ["dense"]
        if device.type == "cpu":
            return ["torch", "dense"]
        layout = self.layouts[0]
        if layout.tile_shape is not None:
            slices = slices_on(device, self.in_features, layout.frame[2])
            if layout.num_column_groups is None and slices is not None:
                return ["torch", "triton", "cuda", "dense"]
            return ["torch", "triton", "dense"]
        first = torch.zeros(1, dtype=torch.int64)
        diagonals = all(layout.offsets(first) is not None for layout in self.layouts)
        return ["dense", "triton"] if diagonals else ["dense"]

    def use_backend(self, backend: Backend) -> None:
        """Compute with another of `backends`; `fold` next."""
        self.backend = backend
        self.form = self._form(backend)

    def _form(self, backend: Backend) -> Form:
        if self.storage == "masked":
            return Masked(self.layouts)
        if backend == "dense":
            return ThroughDense(self.layouts)
        if self.layouts[0].tile_shape is not None:
            return Tiles(self.layouts, backend)
        return Diagonals(self.layouts) if backend == "triton" else Entries(self.layouts)

    def fold(
        self,
        units: Sequence[Tensor],
        input_index: Tensor | None,
        output_indices: Sequence[Tensor | None],
    ) -> None:
        """Derive the indices for active units and hard permutations, (P x)[i] = x[index[i]].

        A new topology changes tensors in place: compiled code and CUDA graphs stay valid.

        Args:
            units: int64 `[N]` for each weight.
            input_index: int64 `[I]`, or None for the identity.
            output_indices: int64 `[O]`, or None, for each weight.
        """
        self.form.fold(units, input_index, output_indices)

    def forward(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        """`[..., I]` and values of each S, packed `[N, E]` or masked `[O, I]`, to `[..., O]`."""
        return self.form.forward(x, values)


def alike(layouts: Sequence[Layout], storage: Storage) -> bool:
    """Whether one `Product` can compute all of `layouts`: their tiles have one shape, or none."""
    return storage == "masked" or len({layout.tile_shape for layout in layouts}) == 1
