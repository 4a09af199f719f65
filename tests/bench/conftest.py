from dataclasses import replace
from pathlib import Path

import pytest

from padst_exp.bench import contenders, session
from padst_exp.bench.session import Contender
from padst_exp.dispatch import timing as dispatching


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is compiled, which takes minutes, and two copies of a weight are enough."""

    def named(one: Contender) -> Contender:
        modules = [contenders.twin(module) for module in one.modules]
        return replace(one, form=one.form.replace("eager", "compiled"), modules=modules)

    monkeypatch.setattr(contenders, "compiled", named)
    monkeypatch.setattr(contenders, "compile_blocks", lambda module: None)
    monkeypatch.setattr(session, "last_level_cache", lambda device: 1 << 12)
    monkeypatch.setattr(session, "MAX_ROTATION", 2)
    monkeypatch.setitem(session.GEMM, "cpu", 64)
    monkeypatch.setattr(dispatching.cache, "cache_folder", lambda: tmp_path / "decisions")
