import copy
from typing import Any

import pytest
import torch
from torch import nn

from engine.moving import Moving
from engine.toy import toy_experiment
from from_yaml import from_yaml
from padst_exp.engine.adamw import AgeAwareAdamW, birth_dtype
from padst_exp.engine.optimizers import parameter_roles, require_entrywise
from padst_exp.errors import UserError
from padst_exp.layers import sparse_weights

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.999), "weight_decay": 0.05}


def test_a_grown_entry_moves_as_under_a_fresh_adamw() -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        check_grown_entry(dtype, tolerance)


def check_grown_entry(dtype: torch.dtype, tolerance: float) -> None:
    birth, steps = 57, 40
    gradients = torch.randn(birth + steps, 2, 3, dtype=dtype)
    old = nn.Parameter(torch.randn(2, 3, dtype=dtype))
    optimizer = AgeAwareAdamW([old], **SETTINGS)
    for gradient in gradients[:birth]:
        old.grad = gradient
        optimizer.step()
    state = optimizer.state[old]
    with torch.no_grad():
        for tensor in (old, state["exp_avg"], state["exp_avg_sq"]):
            tensor[1] = 0
    state["birth"] = torch.tensor([[0], [1]], dtype=torch.int16)
    state["births"] = torch.tensor([0.0, birth], dtype=dtype)

    original = nn.Parameter(old.detach().clone())
    unaware = torch.optim.AdamW([original], **SETTINGS)
    unaware.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    young = nn.Parameter(torch.zeros(3, dtype=dtype))
    fresh = torch.optim.AdamW([young], **SETTINGS)
    for gradient in gradients[birth:]:
        old.grad, original.grad, young.grad = gradient, gradient.clone(), gradient[1].clone()
        for each in (optimizer, unaware, fresh):
            each.step()
        torch.testing.assert_close(old[1], young, rtol=0, atol=tolerance)
        assert torch.equal(old[0], original[0])
    assert not torch.allclose(original[1], young, rtol=0, atol=1e-3)


def test_birth_survives_a_checkpoint() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = AgeAwareAdamW([parameter])
    parameter.grad = torch.ones(2, 3)
    optimizer.step()
    state = optimizer.state[parameter]
    state["birth"] = torch.tensor([[0], [1]], dtype=torch.int16)
    state["births"] = torch.tensor([0.0, 1.0])
    other = AgeAwareAdamW([parameter])
    other.load_state_dict(optimizer.state_dict())
    for key in ("birth", "births"):
        assert other.state[parameter][key].dtype == state[key].dtype
        assert torch.equal(other.state[parameter][key], state[key])


def test_more_births_than_two_bytes_can_tell_apart() -> None:
    assert birth_dtype(torch.zeros(1 << 15)) == torch.int16
    assert birth_dtype(torch.zeros((1 << 15) + 1)) == torch.int32


def test_roles_and_groups() -> None:
    model = toy_experiment(algorithm=Moving()).model
    assert isinstance(model, nn.Sequential)
    model.append(nn.Embedding(3, 4))
    model.token = nn.Parameter(torch.zeros(1, 1, 4))
    roles = {name: role for name, (role, _) in parameter_roles(model).items()}
    assert roles == {
        "token": "embedding",
        "0.bias": "bias",
        "0.weights.0.values": "packed",
        "1.weight": "norm",
        "1.bias": "bias",
        "4.bias": "bias",
        "4.weights.0.values": "packed",
        "6.weight": "weight",
        "6.bias": "bias",
        "7.weight": "embedding",
    }
    optimizer, _ = from_yaml("optimizer/adamw", lr=0.1, weight_decay=0.3).create(model, 10)
    decays = {group["role"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"packed": 0.3, "weight": 0.3, "bias": 0, "norm": 0, "embedding": 0}


def test_a_tied_weight_is_one_embedding() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    assert [role for role, _ in parameter_roles(model).values()] == ["embedding"]


def test_schedules() -> None:
    ends: list[tuple[Any, float, float]] = [
        ("cosine", 0.055, 0.01),
        ("linear", 0.055, 0.01),
        ("constant", 0.1, 0.1),
        ([[0.5, 0.3], [0.8, 0.05]], 0.03, 0.005),
    ]
    for schedule, middle, final in ends:
        builder = from_yaml("optimizer/sgd", lr=0.1, warmup=0.2, schedule=schedule, min_lr=0.01)
        optimizer, scheduler = builder.create(nn.Linear(2, 2), 100)
        rates = []
        for step in range(1, 101):
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
        assert rates[0] == pytest.approx(0.005) and rates[10] == pytest.approx(0.0525)
        assert rates[20] == pytest.approx(0.1) and rates[60] == pytest.approx(middle), schedule
        assert rates[100] == pytest.approx(final), schedule


def test_mistakes_name_the_key() -> None:
    mistakes = {
        "lr": 0.0,
        "warmup": 1.0,
        "min_lr": 0.2,
        "betas": (0.9, 1.0),
        "schedule": [[1.5, 0.1]],
    }
    for key, value in mistakes.items():
        with pytest.raises(UserError, match=rf"^optimizer\.{key}: expected .*, got"):
            from_yaml("optimizer/adamw", **{"lr": 0.1, key: value})


class Scaled(nn.Module):
    """A norm as many write it, `LlamaRMSNorm` among them."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))


def test_a_scale_is_known_by_its_shape_and_does_not_decay() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    model = nn.Sequential(Scaled(5), LlamaRMSNorm(7), nn.PReLU(3), nn.Linear(4, 1))
    roles = {name: role for name, (role, _) in parameter_roles(model).items()}
    assert roles == {
        "0.weight": "norm",
        "1.weight": "norm",
        "2.weight": "norm",
        "3.weight": "weight",
        "3.bias": "bias",
    }


@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
def test_what_takes_packed_values_for_a_matrix_is_refused_by_name(name: str) -> None:
    kind = getattr(torch.optim, name)
    model = toy_experiment(algorithm=Moving()).model
    packed = [weight.values for weight in sparse_weights(model).values()]
    optimizer = kind(packed)
    wanted = rf"^optimizer: expected optimizer=muon or [^\n]*, got {name}$"
    with pytest.raises(UserError, match=wanted):
        require_entrywise(optimizer, model)
    require_entrywise(kind([nn.Parameter(torch.ones(3, 4))]), model)
