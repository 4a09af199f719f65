import copy
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch import distributed, nn, randn
from torch.optim.swa_utils import AveragedModel

from dst_cases import rigl
from layers.layer_cases import LIVES, Life, linear, sparse_layer
from layers.reference import assert_close, expected, run
from padst_exp.dst import Change
from padst_exp.errors import UserError
from padst_exp.layers import SparseLinear, SparseWeight, sparse_weights
from padst_exp.structures import NM, Block, Diagonal, Structure, Unstructured, random_units
from permutation_cases import learned
from structure_cases import STRUCTURES, shapes

CPU = torch.device("cpu")


def variants(structure: Structure, shape: tuple[int, int]) -> Iterator[tuple[str, SparseLinear]]:
    """Layers of one structure: every life, alone and fused, packed and masked, with extras."""
    for number, life in enumerate(LIVES):
        for split, storage in ((1, "packed"), (3, "packed"), (1 + 2 * (number % 2), "masked")):
            layer = sparse_layer(
                linear(shape, split),
                structure,
                life=life,
                storage=storage,
                split=split,
                low_rank=2 if split == 3 and life in ("soft", "none") else 0,
                selected=split == 1 and life in ("soft", "random"),
            )
            yield f"{shape} {life} split={split} {storage}", layer


def every_backend(layer: SparseLinear) -> Iterator[str]:
    """Have each backend compute the layer in turn."""
    for backend in layer.backends(CPU):
        layer.use_backend(backend)
        yield backend


def check(layer: SparseLinear, tokens: tuple[int, ...], where: str) -> None:
    """The layer is what its definition says, by every backend."""
    x, dy = torch.randn(*tokens, layer.in_features), torch.randn(*tokens, layer.out_features)
    wanted = expected(layer, x, dy)
    for backend in every_backend(layer):
        assert_close(run(layer, x, dy), wanted, f"{where} {backend}")
    # Parents that read the weight instead of calling the layer compute the same.
    weight = layer.weight
    y = nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(y.double(), wanted["y"], atol=2e-4, rtol=1e-4)


def of_kind(tiled: bool) -> list[str]:
    """The structures whose units multiply as tiles, or entry by entry."""
    return [
        n for n, s in STRUCTURES.items() if (s.geometry(64, 64, 0.25).tiling() is None) != tiled
    ]


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "entries"])
def test_every_backend_equals_the_dense_reference_in_all_gradients(tiled: bool) -> None:
    for name in of_kind(tiled):
        for number, shape in enumerate(shapes(name)):
            # Each in three or two of the shapes.
            for where, layer in islice(variants(STRUCTURES[name], shape), number % 2, None, 2):
                check(layer, [(5,), (2, 9), (50,)][number % 3], f"{name} {where}")


def other_counts(weight: SparseWeight) -> Change:
    """Units drawn anew: as many as before in all, but not in each pool; some pools are empty."""
    geometry, topology = weight.geometry, weight.topology()
    counts = torch.zeros_like(geometry.candidates)
    left = len(topology.active)
    for pool in range(len(counts) - 1, -1, -1):
        counts[pool] = min(left, int(geometry.candidates[pool]))
        left -= int(counts[pool])
    return Change(random_units(geometry, counts, torch.Generator().manual_seed(3)))


def fewer(weight: SparseWeight) -> Change:
    return Change(weight.active.long()[:: 2 if len(weight.active) > 2 else 1])


def more(weight: SparseWeight) -> Change:
    grown = weight.geometry.unit_ids()[::3]
    return Change(torch.cat([weight.active.long(), grown]).unique())


def reordered(weight: SparseWeight) -> Change:
    order = torch.randperm(weight.shape[0], generator=torch.Generator().manual_seed(4))
    return Change(weight.active.long(), row_order=order)


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "entries"])
def test_every_backend_follows_every_kind_of_change(tiled: bool) -> None:
    """Q, K and V: rewired, other counts per pool, fewer and more entries, rows in another order."""
    for name in of_kind(tiled):
        for shape, life, storage in zip(
            shapes(name)[1:4],
            ("random", "soft", "soft"),
            ("packed", "masked", "packed"),
            strict=False,
        ):
            layer = sparse_layer(
                linear(shape, 3), STRUCTURES[name], life=life, storage=storage, split=3
            )
            for change in (other_counts, fewer, reordered, more, other_counts):
                for weight in layer.parts():
                    weight.adopt(change(weight))
                    torch.nn.init.normal_(weight.values)
                    if storage == "masked":
                        weight.values.data.mul_(weight.matrix() != 0)
                check(layer, (7,), f"{name} {shape} {life} {storage} {change.__name__}")
            for weight in layer.parts():  # the last run collected dense gradients
                generator = torch.Generator().manual_seed(1)
                weight.adopt(weight.decide(rigl(), step=1, total=10, generator=generator))
            check(layer, (7,), f"{name} {shape} {life} {storage} rewired")


