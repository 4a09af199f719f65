"""What becomes of values, and of all that is shaped like them, when a topology changes."""

import copy
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dst_cases import rigl
from layers.layer_cases import linear, sparse_layer
from layers.reference import run
from padst_exp.dst import Algorithm, Change, Signals, Topology
from padst_exp.errors import UserError
from padst_exp.layers import SparseLinear, SparseWeight, sparse_weights
from padst_exp.structures import random_units
from structure_cases import STRUCTURES, shapes


def weights() -> Iterator[tuple[str, SparseLinear, SparseWeight]]:
    """A weight of every structure, shape and storage, in its layer, with a dense gradient."""
    for name in STRUCTURES:
        for shape in shapes(name)[2:4]:
            for storage in ("packed", "masked"):
                layer = sparse_layer(linear(shape), STRUCTURES[name], storage=storage)
                x, dy = torch.randn(5, shape[1]), torch.randn(5, shape[0])
                run(layer, x, dy)
                (weight,) = layer.parts()
                yield f"{name} {shape} {storage}", layer, weight


def decided(weight: SparseWeight) -> Change:
    return weight.decide(rigl(), step=1, total=10, generator=torch.Generator().manual_seed(1))


def drawn(weight: SparseWeight, share: float) -> Change:
    """Units drawn anew, `share` of those that exist."""
    counts = (weight.geometry.candidates * share).ceil().long()
    return Change(random_units(weight.geometry, counts, torch.Generator().manual_seed(2)))


def reordered(weight: SparseWeight) -> Change:
    """Half of the units, and all rows elsewhere."""
    order = torch.randperm(weight.shape[0], generator=torch.Generator().manual_seed(3))
    return Change(weight.active.long()[::2], row_order=order)


def active_mask(weight: SparseWeight) -> Tensor:
    """Bool `[O * I]`."""
    mask = torch.zeros(weight.shape[0] * weight.shape[1] + 1, dtype=torch.bool)
    mask[weight.entries().flatten()] = True
    return mask[:-1]


def as_dense(weight: SparseWeight, tensor: Tensor) -> Tensor:
    """What is shaped like the values, at its places in the weight: `[O * I]`."""
    if weight.storage == "masked":
        return tensor.flatten().clone()
    flat = torch.zeros(weight.shape[0] * weight.shape[1] + 1)
    entries = weight.entries()
    flat[entries.flatten()] = tensor.expand(entries.shape).flatten()
    return flat[:-1]


def test_what_is_active_before_and_after_keeps_its_value_and_all_else_is_zero() -> None:
    changes = {
        "rewired": decided,
        "fewer": lambda weight: drawn(weight, 0.1),
        "more": lambda weight: drawn(weight, 0.6),
        "reordered": reordered,
    }
    for where, _, fresh in weights():
        for kind, make in changes.items():
            weight = copy.deepcopy(fresh)
            moments = torch.rand_like(weight.values)
            if weight.storage == "masked":
                moments = moments * weight.matrix().ne(0)
            before, old = active_mask(weight), as_dense(weight, moments)
            values, parameter = weight.matrix().detach().flatten(), weight.values
            move = weight.adopt(make(weight))
            after, where_now = active_mask(weight), f"{where} {kind}"
            moved, births = move(moments), move(torch.zeros_like(moments), fill=7.0)
            assert torch.equal(weight.matrix().detach().flatten(), values * (before & after))
            assert torch.equal(as_dense(weight, moved), old * (before & after)), where_now
            assert torch.equal(as_dense(weight, births)[after], 7.0 * (~before)[after].float()), (
                where_now
            )
            assert moved.shape == weight.values.shape
            # A new Parameter where the number of entries changed, and only there.
            same = weight.values is parameter
            assert same == (parameter.shape == weight.values.shape), where_now
            assert (move.old is parameter) and (move.new is weight.values)
            assert move.num_grown == grown(weight, before), where_now


def grown(weight: SparseWeight, before: Tensor) -> int:
    """Active units with at least one entry that was not active before."""
    outside = torch.cat([before, torch.tensor([True])])
    return int((~outside[weight.entries()]).any(1).sum())


