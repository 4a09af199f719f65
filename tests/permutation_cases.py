"""A learner for tests, with the settings of its YAML file, but quick."""

from typing import Any

from padst_exp.permutations import DoublyStochastic


def learned(**changes: Any) -> DoublyStochastic:
    """Doubly stochastic matrices on both sides."""
    settings: dict[str, Any] = {
        "side": "both",
        "parametrization": "logits",
        "iterations": 10,
        "init": "lognormal",
        "scale": 1.0,
        "keep": 0.7,
        "lr": 0.3,
        "betas": (0.9, 0.99),
        "weighting": "adaptive",
        "weight": 3.0,
        "ramp_start": 0.05,
        "ramp_end": 0.2,
        "delta": 0.22,
        "deadline": 0.6,
        "interval": 1,
        "clip": None,
    }
    return DoublyStochastic(**settings | changes)