def test_weights_of_unequal_shapes_and_structures_share_a_layer() -> None:
    parts: list[tuple[Structure, int]] = [
        (NM(n=1, m=None, group=16), 40),
        (NM(n=1, m=None, group=16), 64),
        (Block(size=16, balanced=False), 24),
        (Unstructured(), 5),
        (Diagonal(bundle=1, stride=1, width=1), 30),
    ]
    for life in LIVES:
        weights, outputs = [], []
        for structure, rows in parts:
            generator = torch.Generator().manual_seed(rows)
            geometry = structure.geometry(rows, 48, 0.3)
            counts = structure.initial_counts(geometry, 0.3)
            active = random_units(geometry, counts, generator)
            weights.append(SparseWeight(geometry, active, torch.randn(rows, 48), "packed"))
            outputs.append(permutation(rows, life))
        rows = sum(rows for _, rows in parts)
        layer = SparseLinear(weights, torch.randn(rows), permutation(48, life), outputs)
        assert layer.out_features == rows
        check(layer, (6,), f"mixed {life}")


def permutation(size: int, life: Life) -> object:
    generator = torch.Generator().manual_seed(size)
    if life == "none":
        return None
    made = learned().create(size, generator)
    assert made is not None
    if life != "soft":
        made.harden()
    return made


def test_the_output_has_the_dtype_of_the_input_or_of_autocast() -> None:
    for name in STRUCTURES:
        for life in LIVES:
            layer = sparse_layer(linear((64, 64)), STRUCTURES[name], life=life, low_rank=2)
            x = torch.randn(4, 64)
            for backend in every_backend(layer):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    y = layer(x)
                y.float().sum().backward()
                assert y.dtype == torch.bfloat16, (name, life, backend)
                error = (y.float() - layer(x)).norm() / layer(x).norm()
                assert error < 0.03, (name, life, backend)
            assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
            assert layer.double()(x.double()).dtype == torch.float64


def test_the_dense_gradient_sums_over_micro_batches_in_float32_under_bfloat16() -> None:
    layer = sparse_layer(linear((64, 96)), STRUCTURES["nm-16"])
    (weight,) = layer.parts()
    weight.collect_dense_gradient = True
    x, dy = torch.randn(8, 96), torch.randn(8, 64)
    for part in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x[part * 4 : part * 4 + 4])
        y.backward(dy[part * 4 : part * 4 + 4].bfloat16())
    assert weight.dense_gradient is not None and weight.dense_gradient.dtype == torch.float32
    wanted = dy.bfloat16().float().T @ x.bfloat16().float()
    torch.testing.assert_close(weight.dense_gradient, wanted, atol=1e-4, rtol=1e-4)


def test_no_dense_gradient_unless_asked_for() -> None:
    layer = sparse_layer(linear((64, 64)), STRUCTURES["block-8"])
    layer(torch.randn(3, 64)).sum().backward()
    with torch.no_grad():
        layer.parts()[0].collect_dense_gradient = True
        layer(torch.randn(3, 64))
    assert layer.parts()[0].dense_gradient is None


def test_a_state_restores_topologies_sizes_row_orders_and_hard_permutations() -> None:
    changes = (other_counts, fewer, more, reordered)
    for number, name in enumerate(STRUCTURES):
        for storage in ("packed", "masked"):
            for change in changes[number % 2 :: 2]:
                source = sparse_layer(
                    linear((64, 96)), STRUCTURES[name], life="hardened", storage=storage
                )
                source.parts()[0].adopt(change(source.parts()[0]))
                fresh = sparse_layer(
                    linear((64, 96)), STRUCTURES[name], life="soft", storage=storage
                )
                fresh.load_state_dict(copy.deepcopy(source.state_dict()))
                x = torch.randn(5, 96)
                torch.testing.assert_close(fresh(x), source(x))
                # And back to where no row is moved, nor any entry missing.
                plain = sparse_layer(
                    linear((64, 96)), STRUCTURES[name], life="hardened", storage=storage
                )
                fresh.load_state_dict(plain.state_dict())
                torch.testing.assert_close(fresh(x), plain(x))


