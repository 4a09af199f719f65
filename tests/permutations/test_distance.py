import pytest
import torch

from padst_exp.permutations import partition_distance, shift_distance

BLOCKS = torch.arange(12) // 4


def test_identity_is_at_distance_zero() -> None:
    assert partition_distance(torch.arange(12), BLOCKS) == 0
    assert shift_distance(torch.arange(12)) == 0


def test_permuting_blocks_and_inputs_within_blocks_is_a_symmetry() -> None:
    index = torch.cat([8 + torch.randperm(4), torch.randperm(4), 4 + torch.randperm(4)])
    assert partition_distance(index, BLOCKS) == 0


def test_inputs_that_change_block_count() -> None:
    index = torch.arange(12)
    index[[0, 4]] = index[[4, 0]]
    assert partition_distance(index, BLOCKS) == pytest.approx(2 / 12)


def test_spreading_every_block_over_all_blocks_is_as_far_as_possible() -> None:
    spread = torch.arange(9).view(3, 3).T.flatten()
    assert partition_distance(spread, torch.arange(9) // 3) == pytest.approx(2 / 3)


def test_classes_of_unequal_size_cannot_be_swapped() -> None:
    labels = torch.tensor([5, 5, 5, 7])
    assert partition_distance(torch.tensor([3, 1, 2, 0]), labels) == pytest.approx(2 / 4)


def test_interchangeable_inputs_make_every_permutation_the_identity() -> None:
    assert partition_distance(torch.randperm(12), torch.zeros(12, dtype=torch.int64)) == 0


def test_cyclic_shifts_are_symmetries_of_diagonals() -> None:
    assert shift_distance(torch.arange(12).roll(5)) == 0
    index = torch.arange(12).roll(5)
    index[[0, 1]] = index[[1, 0]]
    assert shift_distance(index) == pytest.approx(2 / 12)


def test_reversal_is_far_from_every_shift() -> None:
    assert shift_distance(torch.arange(9).flip(0)) == pytest.approx(8 / 9)
