import pytest
import torch

from padst_exp.permutations import partition_distance, shift_distance

BLOCKS = torch.arange(12) // 4


def test_what_a_structure_cannot_see_is_at_distance_zero() -> None:
    assert partition_distance(torch.arange(12), BLOCKS) == 0
    # Whole blocks, and inputs within blocks.
    index = torch.cat([8 + torch.randperm(4), torch.randperm(4), 4 + torch.randperm(4)])
    assert partition_distance(index, BLOCKS) == 0
    # All inputs are alike.
    assert partition_distance(torch.randperm(12), torch.zeros(12, dtype=torch.int64)) == 0
    # Cyclic shifts of cyclic diagonals.
    assert shift_distance(torch.arange(12)) == shift_distance(torch.arange(12).roll(5)) == 0


def test_inputs_that_change_class_are_counted() -> None:
    index = torch.arange(12)
    index[[0, 4]] = index[[4, 0]]
    assert partition_distance(index, BLOCKS) == pytest.approx(2 / 12)
    # Spread over all blocks: as far as possible.
    spread = torch.arange(9).view(3, 3).T.flatten()
    assert partition_distance(spread, torch.arange(9) // 3) == pytest.approx(2 / 3)
    # Classes of unequal size cannot be swapped.
    labels = torch.tensor([5, 5, 5, 7])
    assert partition_distance(torch.tensor([3, 1, 2, 0]), labels) == pytest.approx(2 / 4)


def test_inputs_off_the_best_shift_are_counted() -> None:
    index = torch.arange(12).roll(5)
    index[[0, 1]] = index[[1, 0]]
    assert shift_distance(index) == pytest.approx(2 / 12)
    # A reversal is far from every shift.
    assert shift_distance(torch.arange(9).flip(0)) == pytest.approx(8 / 9)
