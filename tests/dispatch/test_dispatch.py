import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from padst_exp import dispatch
from padst_exp.dispatch import backends
from padst_exp.errors import UserError
from padst_exp.layers import SparseLinear
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import NM, Block, Unstructured
from padst_kernels.scatter_linear import scatter_linear

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PADST_CACHE", str(tmp_path))
    return tmp_path / "decisions.json"


def sleeping(milliseconds: float, calls: list[float]) -> Callable[[], object]:
    def call() -> None:
        calls.append(milliseconds)
        time.sleep(milliseconds / 1000)

    return call


def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 96), nn.Linear(96, 32), nn.Linear(32, 32))
    sparsify(net, [Rule("0", split=3)], structure=NM(n=1, m=None, group=16), density=0.25)
    sparsify(net, [Rule("1")], structure=Unstructured(), density=0.25)
    return net


def choose(net: nn.Module) -> dict[str, dispatch.Choice]:
    x = torch.randn(3, 32)
    return dispatch.choose(net, lambda: net(x), samples=2, device=CPU, compiled=False)


def test_the_fastest_candidate_wins_and_is_measured_only_once(cache: Path) -> None:
    calls: list[float] = []
    candidates = {"slow": sleeping(8, calls), "fast": sleeping(2, calls)}
    reference = {"reference": sleeping(0, calls)}
    first = dispatch.fastest({"a": 1}, lambda: {**candidates, **reference}, device=CPU)
    assert first.choice == "fast"
    assert first.seconds["slow"] > first.seconds["fast"] > first.seconds["reference"]
    measured = len(calls)
    assert dispatch.fastest({"a": 1}, lambda: candidates, device=CPU) == first
    assert len(calls) == measured
    dispatch.fastest({"a": 2}, lambda: candidates, device=CPU)
    assert len(calls) > measured
    assert len(json.loads(cache.read_text())) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 1}', '{"key": {"other": 2}}'])
def test_a_damaged_cache_is_measured_anew(cache: Path, content: str) -> None:
    cache.write_text(content)
    calls: list[float] = []
    decision = dispatch.fastest({}, lambda: {"only": sleeping(1, calls)}, device=CPU)
    assert decision.choice == "only" and calls
    assert len(json.loads(cache.read_text())) == 1


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PADST_CACHE", str(tmp_path / "file"))
    calls: list[float] = []
    assert dispatch.fastest({}, lambda: {"x": sleeping(1, calls)}, device=CPU).choice == "x"


def test_every_product_gets_a_backend_that_it_has_and_computes_the_same() -> None:
    net = model()
    x = torch.randn(5, 32)
    before = net(x)
    choices = choose(net)
    assert choices.keys() == {"0.products.0", "1.products.0"}
    assert choices["0.products.0"].tokens == 6
    for name, layer in net.named_modules():
        if isinstance(layer, SparseLinear):
            for part, product in enumerate(layer.parts()):
                choice = choices[f"{name}.products.{part}"]
                assert product.backend == choice.backend
                assert choice.backend in product.backends(CPU)
                assert choice.speedup is not None and choice.speedup > 0
                assert choice.seconds[choice.backend] == min(
                    choice.seconds[backend] for backend in product.backends(CPU)
                )
    torch.testing.assert_close(net(x), before)


def test_a_backend_that_computes_something_else_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(x: torch.Tensor, *rest: object) -> torch.Tensor:
        return 2 * scatter_linear(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("padst_exp.structures.forms.scatter_linear", wrong)
    layout = Block(size=8, balanced=False).layout(32, 32, 0.25)
    arguments = ["torch", "dense"], 4, torch.float32, CPU, False
    decision = backends.training_decision([layout], *arguments)  # type: ignore[arg-type]
    assert decision.choice == "torch" and "dense" not in decision.seconds
    assert "dense is not used" in caplog.text


def test_forced_backends() -> None:
    net = model()
    x = torch.randn(5, 32)
    before = net(x)
    choices = dispatch.forced(net, "dense", CPU)
    assert {choice.backend for choice in choices.values()} == {"dense"}
    torch.testing.assert_close(net(x), before)
    for backend in ("triton", "cuda"):
        with pytest.raises(UserError, match=rf"^backend: {backend} needs a GPU"):
            dispatch.forced(net, backend, CPU)  # type: ignore[arg-type]


def test_saved_choices_are_restored_on_the_same_device_only() -> None:
    choices = choose(model())
    saved = dispatch.save(choices, CPU)
    assert dispatch.restore(saved, CPU) == choices
    assert dispatch.restore({**saved, "device": "another"}, CPU) is None


def test_masked_storage_is_dense_and_not_measured() -> None:
    net = nn.Sequential(nn.Linear(32, 32))
    sparsify(net, [Rule("0")], structure=Unstructured(), density=0.25, storage="masked")
    (choice,) = choose(net).values()
    assert choice == dispatch.Choice("dense", 0, "", {})
