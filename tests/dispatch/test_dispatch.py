"""The fastest right backend computes each layer; plain PyTorch says what is right."""

import hashlib
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from padst_exp import dispatch
from padst_exp.dispatch import agreement, backends, timing
from padst_exp.dst import Change
from padst_exp.errors import UserError
from padst_exp.layers import SparseLinear, sparse_layers
from padst_exp.layers.sparse_conv import Window
from padst_exp.permutations import RandomPermutation
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import NM, Backend, Block, Unstructured
from padst_kernels.entries import native as entries
from padst_kernels.tiles import native as tiles
from permutation_cases import learned

CPU = torch.device("cpu")
BACKENDS: list[Backend] = ["native", "torch", "scatter"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Not of the compiled kernels, which would be compiled anew.
    monkeypatch.setattr(timing.cache, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(timing, "TIMING", 1e-4)
    return tmp_path / "timings"


def sleeping(milliseconds: float, calls: list[float]) -> Callable[[], object]:
    def call() -> None:
        calls.append(milliseconds)
        time.sleep(milliseconds / 1000)

    return call


class Net(nn.Module):
    """Layers of every kind: tiles, single entries, convolutions, one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(48, 16)
        self.unused = nn.Linear(16, 16)
        tiled = [Rule("conv"), Rule("qkv", split=3), Rule("unused")]
        learner = RandomPermutation(side="both")
        structure = NM(n=1, m=None, group=16)
        sparsify(self, tiled, structure=structure, density=0.25, learner=learner)
        sparsify(self, [Rule("out")], structure=Unstructured(), density=0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.qkv(x=self.conv(x).flatten(2).transpose(1, 2)))


def choose(net: nn.Module, *shape: int, samples: int = 2) -> dict[str, dispatch.Pick]:
    x = torch.randn(1, *shape)
    return dispatch.choose(net, lambda: net(x), samples=samples, device=CPU, compiled=False)


def layer(size: int = 64, **changes: Any) -> SparseLinear:
    net = nn.Sequential(nn.Linear(64, size))
    what = {"structure": Block(size=8, balanced=False), "density": 0.25, **changes}
    sparsify(net, [Rule("0")], **what)
    (found,) = sparse_layers(net).values()
    return found


def seconds(
    found: SparseLinear,
    names: list[Backend] = BACKENDS,
    shape: tuple[int, ...] = (32, 64),
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> Mapping[str, float]:
    given = dispatch.Input(shape, tuple(range(len(shape))), 32, dtype)
    what = backends._description(found, names, given, compiled)
    return backends._fastest(what, found, names, given, CPU).seconds


def test_times_are_measured_once_and_kept(cache: Path) -> None:
    calls: list[float] = []
    candidates = {"slow": sleeping(8, calls), "fast": sleeping(1, calls)}
    first = dispatch.timings({"a": 1}, lambda: candidates, device=CPU)
    assert first["slow"] > first["fast"] > 0
    measured = len(calls)
    assert dispatch.timings({"a": 1}, lambda: candidates, device=CPU) == first
    assert len(calls) == measured
    dispatch.timings({"a": 2}, lambda: candidates, device=CPU)
    assert len(calls) > measured
    assert len(list(cache.iterdir())) == 2


def test_times_of_other_machines_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def measured() -> bool:
        before = len(calls)
        dispatch.timings({}, lambda: {"only": sleeping(0.1, calls)}, device=CPU)
        return len(calls) > before

    assert measured() and not measured()
    for module, name, other in (
        (timing, "device_name", lambda device: "another"),
        (torch, "get_num_threads", lambda: 77),
        (torch.backends.cpu, "get_cpu_capability", lambda: "SSE"),
        (torch, "__version__", "1.0"),
        (timing, "_kernels_digest", lambda: "edited"),
        # No compiler, then one.
        (timing, "_libraries", list),
    ):
        with monkeypatch.context() as context:
            context.setattr(module, name, other)
            assert measured(), name
    assert not measured()


def test_processes_that_start_together_measure_once(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def run() -> None:
        def calls() -> dict[str, Callable[[], object]]:
            with log.open("a") as file:
                file.write("measured ")
            return {"slow": sleeping(20, [])}

        dispatch.timings({}, calls, device=CPU)

    forked = [multiprocessing.get_context("fork").Process(target=run) for _ in range(3)]
    for process in forked:
        process.start()
    for process in forked:
        process.join()
    assert [process.exitcode for process in forked] == [0, 0, 0]
    assert log.read_text() == "measured "


def test_nothing_is_measured_while_a_model_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="compiled or captured"):
        dispatch.timings({}, lambda: {"only": lambda: None}, device=CPU)


def test_a_cache_that_is_damaged_or_cannot_be_written_costs_nothing_but_time(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[float] = []

    def measured() -> bool:
        before = len(calls)
        found = dispatch.timings({}, lambda: {"only": sleeping(0.1, calls)}, device=CPU)
        assert found.keys() == {"only"} and found["only"] > 0
        return len(calls) > before

    assert measured()
    (path,) = cache.iterdir()
    sound = path.read_bytes()
    name = f"timings/{path.name}\n".encode()
    wrong: list[object] = [[], {}, {"only": "fast"}, {"only": 0}, {"only": None}, 7, None]
    signed = [json.dumps(one).encode() for one in wrong]
    digests = [hashlib.sha256(name + text).hexdigest().encode() for text in signed]
    contents = [b"%s\n%s" % pair for pair in zip(digests, signed, strict=True)]
    for content in (b"", b"{", sound[:-1], sound.replace(b"only", b"fast"), *contents):
        path.write_bytes(content)
        assert measured(), content
        assert not measured(), content
    # Nor is that of something else believed.
    dispatch.timings({"a": 1}, lambda: {"only": sleeping(0.1, calls)}, device=CPU)
    other = next(one for one in cache.iterdir() if one != path)
    path.write_bytes(other.read_bytes())
    assert measured()
    (cache.parent / "file").touch()
    monkeypatch.setattr(timing.cache, "cache_folder", lambda: cache.parent / "file")
    assert measured() and measured()


def test_every_layer_gets_the_fastest_of_its_backends_and_computes_the_same() -> None:
    net, x = Net(), torch.randn(3, 8, 5, 6)
    before = net(x)
    picks = choose(net, 8, 5, 6)
    layers = sparse_layers(net)
    assert picks.keys() == layers.keys()
    # Of 2 samples with 30 positions: whole samples for a convolution, else a power of two.
    assert {name: pick.tokens for name, pick in picks.items()} == {
        "conv": 60, "qkv": 64, "out": 64, "unused": 0
    }  # fmt: skip
    for name, pick in picks.items():
        assert layers[name].backend == pick.backend
        if name == "unused":
            # Nothing runs that nothing proves.
            assert pick == dispatch.Pick("torch")
            continue
        assert pick.seconds.keys() == {*BACKENDS, "dense"} and pick.dtype == "float32"
        assert pick.seconds[pick.backend] == min(pick.seconds[one] for one in BACKENDS)
        assert pick.speedup == pick.seconds["dense"] / pick.seconds[pick.backend]
    torch.testing.assert_close(net(x), before)


def larger(y: Tensor) -> Tensor:
    return 1.5 * y


def one_row_wrong(y: Tensor) -> Tensor:
    """As a kernel that loses the edge of a weight; in the norm of the whole this is little."""
    y = y.clone()
    y[..., -1] = 0
    return y


def not_a_number(y: Tensor) -> Tensor:
    y = y.clone()
    y.view(-1)[0] = torch.nan
    return y


def failing(y: Tensor) -> Tensor:
    class OutOfResources(Exception):  # as Triton's is
        pass

    raise OutOfResources("out of resource: shared memory")


SPOILERS = [larger, one_row_wrong, not_a_number, failing]
PASSES = [
    (tiles, "product"), (tiles, "input_gradient"), (tiles, "weight_gradient"),
    (entries, "product"), (entries, "input_gradient"), (entries, "values_gradient"),
]  # fmt: skip


@contextmanager
def spoiled(*where: tuple[object, str], by: Callable[[Tensor], Tensor] = larger) -> Iterator[None]:
    """Let functions return something else."""
    with ExitStack() as stack:
        for owner, name in where:
            right = getattr(owner, name)

            def wrong(*arguments: Any, right: Any = right, **named: Any) -> Tensor:
                y = right(*arguments, **named)
                assert y is not None, "there is no compiled kernel here"
                return by(y)

            stack.enter_context(patch.object(owner, name, wrong))
        yield


@pytest.mark.parametrize("module", [tiles, entries])
def test_a_wrong_compiled_kernel_is_refused(
    module: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Forward and in each gradient, and the layer is right afterwards."""

    def measure(calls: Mapping[str, object], device: torch.device) -> dict[str, float]:
        order = ["native", "scatter", "torch", "dense"]
        return {name: float(order.index(name) + 1) for name in calls}

    structure = Unstructured() if module is entries else NM(n=1, m=None, group=16)
    net = nn.Sequential(nn.Linear(128, 1024))
    sparsify(net, [Rule("0")], structure=structure, density=0.1)
    x = torch.randn(64, 128)
    weight, bias = net[0].weight.detach(), net[0].bias.detach()
    names = [name for owner, name in PASSES if owner is module]
    monkeypatch.setattr(timing, "measure", measure)
    assert choose(net, 128, samples=64)["0"].backend == "native"
    for name, spoil in ((name, spoil) for name in names for spoil in SPOILERS):
        if spoil is one_row_wrong and name == "values_gradient":
            continue  # it has no rows
        caplog.clear()
        with spoiled((module, name), by=spoil):
            # Whatever is known of its speed.
            picks = choose(net, 128, samples=64)
            assert picks["0"].seconds.keys() == {"torch", "scatter", "dense"}, (name, spoil)
            torch.testing.assert_close(net(x), x @ weight.T + bias)
        reason = "out of resource" if spoil is failing else "its results differ by"
        assert f"backend native is not used here: {reason}" in caplog.text
    # Of one that was wrong when times were taken there are none.
    shutil.rmtree(cache)
    with spoiled((module, names[0])):
        choose(net, 128, samples=64)
    assert choose(net, 128, samples=64)["0"].backend != "native"


def test_every_candidate_is_judged_by_dense_weights() -> None:
    """Whichever comes first, and all of them."""
    scatter = "padst_exp.structures.product.scatter_matmul"
    found = layer()
    with patch(scatter, lambda x, *rest: x.new_ones(*x.shape[:-1], rest[-1], requires_grad=True)):
        assert seconds(found).keys() == {"native", "torch", "dense"}
    everything = [(backends.SparseLinear, "forward")]
    with (
        spoiled(*everything),
        pytest.raises(UserError, match=r"^backend: none of native, torch computes"),
    ):
        seconds(found, ["native", "torch"])
    # Values that are all zero prove nothing about a kernel.
    with torch.no_grad():
        for weight in found.parts():
            weight.values.zero_()
    with spoiled((tiles, "product")):
        assert "native" not in seconds(found, shape=(16, 64))


def test_what_differs_in_one_slice_differs() -> None:
    expected = torch.randn(300, 2000)
    assert dispatch.difference(expected, expected) == 0.0
    assert dispatch.difference(1.01 * expected, expected) == pytest.approx(0.01, rel=1e-3)
    for slices in ((slice(None), 7), (11, slice(None))):
        other = expected.clone()
        other[slices] = 0
        assert dispatch.difference(other, expected) == pytest.approx(1 / agreement.SLICE, rel=0.1)
    # A single outlier is the worse the fewer numbers there are beside it.
    other = expected.clone()
    other[3, 4] += expected[3].norm()
    assert dispatch.difference(other, expected) > 1 / agreement.SLICE
    zeros = torch.zeros(2, 3)
    assert dispatch.difference(zeros, zeros) == 0.0 < dispatch.difference(zeros + 1e-9, zeros)
    assert dispatch.difference(torch.empty(0, 3), torch.empty(0, 3)) == 0.0
    for bad in (torch.nan, torch.inf):
        other = expected.clone()
        other[5, 6] = bad
        assert not dispatch.difference(other, expected) < 1


def test_convolutions_are_measured_as_convolutions() -> None:
    net = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False))
    sparsify(net, [Rule("0")], structure=Block(size=8, balanced=False), density=0.5)
    # 64 x 48 positions, 768 outputs a sample: the limit allows one.
    (pick,) = choose(net, 8, 64, 48, samples=5).values()
    assert pick.tokens == 768
    (pick,) = choose(net, 8, 8, 8, samples=5).values()
    assert pick.tokens == 8 * 16
    # Wrong patches are known by a right convolution.
    with spoiled((Window, "patches"), by=lambda y: (2 * y[0], y[1])):  # type: ignore[arg-type,return-value]
        (pick,) = choose(net, 8, 8, 10, samples=5).values()
    assert pick.backend == "scatter" and pick.seconds.keys() == {"scatter", "dense"}


