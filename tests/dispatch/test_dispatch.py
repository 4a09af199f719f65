import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from padst_exp import dispatch
from padst_exp.dispatch import backends, decision
from padst_exp.errors import UserError
from padst_exp.layers import SparseLinear
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import NM, Backend, Block, Unstructured
from padst_kernels.scatter import scatter_matmul

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Not of the compiled kernels, which would be compiled anew.
    monkeypatch.setattr(decision, "cache_folder", lambda: tmp_path)
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


def test_decisions_of_other_machines_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def measured() -> bool:
        before = len(calls)
        dispatch.fastest({}, lambda: {"only": sleeping(0.1, calls)}, device=CPU)
        return len(calls) > before

    assert measured() and not measured()
    for module, name, other in (
        (decision, "device_name", lambda device: "another"),
        (torch, "get_num_threads", lambda: 77),
        (torch.backends.cpu, "get_cpu_capability", lambda: "SSE"),
        (torch, "__version__", "1.0"),
        (decision, "_kernels_digest", lambda: "edited"),
        # No compiler, then one.
        (decision, "_libraries", list),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, other)
            assert measured(), name
    assert not measured()


def test_processes_that_start_together_measure_once(tmp_path: Path) -> None:
    code = (
        "import sys, time, torch\n"
        "from padst_exp import dispatch\n"
        "def calls():\n"
        "    open(sys.argv[1], 'a').write('measured ')\n"
        "    return {'slow': lambda: time.sleep(0.05)}\n"
        "dispatch.fastest({}, calls, device=torch.device('cpu'))\n"
    )
    log = tmp_path / "log"
    command = [sys.executable, "-c", code, str(log)]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PADST_CACHE": str(tmp_path),
        "CXX": "none",
    }  # fmt: skip
    for process in [subprocess.Popen(command, env=environment) for _ in range(3)]:
        assert process.wait() == 0
    assert log.read_text() == "measured "


def test_nothing_is_measured_while_a_model_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="compiled or captured"):
        dispatch.fastest({}, lambda: {"only": lambda: None}, device=CPU)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"key": 1}', '{"key": {"other": 2}}', "edited", "not a number"],
)
def test_a_damaged_cache_is_measured_anew(cache: Path, content: str) -> None:
    if content in ("edited", "not a number"):
        dispatch.fastest({}, lambda: {"only": lambda: None}, device=CPU)
        ((key, entry),) = json.loads(cache.read_text()).items()
        wrong = {"choice": "gone"} if content == "edited" else {"seconds": {"only": "fast"}}
        content = json.dumps({key: {**entry, **wrong}})
    cache.write_text(content)
    calls: list[float] = []
    found = dispatch.fastest({}, lambda: {"only": sleeping(1, calls)}, device=CPU)
    assert found.choice == "only" and calls
    assert len(json.loads(cache.read_text())) == 1


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(decision, "cache_folder", lambda: tmp_path / "file")
    calls: list[float] = []
    assert dispatch.fastest({}, lambda: {"x": sleeping(1, calls)}, device=CPU).choice == "x"


def test_every_product_gets_a_backend_that_it_has_and_computes_the_same() -> None:
    net = model()
    x = torch.randn(5, 32)
    before = net(x)
    choices = choose(net)
    assert choices.keys() == {"0.products.0", "1.products.0"}
    assert choices["0.products.0"].tokens == 8  # of 6
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


def doubled(y: torch.Tensor) -> torch.Tensor:
    return 2 * y


def nan_gradient(y: torch.Tensor) -> torch.Tensor:
    y.register_hook(lambda dy: dy * torch.nan)
    return y


def failing(y: torch.Tensor) -> torch.Tensor:
    class OutOfResources(Exception):  # as Triton's is
        pass

    raise OutOfResources("out of resource: shared memory")


@pytest.mark.parametrize("spoil", [doubled, nan_gradient, failing])
def test_a_backend_that_computes_something_else_is_not_chosen(
    spoil: Callable[[torch.Tensor], torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def wrong(x: torch.Tensor, *rest: object) -> torch.Tensor:
        return spoil(scatter_matmul(x, *rest))  # type: ignore[arg-type]

    monkeypatch.setattr("padst_exp.structures.forms.scatter_matmul", wrong)
    layout = Block(size=8, balanced=False).layout(32, 32, 0.25)
    arguments = ["torch", "dense"], 4, torch.float32, CPU, False
    found = backends.training_decision([layout], *arguments)  # type: ignore[arg-type]
    assert found.choice == "torch" and "dense" not in found.seconds
    assert "dense is not used" in caplog.text


def test_decisions_depend_on_all_that_a_product_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def passes(layouts: object, names: list[str], tokens: int, *rest: object) -> dict[str, object]:
        measured.append(tokens)
        return {name: lambda: None for name in (*names, "reference")}

    monkeypatch.setattr(backends, "_passes", passes)

    def decide(size: int = 64, tokens: int = 100, **changes: object) -> int:
        arguments: dict[str, object] = {
            "backends": ["torch", "dense"], "dtype": torch.float32, "compiled": False,
            "permuted": (False, False), **changes,
        }  # fmt: skip
        layout = Block(size=8, balanced=False).layout(size, 64, 0.25)
        backends.training_decision([layout], tokens=tokens, device=CPU, **arguments)  # type: ignore[arg-type]
        return len(measured)

    assert decide() == 1
    assert decide(tokens=128) == decide(tokens=65) == 1  # one bucket, measured at its end
    changes = [
        {"size": 72}, {"tokens": 129}, {"dtype": torch.bfloat16}, {"compiled": True},
        {"permuted": (False, True)}, {"permuted": (True, False)}, {"backends": ["torch"]},
    ]  # fmt: skip
    for number, change in enumerate(changes, 2):
        assert decide(**change) == number, change  # type: ignore[arg-type]
    assert measured[:3] == [128, 128, 256]
    assert decide(tokens=10**6) == decide(tokens=1024)


def test_backends_that_may_not_run_are_not_measured() -> None:
    net, x = model(), torch.randn(3, 32)

    def chosen(*allowed: Backend) -> list[dispatch.Choice]:
        found = dispatch.choose(
            net, lambda: net(x), samples=2, device=CPU, compiled=False, allowed=allowed
        )
        return list(found.values())

    for choice in chosen("dense", "triton"):
        assert choice.backend == "dense" and choice.seconds.keys() == {"dense", "reference"}
    with pytest.raises(ValueError, match="no backend is left"):
        chosen("triton")


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


def test_saved_choices_are_restored_where_they_fit_only() -> None:
    net = model()
    choices = choose(net)
    saved = dispatch.save(choices, CPU)
    assert dispatch.restore(saved, net, CPU) == choices
    (first, choice), *others = saved["choices"].items()
    for wrong in (
        None,
        {**saved, "device": "another"},
        {"device": saved["device"]},
        {**saved, "choices": dict(others)},
        {**saved, "choices": {**saved["choices"], "2.products.0": choice}},
        {**saved, "choices": {**saved["choices"], first: {**choice, "backend": "triton"}}},
        {**saved, "choices": {**saved["choices"], first: {**choice, "other": 1}}},
    ):
        assert dispatch.restore(wrong, net, CPU) is None


def test_masked_storage_is_dense_and_not_measured() -> None:
    net = nn.Sequential(nn.Linear(32, 32))
    sparsify(net, [Rule("0")], structure=Unstructured(), density=0.25, storage="masked")
    (choice,) = choose(net).values()
    assert choice == dispatch.Choice("dense", 0, "", {})
