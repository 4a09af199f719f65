"""SMET's switches: grown units warm up, sparse weights learn faster; on any algorithm."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dst.small_training import Training, adamw, sgd, start
from from_yaml import from_yaml
from padst_exp.layers import sparse_weights
from padst_exp.structures import FanIn, Unstructured


def quick(name: str, **changes: Any) -> Any:
    return from_yaml(f"dst/{name}", interval=4, **changes)


def reference(gradients: list[Tensor], lr: float, warmup: int, betas: tuple[float, float]) -> float:
    """Where a fresh Adam with a linear warm-up takes an entry that starts at zero."""
    value, mean, square = 0.0, 0.0, 0.0
    for age, gradient in enumerate(gradients, 1):
        mean = betas[0] * mean + (1 - betas[0]) * float(gradient)
        square = betas[1] * square + (1 - betas[1]) * float(gradient) ** 2
        step = mean / (1 - betas[0] ** age) / ((square / (1 - betas[1] ** age)) ** 0.5 + 1e-8)
        value -= lr * min(1.0, age / max(warmup, 1)) * step
    return value


def test_grown_entries_move_as_under_a_fresh_optimizer_that_warms_up() -> None:
    for name, warmup in product(("set", "rigl", "srigl", "chts"), (0, 3)):
        optimizer = adamw(weight_decay=0.0, regrowth_warmup=warmup, betas=[0.9, 0.99])
        training = start(quick(name), FanIn(group=1), steps=40, optimizer=optimizer).run(3)
        weight = sparse_weights(training.model)["0.weights.0"]
        old = set(weight.active.tolist())
        training.run(1)
        grown = [i for i, unit in enumerate(weight.active.tolist()) if unit not in old]
        assert grown
        gradients: list[Tensor] = []
        for _ in range(3):
            training.run(1)
            assert weight.values.grad is not None
            gradients.append(weight.values.grad.flatten()[grown].clone())
        for place, index in enumerate(grown):
            expected = reference([g[place] for g in gradients], 0.01, warmup, (0.9, 0.99))
            found = float(weight.values.detach().flatten()[index])
            assert found == pytest.approx(expected, rel=2e-3, abs=1e-6)


def test_what_was_there_from_the_start_does_not_warm_up() -> None:
    values = []
    for warmup in (0, 100):
        optimizer = adamw(regrowth_warmup=warmup)
        training = start(quick("set"), Unstructured(), steps=40, optimizer=optimizer).run(4)
        weight = sparse_weights(training.model)["0.weights.0"]
        assert "birth" in training.state.optimizer.state[weight.values]
        training.run(1)
        values.append(weight.values.detach().clone())
    # What was grown counts for the next step only.
    born = training.state.optimizer.state[weight.values]["birth"] > 0
    assert 0 < int(born.sum()) < born.numel()
    assert torch.equal(values[0][~born], values[1][~born])
    assert not torch.equal(values[0][born], values[1][born])


def test_rates_are_over_the_density_and_do_not_compound() -> None:
    for optimizer in (adamw(lr_by_density=True, lr=0.004), sgd(lr_by_density=True, lr=0.004)):
        # Falls from all to 0.3: the scale follows.
        training = start(quick("gmp"), Unstructured(), steps=24, optimizer=optimizer)
        seen: set[float] = set()

        def check(now: Training, seen: set[float] = seen) -> None:
            by_parameter = {
                parameter: group["lr"]
                for group in now.state.optimizer.param_groups
                for parameter in group["params"]
            }
            assert now.stepper.lr == pytest.approx(0.004)
            for weight in sparse_weights(now.model).values():
                seen.add(round(weight.topology().density, 3))
                expected = 0.004 / weight.topology().density
                assert by_parameter[weight.values] == pytest.approx(expected)
            for name, parameter in now.model.named_parameters():
                if "values" not in name:
                    assert by_parameter[parameter] == pytest.approx(0.004)

        training.run(24, check)
        assert len(seen) > 4 and max(seen) == 1.0


@pytest.mark.parametrize("schedule", ["cosine", [[0.5, 0.1]]])
def test_schedules_scale_with_them(schedule: Any) -> None:
    rates = []
    for by_density in (False, True):
        optimizer = adamw(lr_by_density=by_density, schedule=schedule, warmup=0.2)
        training = start(
            from_yaml("dst/static"), FanIn(group=1), steps=10, density=0.25, optimizer=optimizer
        )
        (group,) = training.state.optimizer.param_groups[-1:]
        own: list[float] = []
        training.run(9, lambda _, group=group, own=own: own.append(group["lr"]))  # type: ignore[misc]
        rates.append(own)
    assert rates[1] == pytest.approx([4 * rate for rate in rates[0]])
