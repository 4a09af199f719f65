"""Condensed weights: what a row of a sparse weight multiplies, entry by entry.

Shape letters: I and O features in and out, S entries, N rows that have entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Condensed(NamedTuple):
    """A condensed weight, for inference.

    Attributes:
        values: `[S]`, row by row.
        columns: `[S]`, the input of each value; uint16 where I allows it, else int32.
        row_pointer: int32 `[N + 1]`, where each row begins.
        rows: int32 `[N]`, ascending, the feature of y that each row computes.
        in_features: I.
        out_features: O.
    """

    values: Tensor
    columns: Tensor
    row_pointer: Tensor
    rows: Tensor
    in_features: int
    out_features: int


class EntryIndex(NamedTuple):
    """Where the S entries of a weight `[O, I]` stand, by row and by column.

    The shapes depend on S, O and I alone, so that a new topology can be copied into the same
    tensors. Padding stands last in both orders, at feature 0, beyond the last pointer.

    Attributes:
        row_pointer: int32 `[O + 1]`, where each row begins in the order by row.
        columns: `[S]`, feature of x of each entry by row; uint16 where I allows it, else int32.
        order: int32 `[S]`, the flat place in the values of each entry by row; None where the
            values stand by row.
        column_pointer: int32 `[I + 1]`, where each column begins in the order by column.
        rows: `[S]`, feature of y of each entry by column; uint16 where O allows it, else int32.
        slots: int32 `[S]`, the flat place in the values of each entry by column.
    """

    row_pointer: Tensor
    columns: Tensor
    order: Tensor | None
    column_pointer: Tensor
    rows: Tensor
    slots: Tensor

    @property
    def in_features(self) -> int:
        """I."""
        return self.column_pointer.numel() - 1


def entry_index(
    entries: Tensor, out_features: int, in_features: int, *, by_row: bool = False
) -> EntryIndex:
    """Derive the index of the values at `entries`.

    Args:
        entries: int64, any shape; row * I + column, distinct, or O * I for padding.
        out_features: O.
        in_features: I.
        by_row: the caller knows that rows ascend along the flat `entries`, padding last, for every
            topology to come: `order` is None, which saves 4 bytes per entry and some time.

    Raises:
        ValueError: `by_row`, but rows do not ascend.
    """
    flat = entries.flatten()
    rows, columns = flat // in_features, flat % in_features
    order = None
    if not by_row:
        # Of padding, column 0.
        rows, order = rows.sort(stable=True)
        columns = columns[order]
    elif bool((rows[1:] < rows[:-1]).any()):
        raise ValueError("entry_index: by_row, but the rows of entries do not ascend")
    # Padding, in row O, goes behind the last column.
    by_column, slots = torch.where(rows < out_features, columns, in_features).sort(stable=True)
    return EntryIndex(
        row_pointer=_pointer(rows, out_features),
        columns=_narrow(columns, in_features),
        order=None if order is None else order.int(),
        column_pointer=_pointer(by_column, in_features),
        rows=_narrow(rows[slots] % out_features, out_features),
        slots=(slots if order is None else order[slots]).int(),
    )


def condense(values: Tensor, entries: Tensor, out_features: int, in_features: int) -> Condensed:
    """Condense a weight `[O, I]` that holds `values` at flat `entries` and zeros elsewhere.

    Args:
        values: any shape. Detached.
        entries: int64, shape of `values`; row * I + column, distinct, or O * I for padding.
        out_features: O.
        in_features: I.
    """
    entries, order = entries.flatten().sort()
    inside = int((entries < out_features * in_features).sum())
    entries, order = entries[:inside], order[:inside]
    counts = torch.bincount(entries // in_features, minlength=out_features)
    rows = counts.nonzero().squeeze(1)
    row_pointer = torch.zeros(len(rows) + 1, dtype=torch.int32, device=values.device)
    row_pointer[1:] = counts[rows].cumsum(0)
    return Condensed(
        values=values.detach().flatten()[order].contiguous(),
        columns=_narrow(entries % in_features, in_features),
        row_pointer=row_pointer,
        rows=rows.int(),
        in_features=in_features,
        out_features=out_features,
    )


def _narrow(features: Tensor, size: int) -> Tensor:
    return features.to(torch.uint16 if size <= 1 << 16 else torch.int32)


def _pointer(sorted_features: Tensor, size: int) -> Tensor:
    features = torch.arange(size + 1, device=sorted_features.device)
    return torch.searchsorted(sorted_features, features).int()
