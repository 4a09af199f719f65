"""What is said to compute a layer computes it: nothing is by native where no compiler made that."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from padst_exp import dispatch
from padst_exp.dispatch import timing
from padst_exp.engine.backends import describe
from padst_exp.inference.measuring import fastest_layers
from padst_exp.inference.packing import pack
from padst_exp.layers import sparse_layers
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import NM, Unstructured
from padst_kernels import compiled, entries, tiles
from padst_kernels.compiled import own_folder

CPU = torch.device("cpu")
GARBAGE = "printf '\\377\\033[31m\\000 error: nonsense\\n'"
COMPILERS = {
    "missing": None,
    "fails": "exit 1",
    "fails with garbage": f"{GARBAGE} >&2; exit 1",
    "prints garbage": GARBAGE,
    "makes garbage": 'while shift; do [ "$1" = -o ] && head -c 99 /dev/zero > "$2"; done; exit 0',
}


@pytest.fixture(params=COMPILERS, autouse=True)
def compiler(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[None]:
    """As in a process that starts with such a compiler and an empty cache."""
    caches = compiled.compiled, tiles.native.library, entries.native.functions, own_folder
    path, script = tmp_path / "cc", COMPILERS[request.param]
    if script is not None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("PADST_CACHE", str(tmp_path / "cache"))
    others = timing._libraries, compiled._warn
    for cache in (*caches, *others):
        cache.cache_clear()
    yield
    for cache in (*caches, *others):
        cache.cache_clear()


def model() -> nn.Module:
    layers = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    sparsify(layers, [Rule("0")], structure=NM(n=1, m=None, group=16), density=0.25)
    sparsify(layers, [Rule("1")], structure=Unstructured(), density=0.25)
    return layers


def test_no_layer_is_said_to_be_native(caplog: pytest.LogCaptureFixture) -> None:
    net = model()
    chosen = dispatch.choose(
        net, lambda: net(torch.randn(2, 16)), samples=2, device=CPU, compiled=False
    )
    forced = dispatch.forced(net, "native", CPU)
    assert all("native" not in pick.seconds for pick in chosen.values())
    for picks in (chosen, forced):
        assert {pick.backend for pick in picks.values()} <= {"torch", "scatter"}
        assert "native" not in describe(picks)
    assert {layer.backend for layer in sparse_layers(net).values()} == {"torch"}
    # Nor where a checkpoint says so: it was written where there was a compiler.
    saved = dispatch.save({name: dispatch.Pick("native") for name in chosen}, CPU)
    assert dispatch.restore(saved, net, CPU) is None
    assert caplog.text.count("so plain PyTorch computes") >= 1


def test_no_exported_layer_is_said_to_be_native() -> None:
    net = model().eval()
    pack(net)
    layers = dict(net.named_children())
    inputs = dispatch.inputs_of(lambda: net(torch.randn(2, 16)), layers)
    twins = {name: layer.dense() for name, layer in layers.items()}
    picks = fastest_layers(layers, twins, inputs, ("native", "torch"))
    assert {pick.backend for pick in picks.values()} <= {"torch", "dense"}
    assert all("native" not in pick.seconds for pick in picks.values())