def test_times_depend_on_all_that_a_layer_meets(cache: Path) -> None:
    def measured(found: SparseLinear, **changes: Any) -> bool:
        before = set(cache.iterdir()) if cache.exists() else set()
        seconds(found, changes.pop("names", ["torch"]), **changes)
        return set(cache.iterdir()) != before

    assert measured(layer()) and not measured(layer()) and not measured(layer(seed=1))
    assert measured(layer(size=72)) and measured(layer(structure=NM(n=1, m=None, group=8)))
    for changes in (
        {"shape": (64, 64)}, {"dtype": torch.bfloat16}, {"compiled": True},
        {"names": ["torch", "scatter"]},
    ):  # fmt: skip
        assert measured(layer(), **changes), changes
    for side in ("in", "out", "both"):
        assert measured(layer(learner=RandomPermutation(side=side)))  # type: ignore[arg-type]
        # Soft ones are measured as what they become.
        assert not measured(layer(learner=learned(side=side)))
    assert measured(layer(density=0.5))
    reordered, uneven = layer(), layer(structure=NM(n=1, m=None, group=8))
    (weight,) = reordered.parts()
    weight.adopt(Change(weight.active.long(), row_order=torch.randperm(64)))
    assert measured(reordered)
    # As many units, but of uneven counts fewer merge to one tile.
    (weight,) = uneven.parts()
    active = weight.active.long()
    free = next(unit for unit in range(64) if unit not in active)
    weight.adopt(Change(torch.cat([active[:16], active[17:], active.new_tensor([free])]).sort()[0]))
    assert measured(uneven)
    conv = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(8, 16, 3, stride=2))
    sparsify(conv, [Rule("?")], structure=Block(size=8, balanced=False), density=0.5)
    first, second = sparse_layers(conv).values()
    assert measured(first, shape=(2, 8, 9, 9)) and measured(second, shape=(2, 8, 9, 9))
    assert not measured(first, shape=(2, 8, 9, 9))


