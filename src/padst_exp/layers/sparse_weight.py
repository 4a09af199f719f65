"""One sparse weight S: its topology and its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from padst_exp.dst import Algorithm, Change, Entries, Gate, Signals, Topology
from padst_exp.errors import UserError
from padst_exp.layers.move import Move, plan
from padst_exp.seal import Seal
from padst_exp.structures import Geometry, Storage, gather_entries, scatter_entries

# Entries of a unit from which on a weight keeps its topology as tables.
KEPT_UNIT = 8


class SparseWeight(nn.Module):
    """What a sparse `[O, I]` weight keeps; `SparseLinear` multiplies with it.

    Shape letters as in `structures.geometry`: N active units, E entries in the frame of a unit.

    Args:
        geometry: units and pools.
        active: int64 `[N]`, sorted unit ids.
        dense: `[O, I]` initial weight, read at the active entries.
        storage: `"packed"` keeps the active entries only; `"masked"` keeps a dense weight that is
            zero elsewhere, the reference that packed storage is tested against.
        target: int64 `[P]`, active units per pool that the asked density stands for; None: those
            that are active now.
        is_output: whether its rows are the outputs of the whole model.

    Attributes:
        values: Parameter, `[N, E]` packed or `[O, I]` masked. Another Parameter after a change of
            the number of entries.
        active: int32 buffer `[N]`, sorted unit ids.
        carry: float64 buffer, the fraction of a unit the next update still owes.
        row_order: int64 buffer `[O]`, see `Geometry.with_row_order`; None in natural order.
        selection: a soft choice of which active units stay; None once it settled, or without one.
        collect_dense_gradient: set before a forward pass whose backward feeds a due update.
        gradient_parts: how many parts of the samples it is then also summed over one by one; 0.
        dense_gradient: `[O, I]`, float32 or wider, summed over backward passes; or None.
        part_gradients: `[gradient_parts, O, I]`, the same of each part alone; or None.
        reduce_gradient: what is made of `dense_gradient` in each backward pass that adds to it, for
            it to be kept in another form until it is used; or None.
        weight_gradient: shaped like `values`, kept from before clipping for a due update; or None.
        on_change: called, without arguments, whenever topology or values are other ones.
    """

    active: Tensor
    carry: Tensor
    row_order: Tensor | None
    selection: Gate | None

    def __init__(
        self,
        geometry: Geometry,
        active: Tensor,
        dense: Tensor,
        storage: Storage,
        *,
        target: Tensor | None = None,
        is_output: bool = False,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self._known: tuple[Topology, Tensor, Geometry] | None = None
        self._seals = Seal(_checksum), Seal(torch.clone)
        self.storage = storage
        self.collect_dense_gradient = False
        self.gradient_parts = 0
        self.dense_gradient: Tensor | None = None
        self.part_gradients: Tensor | None = None
        self.weight_gradient: Tensor | None = None
        self.reduce_gradient: Callable[[Tensor], Tensor] | None = None
        self.on_change: list[Callable[[], None]] = []
        active = active.to(dense.device)
        values = gather_entries(dense.detach(), geometry.entries(active))
        if storage == "masked":
            values = scatter_entries(values, geometry.entries(active), geometry.shape)
        self.values = nn.Parameter(values)
        self.register_buffer("active", active.to(torch.int32))
        self.register_buffer("carry", torch.zeros((), dtype=torch.float64, device=dense.device))
        self.register_buffer("row_order", geometry.row_order)
        self.selection = None
        counts = torch.bincount(active.cpu() // geometry.pool_size, minlength=geometry.num_pools)
        self.target = counts if target is None else target
        self.is_output = is_output
        self.check_written()
        self.register_load_state_dict_post_hook(_check_loaded)

    @property
    def shape(self) -> tuple[int, int]:
        """`(O, I)`."""
        return self.geometry.shape

    @property
    def frozen(self) -> bool:
        """Whether its values are not trained; then its units are not to change either."""
        return not self.values.requires_grad

    def topology(self) -> Topology:
        """The active units as tables; the same object until they are other ones.

        Raises:
            UserError: somebody wrote other units to the buffer, whose values these are not.
        """
        self.check_written()
        active, geometry, device = self.active, self.geometry, self.active.device
        if self._known is not None and self._known[1] is active and self._known[2] is geometry:
            return self._known[0]
        topology = Topology(
            active.long(),
            geometry.candidates.to(device),
            geometry.unit_sizes.to(device),
            geometry.pool_size,
            geometry.shape,
            self.target.to(device),
            self.is_output,
        )
        # Beside the values of single entries, ids of eight bytes would be no small thing to keep.
        if geometry.unit_size >= KEPT_UNIT:
            self._known = topology, active, geometry
        return topology

    def check_written(self) -> None:
        """What `topology` raises; waits for the device only where somebody did write."""
        units, rows = self._seals
        if not (units.intact(self.active) and rows.intact(self.row_order)):
            raise UserError(
                "sparse weight: its active units were overwritten in place, as averages of "
                "torch's swa_utils and copies of single tensors do; its values would be those "
                "of other units: take states over by load_state_dict, average by "
                "trainer.ema_decay"
            )

    def _forget(self) -> None:
        """The buffers of units and rows hold other ones, and rightly so."""
        self._known = None
        for seal in self._seals:
            seal.lift()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.check_written()

    def entries(self) -> Tensor:
        """Flat positions of all active frames, int64 `[N, E]`; O * I outside the weight."""
        return self.geometry.entries(self.topology().active)

    def select(self, selection: Gate | None) -> None:
        """Let a soft selection weigh the active units from now on."""
        self.selection = selection
        if selection is not None:
            selection.attach(self)
            selection.on_change.append(self._changed)

    def effective(self) -> Tensor:
        """The values that multiply, shaped like `values`: weighed while a selection is soft."""
        if self.selection is None:
            return self.values
        coefficients, passing = self.selection.coefficients(), self.selection.passing()
        weighed = self.values * self.per_value(coefficients)
        if passing is None:
            return weighed
        # Gradients also reach what counts nothing: a zero is added that has one.
        besides = self.per_value(passing - coefficients)
        return weighed + (self.values - self.values.detach()) * besides

    def per_value(self, units: Tensor) -> Tensor:
        """One number for each active unit, `[N]`, or value, `[N, E]`, as a factor of `values`."""
        units = units.to(self.values.dtype)
        units = units[:, None] if units.dim() == 1 else units
        if self.storage == "packed":
            return units
        entries = self.entries()
        return scatter_entries(units.expand(entries.shape), entries, self.geometry.shape)

    def magnitudes(self) -> Tensor:
        """Root mean square of the values of each active unit, `[N]`, before any weighing."""
        return self.geometry.frame_rms(self.unweighed(), self.topology().active)

    def unweighed(self) -> Tensor:
        """Values of the active units, `[N, E]`, without the factors of a selection. Detached."""
        values = self.values.detach()
        return values if self.storage == "packed" else gather_entries(values, self.entries())

    def packed(self) -> Tensor:
        """Values of the active units, `[N, E]`, whatever the storage. Detached."""
        values = self.effective().detach()
        return values if self.storage == "packed" else gather_entries(values, self.entries())

    def matrix(self) -> Tensor:
        """S as a dense `[O, I]` matrix, permutations not applied. Differentiable."""
        values, entries = self.effective(), self.entries()
        if self.storage == "masked":
            values = gather_entries(values, entries)
        return scatter_entries(values, entries, self.geometry.shape)

    def laid_out(self, tensor: Tensor) -> Tensor:
        """What is shaped like `values`, zero where nothing is active, as `[O, I]`."""
        if self.storage == "masked":
            return tensor
        return scatter_entries(tensor, self.entries(), self.geometry.shape)

    def taken_from(self, dense: Tensor) -> Tensor:
        """The active entries of `dense` `[O, I]`, shaped like `values`."""
        entries = self.entries()
        packed = gather_entries(dense, entries)
        if self.storage == "packed":
            return packed
        return scatter_entries(packed, entries, self.geometry.shape)

    @torch.no_grad()
    def decide(
        self,
        algorithm: Algorithm,
        *,
        step: int,
        total: int,
        generator: torch.Generator,
        birth: Tensor | None = None,
    ) -> Change:
        """Let `algorithm` decide this weight's next topology. Moves nothing.

        Args:
            algorithm: reads `dense_gradient` if it asks for it: the loss gradient averaged over
                micro-batches and ranks, before any absolute value is taken.
            step: completed steps.
            total: steps of the whole training.
            generator: for random choices.
            birth: int64 `[N]`, the step at which each active unit was grown, where `algorithm`
                asks for their age.
        """
        topology, geometry = self.topology(), self.geometry
        dense_gradient = weight_gradient = None
        if "dense_gradient" in algorithm.needs:
            assert self.dense_gradient is not None, "no backward pass collected this gradient"
            dense_gradient = geometry.unit_rms(self.dense_gradient, topology.exists())
        if "weight_gradient" in algorithm.needs:
            gradient = self.weight_gradient
            assert gradient is not None, "no backward pass reached these values"
            if self.storage == "masked":
                gradient = gather_entries(gradient, self.entries())
            weight_gradient = geometry.frame_rms(gradient, topology.active)
        coordinates = "coordinates" in algorithm.needs
        change, carry = algorithm.decide(
            topology,
            Signals(
                magnitude=geometry.frame_rms(self.packed(), topology.active),
                generator=generator,
                progress=step / total,
                dense_gradient=dense_gradient,
                weight_gradient=weight_gradient,
                coordinates=geometry.coordinates(self.active.device) if coordinates else None,
                age=None if birth is None else step - birth,
                entries=self._single_entries() if "entries" in algorithm.needs else None,
            ),
            step=step,
            total=total,
            carry=float(self.carry),
        )
        self.carry.fill_(carry)
        return change

    def _single_entries(self) -> Entries:
        assert self.dense_gradient is not None, "entries come with the dense gradient"
        entries, shape = self.entries(), self.shape
        active = scatter_entries(torch.ones_like(entries, dtype=torch.bool), entries, shape)
        order = self.row_order
        rows = torch.arange(shape[0], device=entries.device) if order is None else order
        return Entries(
            weights=self.matrix(), gradients=self.dense_gradient, active=active, row_order=rows
        )

    @torch.no_grad()
    def settle(self) -> Change | None:
        """Once the selection is hard: weigh the values for good and return what is to be adopted.

        The output is continuous as far as the coefficients of the chosen units are near 1 and
        those of the others near 0.
        """
        selection = self.selection
        if selection is None or selection.soft:
            return None
        self.values.mul_(self.per_value(selection.taken_over()))
        self.selection = None
        return selection.settled()

    @torch.no_grad()
    def adopt(self, change: Change) -> Move:
        """Take a new topology: values move, what is grown starts at zero.

        Returns:
            The map that everything shaped like `values` must follow.

        Raises:
            ValueError: the change does not fit this weight; nothing has happened then.
        """
        move = plan(self, change)
        moved = move(self.values.detach(), signed=True)
        if moved.shape == self.values.shape:
            self.values.copy_(moved)
        else:
            self.values = nn.Parameter(moved, requires_grad=self.values.requires_grad)
        move.new = self.values
        self._set_topology(change.active.to(self.active), move.geometry)
        self._changed()
        return move

    def _set_topology(self, active: Tensor, geometry: Geometry) -> None:
        self._forget()
        if active.shape == self.active.shape:
            self.active.copy_(active)
        else:
            self.active = active.clone()
        if geometry is not self.geometry:
            self.geometry = geometry
            self.row_order = geometry.row_order
        self.check_written()

    def _changed(self) -> None:
        for tell in self.on_change:
            tell()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Make room for another number of units, a row order, a selection that has settled."""
        active, values = state_dict.get(f"{prefix}active"), state_dict.get(f"{prefix}values")
        if isinstance(active, Tensor) and active.dim() == 1 and len(active) != len(self.active):
            self.active = self.active.new_zeros(len(active))
        if isinstance(values, Tensor) and self.storage == "packed":
            shape = (len(self.active), self.geometry.unit_size)
            if values.shape == shape and values.shape != self.values.shape:
                needs = self.values.requires_grad
                self.values = nn.Parameter(self.values.new_empty(shape), requires_grad=needs)
        order = state_dict.get(f"{prefix}row_order")
        if (order is None) != (self.row_order is None):
            rows = torch.arange(self.shape[0], device=self.active.device)
            self.row_order = None if order is None else rows
        if self.selection is not None and f"{prefix}selection.units" not in state_dict:
            self.selection = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        rows, columns = self.geometry.shape
        return f"{rows}x{columns}, density={self.topology().density:.4f}, storage={self.storage}"


def _checksum(active: Tensor) -> Tensor:
    """Of a set of units, a scalar; other sets have another one, but for bad luck."""
    return active.long().square_().sum()


def _check_loaded(weight: nn.Module, _: object) -> None:
    """After a checkpoint is loaded: check its topology, and tell whoever derives from it."""
    assert isinstance(weight, SparseWeight)
    weight._forget()
    try:
        plan(weight, Change(weight.topology().active, row_order=weight.row_order))
        weight.geometry = weight.geometry.with_row_order(weight.row_order)
        if weight.storage == "packed" and len(weight.values) != len(weight.active):
            raise ValueError(f"{len(weight.active)} of them for {len(weight.values)} values")
        if weight.storage == "masked":
            entries = weight.entries()
            inside = scatter_entries(torch.ones_like(entries), entries, weight.shape)
            if bool(weight.values.detach()[inside == 0].any()):
                raise ValueError("other values are not zero")
        selection = weight.selection
        if selection is not None and not torch.equal(selection.units, weight.active.long()):
            raise ValueError("others are chosen among")
    except ValueError as error:
        raise UserError(
            f"checkpoint: its active units do not fit this structure ({error}); "
            "use the configuration the checkpoint was made with"
        ) from error
    weight._changed()