def test_a_state_restores_soft_choices_and_settled_selections() -> None:
    for name in STRUCTURES:
        source, fresh, settled = (
            sparse_layer(linear((64, 96)), STRUCTURES[name], life="soft", selected=True)
            for _ in range(3)
        )
        selection = source.parts()[0].selection
        assert selection is not None and selection.logits is not None
        nn.init.normal_(selection.logits)
        selection.temperature.fill_(0.5)
        fresh.load_state_dict(copy.deepcopy(source.state_dict()))
        x = torch.randn(5, 96)
        torch.testing.assert_close(fresh(x), source(x))
        selection.harden()
        change = source.parts()[0].settle()
        assert change is not None
        source.parts()[0].adopt(change)
        settled.load_state_dict(source.state_dict())
        assert settled.parts()[0].selection is None
        torch.testing.assert_close(settled(x), source(x))


def test_a_foreign_topology_is_refused_on_loading() -> None:
    layer = sparse_layer(linear((64, 96)), STRUCTURES["nm-16"])
    good = layer.state_dict()["weights.0.active"].clone()
    for active in (good.flip(0), good + 10**6, good - 10**6):
        state = copy.deepcopy(layer.state_dict()) | {"weights.0.active": active}
        with pytest.raises(UserError, match=r"^checkpoint: [^\n]*$"):
            layer.load_state_dict(state)
    layer.load_state_dict(copy.deepcopy(layer.state_dict()) | {"weights.0.active": good})


def test_a_permutation_that_a_stranger_writes_is_refused_before_it_computes() -> None:
    for name in ("nm-16", "diag", "unstructured"):
        for life in ("random", "hardened", "soft"):
            layer, x = sparse_layer(linear((64, 48)), STRUCTURES[name], life=life), randn(3, 48)
            for side, permutation in layer.permutations().items():
                where = f"{name} {life} {side}"
                y = layer(x)
                permutation.index.copy_(permutation.index.clone())  # as a broadcast does
                assert torch.equal(layer(x), y), where
                for own in (layer, copy.deepcopy(layer)):
                    permutation = own.permutations()[side]
                    before = permutation.index.clone()
                    permutation.index.copy_(torch.randperm(permutation.size))
                    for read, given in (("__call__", [x]), ("_matrix", []), ("index", [])):
                        with pytest.raises(UserError, match=r"^permutation: its index was overw"):
                            getattr(own, read)(*given)
                    permutation.index.copy_(before)
                    assert torch.equal(own(x), y), where


def test_a_foreign_permutation_that_is_loaded_multiplies() -> None:
    for name in ("nm-16", "diag", "unstructured"):
        layer, x = sparse_layer(linear((64, 48)), STRUCTURES[name], life="random"), randn(3, 48)
        averaged = AveragedModel(layer)
        averaged.update_parameters(layer)
        torch.testing.assert_close(averaged(x), layer(x))
        (weight,) = layer.parts()
        inputs, outputs = torch.randperm(48), torch.randperm(64)
        foreign = {"input_permutation.index": inputs, "output_permutations.0.index": outputs}
        layer.load_state_dict(foreign, strict=False)
        wanted = (x[:, inputs] @ weight.matrix().T)[:, outputs] + layer.bias
        for _ in every_backend(layer):
            torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-4, msg=name)
        layer.use_backend("native")
        # Averaged now, values of one permutation would stand under another.
        averaged.update_parameters(layer)
        averaged.update_parameters(layer)
        with pytest.raises(UserError, match="overwritten in place"):
            averaged(x)


def test_packed_storage_shrinks_with_density() -> None:
    layer = sparse_layer(linear((64, 96)), STRUCTURES["nm-16"])
    assert sparse_weights(layer)["weights.0"].values.numel() == 64 * 96 // 4
    masked = sparse_layer(linear((64, 96)), STRUCTURES["nm-16"], storage="masked")
    assert sparse_weights(masked)["weights.0"].values.numel() == 64 * 96


def test_a_layer_trains_under_ddp_with_its_defaults() -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for name in ("unstructured", "nm-1", "nm-16", "diag"):
            layer, x = sparse_layer(linear((67, 41)), STRUCTURES[name]), torch.randn(3, 41)
            replica = nn.parallel.DistributedDataParallel(nn.Sequential(layer))
            for _ in range(2):  # every pass broadcasts the buffers
                y = replica(x)
                y.sum().backward()
                assert torch.equal(y, layer(x)), name
            (weight,) = layer.parts()
            units = random_units(weight.geometry, weight.topology().counts(), torch.Generator())
            weight.adopt(Change(units))  # other units of the same number, in the same tensors
            wanted = nn.functional.linear(x, layer.weight, layer.bias)
            torch.testing.assert_close(replica(x), wanted, atol=1e-5, rtol=1e-4, msg=name)
    finally:
        distributed.destroy_process_group()