def test_an_explicit_source_moves_units_and_single_entries_anywhere() -> None:
    for where, _, fresh in weights():
        old = fresh.packed()
        units, size = old.shape
        chosen = drawn(fresh, 0.3).active
        by_unit = torch.arange(len(chosen)) % (units + 1) - 1
        by_entry = torch.arange(len(chosen) * size).view(-1, size) % (units * size + 1) - 1
        for source in (by_unit, by_entry):
            weight = copy.deepcopy(fresh)
            weight.adopt(Change(chosen, source))
            rows = old[source.clamp(min=0)] if source.dim() == 1 else old.flatten()[source]
            grown = (source < 0).view(len(chosen), -1)
            wanted = rows.masked_fill(grown, 0)
            # Frames that reach over the edge stay empty there.
            inside = weight.entries() < weight.shape[0] * weight.shape[1]
            assert torch.equal(weight.packed(), wanted * inside), where


def test_a_topology_is_derived_once_until_anybody_writes_to_it() -> None:
    for name, _, weight in weights():
        known = weight.topology()
        assert (weight.topology() is known) == (weight.geometry.unit_size >= 8), name
        copied = copy.deepcopy(weight)
        change = drawn(weight, 0.5)
        weight.adopt(change)
        assert torch.equal(weight.topology().active, change.active), name
        assert torch.equal(copied.topology().active, known.active), name
        assert copied.topology().active is not known.active


def test_units_that_a_stranger_writes_in_place_are_refused_before_they_compute() -> None:
    for name, layer, weight in weights():
        model = nn.Sequential(layer, nn.Linear(weight.shape[0], 4))
        averaged = AveragedModel(model)
        averaged.update_parameters(model)
        x = torch.randn(3, weight.shape[1])
        torch.testing.assert_close(averaged(x), model(x))  # the same units, written again
        change = decided(weight)
        if torch.equal(change.active, weight.topology().active):
            continue
        weight.adopt(change)
        averaged.update_parameters(model)
        with pytest.raises(UserError, match=r"overwritten in place[^\n]*load_state_dict"):
            averaged(x)
        copied = copy.deepcopy(model)
        weight.adopt(reordered(weight))
        if weight.row_order is not None and len(weight.row_order) > 1:
            written = copy.deepcopy(model)
            written.load_state_dict(model.state_dict())
            (order,) = (weight.row_order for weight in sparse_weights(written).values())
            assert order is not None
            order.copy_(order.roll(1))
            with pytest.raises(UserError, match="overwritten in place"):
                written(x)
        copied.load_state_dict(model.state_dict())
        torch.testing.assert_close(copied(x), model(x), msg=name)


def test_units_carry_one_number_each_along() -> None:
    for where, _, weight in weights():
        births = torch.arange(len(weight.active)) + 100
        before = dict(zip(weight.active.tolist(), births.tolist(), strict=True))
        move = weight.adopt(drawn(weight, 0.5))
        wanted = [before.get(unit, 7) for unit in weight.active.tolist()]
        assert move.units(births, fill=7).tolist() == wanted, where


def test_a_change_back_and_forth_through_a_row_order_is_the_identity() -> None:
    for where, _, weight in weights():
        weight.adopt(Change(weight.geometry.unit_ids()))
        if weight.topology().num_entries < weight.topology().size:
            continue  # in another order the entries of a fixed pattern are other ones
        values = weight.matrix().detach()
        order = torch.randperm(weight.shape[0])
        for turn in (order, torch.arange(weight.shape[0])):
            move = weight.adopt(Change(weight.active.long(), row_order=turn))
            assert move.num_grown == 0, where
            assert torch.equal(weight.matrix().detach(), values), where


