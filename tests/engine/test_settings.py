import pytest

from from_yaml import from_yaml
from padst_exp.engine.settings import Trainer
from padst_exp.errors import UserError


def trainer(**changes: object) -> Trainer:
    made: Trainer = from_yaml("trainer/default", **changes)
    return made


def test_mistakes_name_the_key() -> None:
    cases: dict[str, dict[str, object]] = {
        "trainer.steps: expected either this or trainer.epochs, got neither": {},
        "trainer.steps: .* got both": {"steps": 1, "epochs": 1.0},
        "trainer.steps: expected at least 1, got 0": {"steps": 0},
        "trainer.epochs: expected a positive": {"epochs": 0.0},
        "trainer.batch_size: expected at least 1, got 0": {"steps": 1, "batch_size": 0},
        "trainer.workers": {"steps": 1, "workers": -1},
        "trainer.profile: expected from 1 to 1000": {"steps": 1, "profile": 0},
        "trainer.profile: .* got 1001": {"steps": 2000, "profile": 1001},
        "trainer.precision: .* got 'fp16'": {"steps": 1, "precision": "fp16"},
        "trainer.clip_norm": {"steps": 1, "clip_norm": 0.0},
        "trainer.ema_decay": {"steps": 1, "ema_decay": 1.0},
    }
    for message, changes in cases.items():
        with pytest.raises(UserError, match=rf"^{message}"):
            trainer(**changes)


def test_steps_of_epochs() -> None:
    assert trainer(epochs=1.5, batch_size=10).total_steps(105) == 15
    assert trainer(steps=7, batch_size=10).total_steps(105) == 7
    with pytest.raises(UserError, match=r"trainer\.batch_size: expected at most 9"):
        trainer(steps=7, batch_size=10).total_steps(9)


def test_longer_is_so_many_times_as_long() -> None:
    for changes, steps in (({"steps": 7}, 18), ({"epochs": 1.5}, 38)):
        longer = from_yaml("trainer/longer", times=2.5, batch_size=10, **changes)
        assert longer.total_steps(105) == steps
    with pytest.raises(UserError, match=r"^trainer\.times: expected a positive number, got 0"):
        from_yaml("trainer/longer", steps=1, times=0.0)


def test_a_micro_batch_is_a_share_of_a_process() -> None:
    assert trainer(steps=1, batch_size=24, micro_batches=2).micro_batch_size(3) == 4
