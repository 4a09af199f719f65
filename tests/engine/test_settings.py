import pytest

from padst_exp.engine.settings import Trainer
from padst_exp.errors import UserError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "trainer.steps: expected either this or trainer.epochs, got neither"),
        ({"steps": 1, "epochs": 1.0}, "trainer.steps: .* got both"),
        ({"steps": 0}, "trainer.steps: expected at least 1, got 0"),
        ({"epochs": 0.0}, "trainer.epochs: expected positive"),
        ({"steps": 1, "batch_size": 0}, "trainer.batch_size: expected at least 1, got 0"),
        ({"steps": 1, "workers": -1}, "trainer.workers"),
        ({"steps": 1, "precision": "fp16"}, "trainer.precision: .* got fp16"),
        ({"steps": 1, "clip_norm": 0.0}, "trainer.clip_norm"),
        ({"steps": 1, "ema_decay": 1.0}, "trainer.ema_decay"),
    ],
)
def test_mistakes_name_the_key(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(**settings)


def test_steps_of_epochs() -> None:
    assert Trainer(epochs=1.5, batch_size=10).total_steps(105) == 15
    assert Trainer(steps=7, batch_size=10).total_steps(105) == 7
    with pytest.raises(UserError, match=r"trainer\.batch_size: expected at most 9"):
        Trainer(steps=7, batch_size=10).total_steps(9)


def test_batches_divide_evenly() -> None:
    assert Trainer(steps=1, batch_size=24, micro_batches=2).micro_batch_size(3) == 4
    with pytest.raises(UserError, match=r"trainer\.batch_size: expected a multiple of"):
        Trainer(steps=1, batch_size=24, micro_batches=2).micro_batch_size(5)