def test_backends_that_may_not_run_are_not_measured() -> None:
    net, x = Net(), torch.randn(1, 8, 5, 6)

    def chosen(*allowed: Backend) -> dict[str, dispatch.Pick]:
        return dispatch.choose(
            net, lambda: net(x), samples=2, device=CPU, compiled=False, allowed=allowed
        )

    picks = chosen("scatter", "triton")
    assert {pick.backend for pick in picks.values()} == {"scatter"}
    assert picks["qkv"].seconds.keys() == {"scatter", "dense"}
    with pytest.raises(ValueError, match="no backend is left"):
        chosen("triton")


def test_torch_is_plain_pytorch_and_what_is_forced_is_used() -> None:
    net, x = Net(), torch.randn(3, 8, 5, 6)
    before = net(x)
    picks = dispatch.forced(net, "scatter", CPU)
    assert {pick.backend for pick in picks.values()} == {"scatter"}
    torch.testing.assert_close(net(x), before)
    dispatch.forced(net, "torch", CPU)
    with spoiled(*PASSES, by=failing):
        y = net(x)
        y.sum().backward()
        torch.testing.assert_close(y, before)
        # Nothing unproven runs while the example shows what is to be measured.
        choose(net, 8, 5, 6)
    gpu = torch.device("cuda")
    cases = [("triton", CPU, "CPU"), ("cuda", CPU, "CPU"), ("native", gpu, "GPU")]
    for backend, device, name in cases:
        wanted = rf"^backend: expected one for this device, a {name} \(auto, .*\), got {backend}$"
        with pytest.raises(UserError, match=wanted):
            dispatch.forced(net, backend, device)  # type: ignore[arg-type]
    for backend in ("auto", "torch", "scatter"):
        dispatch.require_device(backend, gpu)
        dispatch.require_device(backend, CPU)


def test_saved_picks_are_restored_where_they_fit_only() -> None:
    net = Net()
    picks = choose(net, 8, 5, 6)
    saved = json.loads(json.dumps(dispatch.save(picks, CPU)))
    assert dispatch.restore(saved, net, CPU) == picks
    (first, pick), *others = saved["picks"].items()
    for wrong in (
        None,
        {**saved, "device": "another"},
        {"device": saved["device"]},
        {**saved, "picks": dict(others)},
        {**saved, "picks": {**saved["picks"], "2": pick}},
        {**saved, "picks": {**saved["picks"], first: {**pick, "backend": "triton"}}},
        {**saved, "picks": {**saved["picks"], first: {**pick, "backend": "dense"}}},
        {**saved, "picks": {**saved["picks"], first: {**pick, "other": 1}}},
    ):
        assert dispatch.restore(wrong, net, CPU) is None


def test_masked_storage_is_plain_pytorch_and_not_measured(cache: Path) -> None:
    net = nn.Sequential(nn.Linear(32, 32))
    sparsify(net, [Rule("0")], structure=Unstructured(), density=0.25, storage="masked")
    (pick,) = choose(net, 32).values()
    assert pick == dispatch.Pick("torch") and pick.speedup is None and not cache.exists()
