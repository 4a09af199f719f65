"""One sparse weight S: its topology and its values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from padst_exp.dst import Algorithm, Relayout, Signals, Topology
from padst_exp.errors import UserError
from padst_exp.structures import Layout, Storage, gather_entries, scatter_entries

# With fewer active units a share of them is not a meaningful choice; such layers stay as drawn.
MIN_DYNAMIC_UNITS = 8


class SparseWeight(nn.Module):
    """What a sparse `[O, I]` weight keeps; `SparseLinear` multiplies with it.

    Shape letters as in `structures.layout`: N active units, E entries in the frame of a unit.

    Args:
        layout: the geometry.
        active: int64 `[N]`, sorted unit ids.
        dense: `[O, I]` initial weight, read at the active entries.
        storage: `"packed"` keeps the active entries only; `"masked"` keeps a dense weight that is
            zero elsewhere, the reference that packed storage is tested against.

    Attributes:
        values: Parameter, `[N, E]` packed or `[O, I]` masked.
        active: int32 buffer `[N]`, sorted unit ids.
        carry: float64 buffer, the fraction of a unit the next update still owes.
        static: too few units to rewire.
        collect_dense_gradient: set before a forward pass whose backward feeds a due update.
        dense_gradient: `[O, I]`, float32 or wider, summed over backward passes; or None.
    """

    active: Tensor
    carry: Tensor

    def __init__(self, layout: Layout, active: Tensor, dense: Tensor, storage: Storage) -> None:
        super().__init__()
        self.layout = layout
        self.storage = storage
        self.static = len(active) < MIN_DYNAMIC_UNITS
        self.collect_dense_gradient = False
        self.dense_gradient: Tensor | None = None
        active = active.to(dense.device)
        entries = layout.entries(active)
        values = gather_entries(dense.detach(), entries)
        if storage == "masked":
            values = scatter_entries(values, entries, layout.shape)
        self.values = nn.Parameter(values)
        self.register_buffer("active", active.to(torch.int32))
        self.register_buffer("carry", torch.zeros((), dtype=torch.float64, device=dense.device))
        # The layer this weight belongs to derives its indices from `active`.
        self.on_change: Callable[[], None] | None = None
        self.register_load_state_dict_post_hook(_check_loaded)

    def topology(self) -> Topology:
        """The active units as tables, for a DST algorithm."""
        candidates = self.layout.candidates.to(self.active.device)
        return Topology(self.active.long(), candidates, self.layout.pool_size)

    def packed(self) -> Tensor:
        """Values of the active units, `[N, E]`, whatever the storage. Detached."""
        values = self.values.detach()
        if self.storage == "packed":
            return values
        return gather_entries(values, self.layout.entries(self.active.long()))

    def dense(self) -> Tensor:
        """S as a dense `[O, I]` matrix, permutations not applied. Detached."""
        if self.storage == "masked":
            return self.values.detach().clone()
        entries = self.layout.entries(self.active.long())
        return scatter_entries(self.packed(), entries, self.layout.shape)

    @torch.no_grad()
    def rewire(
        self, algorithm: Algorithm, *, step: int, total: int, generator: torch.Generator
    ) -> Relayout:
        """Let `algorithm` decide this weight's next topology. Moves no values.

        Reads `dense_gradient` if the algorithm needs it: the loss gradient averaged over
        micro-batches and ranks, before any absolute value is taken.
        """
        gradient = None
        if algorithm.needs_dense_gradient:
            assert self.dense_gradient is not None, "no backward pass collected this gradient"
            gradient = self.layout.unit_rms(self.dense_gradient)
        topology = self.topology()
        magnitude = self.layout.frame_rms(self.packed(), topology.active)
        relayout, carry = algorithm.rewire(
            topology,
            Signals(magnitude, gradient, generator),
            step=step,
            total=total,
            carry=float(self.carry),
        )
        self.carry.fill_(carry)
        return relayout

    def move(self, tensor: Tensor, relayout: Relayout, fill: float = 0.0) -> Tensor:
        """Carry a tensor shaped like `values` (or packed `[N, 1]`) over to the new topology.

        Call it before `relayout_`. Grown entries become `fill`.
        """
        kept = relayout.source >= 0
        if self.storage == "packed":
            moved = tensor.index_select(0, relayout.source.clamp(min=0))
            return moved.masked_fill_(~kept[:, None], fill)
        kept_entries = self.layout.entries(relayout.active[kept])
        grown_entries = self.layout.entries(relayout.active[~kept])
        values = torch.cat(
            [
                gather_entries(tensor, kept_entries),
                tensor.new_full(grown_entries.shape, fill),
            ]
        )
        return scatter_entries(values, torch.cat([kept_entries, grown_entries]), self.layout.shape)

    @torch.no_grad()
    def relayout_(self, relayout: Relayout) -> None:
        """Adopt a new topology in place: values move, grown entries start at zero."""
        self.values.copy_(self.move(self.values, relayout))
        self.active.copy_(relayout.active)
        self._changed()

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def extra_repr(self) -> str:
        rows, columns = self.layout.shape
        return f"{rows}x{columns}, density={self.layout.density:.4f}, storage={self.storage}"


def _check_loaded(weight: nn.Module, _: object) -> None:
    """After a checkpoint is loaded: check its topology, and tell the layer that it changed."""
    assert isinstance(weight, SparseWeight)
    units, layout = weight.active.long(), weight.layout
    legal = bool((units >= 0).all() and (units < layout.num_pools * layout.pool_size).all())
    if legal:
        pools, slots = units // layout.pool_size, units % layout.pool_size
        counts = torch.bincount(pools, minlength=layout.num_pools).cpu()
        legal = (
            torch.equal(counts, layout.counts)
            and bool((slots < layout.candidates.to(units.device)[pools]).all())
            and bool((units.diff() > 0).all())
        )
    if not legal:
        raise UserError(
            "checkpoint: its active units do not fit this structure and sparsity; "
            "use the configuration the checkpoint was made with"
        )
    weight._changed()
