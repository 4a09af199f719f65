import random

import numpy as np
import torch

from padst_exp.seeds import mixed, preserved_rng, seed_of, stream


def draw(*key: int | str) -> list[float]:
    return torch.rand(4, generator=stream(*key)).tolist()


def test_a_stream_depends_on_its_key_only_and_is_not_the_one_that_initialises_models() -> None:
    assert draw(0, "topology", 3) == draw(0, "topology", 3)
    assert len({tuple(draw(0, "a", i)) for i in range(50)}) == 50
    torch.manual_seed(0)
    assert torch.rand(4).tolist() != draw(0)


def test_seeds_of_draws_depend_on_purpose_and_place() -> None:
    seeds = [seed_of(purpose, 0, i) for purpose in ("dropout", "mix") for i in range(50)]
    assert len(set(seeds)) == 100 and all(0 <= seed < 2**32 for seed in seeds)
    assert seed_of("mix", 0, 3) == seed_of("mix", 0, 3) != seed_of("mix", 3, 0)
    # An array is hashed as its numbers are.
    numbers = np.arange(50, dtype=np.uint64)
    assert mixed(7, numbers).tolist() == [int(mixed(7, i)[0]) for i in range(50)]


def test_what_is_drawn_inside_leaves_no_trace_outside() -> None:
    def draw_all() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    for each in (random.seed, np.random.seed, torch.manual_seed):
        each(5)
    expected = draw_all(), draw_all()
    for each in (random.seed, np.random.seed, torch.manual_seed):
        each(5)
    first = draw_all()
    with preserved_rng(3):
        inside = draw_all()
    second = draw_all()
    with preserved_rng(3):
        assert draw_all() == inside != first
    assert (first, second) == expected
