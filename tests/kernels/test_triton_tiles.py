"""What only launchers of Triton kernels can be asked for, against dense float64.

Interpreted where there is no GPU.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernel_cases import DEVICE, activation, dtypes_of, relative_error
from padst_kernels.tiles import kernels


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


def assert_close(value: Tensor, expected: Tensor, about: object = "") -> None:
    error = relative_error(value.cpu(), expected)
    assert error < 1e-5, (about, error)


def gradient_index(case: Case, in_features: int) -> tuple[Tensor, Tensor, int]:
    """What `launch_input_gradient` reads to find the slots of each input."""
    flat = case.columns.flatten().cpu()
    counts = torch.bincount(flat, minlength=in_features).cumsum(0)
    pointer = torch.cat([torch.zeros(1), counts])
    return int32(pointer), int32(flat.argsort(stable=True)), in_features


CASES = {
    # height, width, tiles of each row group, inputs, outputs
    "nm16": (16, 40, [1, 1, 1], 60, 41),
    "nm64": (64, 7, [1, 1], 33, 100),
    "nm8_wide": (8, 77, [1, 1, 1], 80, 24),
    "uneven": (16, 7, [2, 0, 3], 40, 48),
    "tall": (144, 16, [1], 20, 130),
}


@pytest.mark.parametrize("name", CASES)
def test_product_and_weight_gradient_of_any_shape(name: str) -> None:
    for permuted, num_tokens in ((False, 1), (True, 70)):
        case = make_case(*CASES[name], permuted=permuted)
        out_features, in_features = case.dense.shape
        height = case.weight.shape[2]
        x, dy = activation(in_features, num_tokens), activation(out_features, num_tokens, permuted)
        y = kernels.launch_product(
            x, case.weight, case.columns, case.row_pointer, out_features, rows=case.rows
        )
        assert_close(y, case.dense @ x.double().cpu(), (permuted, num_tokens))
        if case.rows is None:
            continue
        dense = dy.double().cpu() @ x.double().cpu().T
        dense = torch.cat([dense, dense.new_zeros(1, in_features)])  # padding rows
        rows = case.rows.view(-1, height)[case.owner].long().cpu()
        expected = dense[rows[:, None, :], case.columns.long().cpu()[:, :, None]]
        for splits in (1, 3):
            dweight = kernels.launch_weight_gradient(
                x, dy, case.columns, case.row_pointer, case.rows, height, splits=splits
            )
            assert_close(dweight, expected, splits)


@pytest.mark.parametrize(("size", "feature_major"), [(8, True), (16, False), (32, True)])
def test_transposed_product_is_the_input_gradient_of_blocks(size: int, feature_major: bool) -> None:
    in_blocks, counts = 5, [2, 0, 4]
    in_features, out_features = in_blocks * size, 3 * size - 3
    case = make_case(size, size, counts, in_features, out_features, blocks=True)
    case.weight.nan_to_num_(nan=7.0)  # padding is finite
    assert case.rows is not None
    # Tiles by block of inputs: the transposed weight's row groups.
    block = case.columns[:, 0].cpu() // size
    order = block.argsort(stable=True)
    pointer = torch.cat([torch.zeros(1), torch.bincount(block, minlength=in_blocks).cumsum(0)])
    owner = torch.tensor(case.owner)[order]
    perm = torch.randperm(in_features)  # an input permutation, folded into the stores
    dy = activation(out_features, 33, feature_major)
    dx = kernels.launch_product(
        dy,
        case.weight,
        case.rows.view(-1, size)[owner.to(DEVICE)],
        int32(pointer),
        in_features,
        rows=int32(perm),
        order=int32(order),
        transposed=True,
        feature_major=feature_major,
    )
    expected = torch.empty(in_features, 33, dtype=torch.float64)
    expected[perm] = case.dense.T @ dy.double().cpu()
    assert_close(dx, expected)


@pytest.mark.parametrize("name", ["nm16", "nm64", "nm8_wide", "tall"])
def test_input_gradient_by_slots(name: str) -> None:
    case = make_case(*CASES[name])
    case.weight.nan_to_num_(nan=7.0)  # padding is finite
    assert case.rows is not None
    out_features, in_features = case.dense.shape
    # A workspace for 128 tokens: two chunks.
    for num_tokens, feature_major in ((1, False), (133, True)):
        dy = activation(out_features, num_tokens, feature_major)
        dx = kernels.launch_input_gradient(
            dy,
            case.weight,
            case.rows.view(len(case.weight), -1),
            *gradient_index(case, in_features),
            feature_major=feature_major,
            workspace=1,
        )
        assert_close(dx, case.dense.T @ dy.double().cpu(), num_tokens)


def test_input_gradient_reads_natural_rows_in_runs() -> None:
    case = make_case(*CASES["nm16"], permuted=False)
    case.weight.nan_to_num_(nan=7.0)
    rows = torch.arange(48, device=DEVICE, dtype=torch.int32).clamp(max=41).view(3, 16)
    for feature_major in (True, False):
        dy = activation(41, 33, feature_major)
        dx = kernels.launch_input_gradient(
            dy, case.weight, rows, *gradient_index(case, 60), run=16, feature_major=feature_major
        )
        assert_close(dx, case.dense.T @ dy.double().cpu())


@pytest.mark.parametrize("feature_major", [True, False])
def test_runs_of_columns_equal_columns(feature_major: bool) -> None:
    case = make_case(16, 16, [2, 0, 3], 70, 48, blocks=True)
    x = activation(70, 33, feature_major)
    dy = activation(48, 33, feature_major)
    y = kernels.launch_product(
        x, case.weight, case.columns, case.row_pointer, 48, rows=case.rows, run=16
    )
    assert_close(y, case.dense @ x.double().cpu())
    one, many = (
        kernels.launch_weight_gradient(
            x, dy, case.columns, case.row_pointer, case.rows, 16, run=run
        )
        for run in (1, 16)
    )
    assert torch.equal(one, many)


def test_weight_gradient_of_tiles_in_another_order() -> None:
    case = make_case(16, 7, [2, 0, 3], 40, 48)
    x, dy = activation(40, 33), activation(48, 33)
    order = torch.randperm(5)
    arguments = x, dy, case.columns, case.row_pointer, case.rows, 16
    plain = kernels.launch_weight_gradient(*arguments)
    ordered = kernels.launch_weight_gradient(*arguments, order=int32(order))
    assert torch.equal(ordered[order], plain)


def test_no_tokens() -> None:
    case = make_case(*CASES["nm16"])
    x, dy = activation(60, 0), activation(41, 0)
    y = kernels.launch_product(x, case.weight, case.columns, None, 41, rows=case.rows)
    assert y.shape == (41, 0)
    dweight = kernels.launch_weight_gradient(x, dy, case.columns, None, case.rows, 16)
    assert (dweight == 0).all()


def test_several_row_blocks_in_a_program() -> None:
    case = make_case(16, 7, [2, 0, 3, 1, 1, 1], 40, 90)
    x = activation(40, 33)
    arguments = case.weight, case.columns, case.row_pointer, case.out_features
    for row_blocks in (3, 4):
        launch = kernels.LaunchShape(
            tokens=16, columns=16, warps=4, stages=2, row_blocks=row_blocks
        )
        y = kernels.launch_product(x, *arguments, rows=case.rows, launch=launch)
        assert_close(y, case.dense @ x.double().cpu())


def test_columns_out_of_range_read_zero() -> None:
    case = make_case(16, 8, [1, 1], 20, 32)
    case.columns[:, 5] = 20
    x, dy = activation(20, 5), activation(32, 5)
    y = kernels.launch_product(x, case.weight, case.columns, None, 32, rows=case.rows)
    weight = case.weight.clone()
    weight[:, 5] = 0
    expected = kernels.launch_product(
        x, weight, case.columns.clamp(max=19), None, 32, rows=case.rows
    )
    assert torch.equal(y, expected)
    dweight = kernels.launch_weight_gradient(x, dy, case.columns, None, case.rows, 16)
    assert (dweight[:, 5] == 0).all()
    assert dweight.isfinite().all()


def test_low_precision_is_as_good_as_that_of_torch() -> None:
    case = make_case(16, 40, [1, 1, 1], 60, 48, permuted=False)
    rows = torch.arange(48, device=DEVICE, dtype=torch.int32).view(3, 16)
    groups, columns = torch.arange(48).view(3, 1, 16), case.columns.long().cpu()[:, :, None]
    for dtype in dtypes_of("triton")[2:]:
        weight, dense = case.weight.to(dtype), case.dense.to(DEVICE, dtype)
        x, dy = activation(60, 33, dtype=dtype), activation(48, 33, dtype=dtype)
        dx = kernels.launch_input_gradient(dy, weight, rows, *gradient_index(case, 60))
        dweight = kernels.launch_weight_gradient(x, dy, case.columns, None, None, 16, splits=2)
        pairs = [
            (kernels.launch_product(x, weight, case.columns, None, 48), dense, x),
            (dx, dense.T, dy),
            (dweight, dy, x.T),
        ]
        for value, left, right in pairs:
            truth, of_torch = left.double() @ right.double(), (left @ right).double()
            if value is dweight:
                truth, of_torch = truth[groups, columns], of_torch[groups, columns]
            assert (value.double() - truth).norm() <= 2 * (of_torch - truth).norm()


def test_unaligned_feature_major_is_refused() -> None:
    case = make_case(16, 8, [1, 1], 20, 32)
    for x in (
        torch.randn(20, 197, device=DEVICE),
        torch.randn(20, 32, device=DEVICE)[:, 1:20],
        torch.randn(20, 64, device=DEVICE)[:, ::2],
    ):
        with pytest.raises(ValueError, match="x: feature-major rows must start on multiples of 16"):
            kernels.launch_product(x, case.weight, case.columns, None, 32)


# The interpreter knows no other order.
@pytest.mark.gpu
def test_results_are_the_same_every_time() -> None:
    case = make_case(*CASES["nm16"])
    x, dy = activation(60, 197), activation(41, 197)
    first, second = (
        kernels.launch_weight_gradient(x, dy, case.columns, None, case.rows, 16, splits=3)
        for _ in range(2)
    )
    assert torch.equal(first, second)
