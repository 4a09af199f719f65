import torch

from padst_exp.seeds import stream


def draw(*key: int | str) -> list[float]:
    return torch.rand(4, generator=stream(*key)).tolist()


def test_a_stream_depends_on_its_key_only() -> None:
    assert draw(0, "topology", 3) == draw(0, "topology", 3)
    assert len({tuple(draw(0, "a", i)) for i in range(50)}) == 50


def test_a_stream_is_not_the_one_that_initialises_models() -> None:
    torch.manual_seed(0)
    assert torch.rand(4).tolist() != draw(0)