def test_an_illegal_change_is_refused_and_nothing_has_happened() -> None:
    for where, layer, weight in weights():
        active, units = weight.active.long(), len(weight.active)
        size, rows = weight.geometry.unit_size, weight.shape[0]
        last = weight.geometry.num_pools * weight.geometry.pool_size
        cases = {
            "active units are (0,)": Change(active[:0]),
            "not sorted": Change(active.flip(0)),
            "not distinct": Change(torch.cat([active[:1], active])),
            f"no unit {last}": Change(torch.cat([active, torch.tensor([last])])),
            "no unit -1": Change(torch.cat([torch.tensor([-1]), active])),
            "expected one list of ids": Change(active[None]),
            "expected one list": Change(active.float()),
            "source is (1,)": Change(active, torch.tensor([0])),
            f"source is ({units}, {size + 1})": Change(active, torch.zeros(units, size + 1).long()),
            f"beyond the {units} old places": Change(active, torch.arange(units) + 1),
            f"beyond the {units * size} old": Change(active, torch.full((units, size), -2)),
            f"no permutation of {rows} rows": Change(active, row_order=torch.arange(rows + 1)),
            "row_order is no permutation": Change(active, row_order=torch.zeros(rows).long()),
        }
        if units == 1:
            del cases["not sorted"], cases["source is (1,)"]
        if size == 1:
            del cases[f"beyond the {units * size} old"]
        told: list[bool] = []
        weight.on_change.append(partial(told.append, True))
        before, state = weight.values, copy.deepcopy(layer.state_dict())
        for message, change in cases.items():
            with pytest.raises(ValueError) as error:
                weight.adopt(change)
            assert message in str(error.value), (where, message, str(error.value))
            assert weight.values is before and weight.row_order is None and not told
            for name, tensor in layer.state_dict().items():
                assert torch.equal(tensor, state[name]), (where, message, name)


def test_a_hole_between_pools_is_no_unit() -> None:
    layer = sparse_layer(linear((41, 67)), STRUCTURES["block-8"])
    (weight,) = layer.parts()
    geometry = weight.geometry
    assert bool((geometry.candidates < geometry.pool_size).any())
    exists = set(geometry.unit_ids().tolist())
    holes = [u for u in range(geometry.num_pools * geometry.pool_size) if u not in exists]
    with pytest.raises(ValueError, match=f"there is no unit {holes[0]}$"):
        weight.adopt(Change(torch.tensor([*range(3), holes[0]])))


class Asks(Algorithm):
    """Keeps what it was shown."""

    def __init__(self, *needs: str) -> None:
        self.needs = frozenset(needs)  # type: ignore[arg-type]

    def is_due(self, step: int, total: int) -> bool:
        return True

    def decide(
        self, topology: Topology, signals: Signals, *, step: int, total: int, carry: float
    ) -> tuple[Change, float]:
        self.topology, self.signals = topology, signals
        return Change(topology.active), carry + 0.25


def test_an_algorithm_sees_what_it_names_and_nothing_else() -> None:
    for where, _, weight in weights():
        gradient = weight.values.grad
        assert gradient is not None
        weight.weight_gradient = gradient.clone()
        birth = torch.arange(len(weight.active))
        every = ("dense_gradient", "weight_gradient", "coordinates", "age")
        for needs in ((), *((need,) for need in every), every):
            asks = Asks(*needs)
            weight.decide(
                asks, step=100, total=200, generator=torch.Generator(),
                birth=birth if "age" in needs else None,
            )  # fmt: skip
            shown = {need for need in every if getattr(asks.signals, need) is not None}
            assert shown == set(needs), where
        topology, signals, units = asks.topology, asks.signals, weight.active.long()
        dense = weight.matrix().detach()
        table = weight.geometry.unit_rms(dense).flatten()
        torch.testing.assert_close(signals.magnitude, table[units])
        assert weight.dense_gradient is not None and signals.dense_gradient is not None
        wanted = weight.geometry.unit_rms(weight.dense_gradient)
        assert torch.equal(signals.dense_gradient, wanted), where
        # Both gradients are of the same loss.
        torch.testing.assert_close(
            signals.weight_gradient, wanted.flatten()[units], atol=1e-5, rtol=1e-4
        )
        assert signals.age is not None and torch.equal(signals.age, 100 - birth)
        assert signals.coordinates is not None
        rows, columns = signals.coordinates[units].T
        assert torch.equal(rows * weight.shape[1] + columns, weight.entries()[:, 0]), where
        assert float(weight.carry) == 0.25 * 6
        assert topology.num_entries == int(active_mask(weight).sum())
        assert topology.density == topology.num_entries / dense.numel()


def test_a_layer_that_reads_a_changed_weight_is_stale_until_it_is_indexed() -> None:
    layer = sparse_layer(linear((64, 64), 3), STRUCTURES["nm-16"], split=3)
    x = torch.randn(3, 64)
    assert not layer.stale
    weight = layer.parts()[1]
    assert weight.adopt(drawn(weight, 0.5)).num_grown > 0 and layer.stale
    y = layer(x)
    assert not layer.stale
    torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.weight, layer.bias))
