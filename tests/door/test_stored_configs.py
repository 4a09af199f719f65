"""A training config that lies in a run, a checkpoint or an export is data, whoever wrote it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf.errors import OmegaConfBaseException

from from_yaml import asked
from hostile import HOSTILE_YAML, harmful_configs, resolving_configs
from padst_exp import stored
from padst_exp.analyze import AnalyzeSchema, analyze
from padst_exp.engine import checkpoint
from padst_exp.engine.distributed import World
from padst_exp.errors import UserError
from padst_exp.evaluate import EvaluateSchema, evaluate
from padst_exp.export import ExportSchema, export

KEYS: dict[str, Any] = {"device": "cpu", "trust": (), "changes": ()}
Place = Callable[[str], Path]
PLANTED = """
from pathlib import Path
Path(__file__).with_name("it-ran").touch()
class Thing:
    def __init__(self): ...
"""


def evaluated(path: Path, **changes: Any) -> dict[str, float]:
    keys = asked("evaluate", EvaluateSchema, run=str(path), **{**KEYS, **changes})
    return evaluate(keys, World())[1]


def exported(path: Path, out: Path | None = None, **changes: Any) -> Path:
    values = {"out": out and str(out), "overwrite": True, **KEYS, **changes}
    return export(asked("export", ExportSchema, run=str(path), **values), World())[0]


def analysed(path: Path) -> None:
    analyze(AnalyzeSchema(run=str(path), out=None, parts=("cost",), **KEYS), World())


@pytest.fixture(scope="module")
def sound(real_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an export in it, and a lone checkpoint beside it."""
    root = tmp_path_factory.mktemp("door")
    run = root / "run"
    shutil.copytree(real_run, run)
    exported(run)
    shutil.copy(run / "checkpoints" / "last.pt", root / "lone.pt")
    return run


@pytest.fixture
def places(sound: Path, tmp_path: Path) -> dict[str, Place]:
    """Where a config is stored: each takes the text and returns what a user would name."""
    run, lone = tmp_path / "run", tmp_path / "lone.pt"
    shutil.copytree(sound, run)
    payload = checkpoint.read(sound.parent / "lone.pt")
    description = json.loads((run / "export" / "model.json").read_text())

    def in_run(text: str) -> Path:
        (run / "config.yaml").write_text(text)
        return run

    def in_checkpoint(text: str) -> Path:
        checkpoint.write({**payload, "config_text": text}, lone)
        return lone

    def in_export(text: str) -> Path:
        (run / "export" / "model.json").write_text(json.dumps({**description, "config": text}))
        return run / "export"

    return {"run": in_run, "checkpoint": in_checkpoint, "export": in_export}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module beside the run, where Python looks; it leaves this file when it is imported."""
    (tmp_path / "planted.py").write_text(PLANTED)
    (tmp_path / "padst_exp_planted.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "it-ran"
    sys.modules.pop("planted", None)


def config_of(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    return loaded


def refused(read: Callable[[], object], what: str) -> str:
    """The line with which something is refused."""
    with pytest.raises(UserError) as error:
        read()
    line = str(error.value)
    assert line and "\n" not in line and len(line) < 600, f"{what}: {line}"
    return line


def of_no_use(read: Callable[[], object], what: str, said: pytest.CaptureFixture[str]) -> str:
    """The line with which a config is refused, or the checkpoint's taken instead."""
    said.readouterr()
    try:
        read()
    except UserError:
        return refused(read, what)
    (line,) = said.readouterr().err.splitlines()
    assert line.startswith("warning: run: expected "), what
    assert "config.yaml (" in line and "; taking the one in " in line and len(line) < 900, line
    return line


def test_only_constructors_of_ours_are_ever_called(
    places: dict[str, Place], planted: Path, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (what, config) in enumerate(harmful_configs(config_of(sound))):
        text = yaml.safe_dump(config)
        # As whoever reads it begins; some, and those of which only building shows it, to the end.
        try:
            stored.require_ours(stored.parse(text), "config.yaml", ())
            some = {"run": places["run"]}
        except ValueError as error:
            assert isinstance(error, UserError) or "interpolation" in str(error), what
            some = places if number % 16 == 0 else {}
        for place, store in some.items():
            path = store(text)
            take = of_no_use if place == "run" else lambda read, what, _: refused(read, what)
            take(lambda path=path: evaluated(path), f"{place}: {what}", capsys)
            assert not planted.exists(), f"{place}: {what}"
    path = places["run"](text)
    for read in (exported, analysed):
        refused(lambda read=read: read(path), "planted")
    assert not planted.exists()


def test_a_trusted_package_is_called_and_named(
    places: dict[str, Place], planted: Path, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(sound)
    config["logger"] = {"_target_": "planted.Thing"}
    path = places["run"](yaml.safe_dump(config))
    line = refused(lambda: evaluated(path), "not trusted")
    assert "logger: expected a _target_ in padst_exp.engine.loggers, got 'planted.Thing'" in line
    assert line.endswith("; trust=planted runs it all the same")
    # Neither a part of its name nor another package is a word for it.
    for trust in ("plant", "planted.Thing.x", "own", ("own", "another")):
        refused(lambda trust=trust: evaluated(path, trust=trust), str(trust))
    assert not planted.exists()
    for trust in ("planted", "planted.Thing", ("own", "planted")):
        evaluated(path, trust=trust)
        assert "logger is planted.Thing, which you trust" in capsys.readouterr().err
    assert planted.exists()


def test_nothing_in_a_stored_config_is_resolved(
    places: dict[str, Place], sound: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("SECRET", "a value of mine")
    for number, (what, config) in enumerate(resolving_configs(config_of(sound), "SECRET")):
        with pytest.raises((ValueError, OmegaConfBaseException)):
            stored.require_ours(stored.parse(yaml.safe_dump(config)), "config.yaml", ())
        for place, store in places.items() if number % 9 == 0 else ():
            path = store(yaml.safe_dump(config))
            line = of_no_use(lambda path=path: evaluated(path), f"{place}: {what}", capsys)
            assert "a value of mine" not in line
            if place != "export":
                of_no_use(lambda path=path: exported(path, tmp_path / "out"), what, capsys)
    for file in (tmp_path / "out").glob("*"):
        assert b"a value of mine" not in file.read_bytes()


def test_text_that_is_no_config_is_one_line(
    places: dict[str, Place], capsys: pytest.CaptureFixture[str]
) -> None:
    for text in (*HOSTILE_YAML, "", "a: [", "x" * (1 << 20) + ": 1", "model: 5", "speed: 5"):
        for place, store in places.items():
            path = store(text)
            line = of_no_use(lambda path=path: evaluated(path), repr(text[:50]), capsys)
            assert "run: expected a training config, got " in line
            assert line.startswith("warning: ") == (place == "run"), line


def test_a_config_cut_short_is_replaced_by_its_checkpoint_s(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(sound, tmp_path / "run"))
    file, expected = run / "config.yaml", evaluated(sound)
    lines = file.read_text().splitlines(keepends=True)
    whole = config_of(run)
    without = {key: value for key, value in whole.items() if key != "sparse"}
    shallower = {**whole, "model": {**whole["model"], "heads": 1}}
    for what, text in (
        ("has no", "".join(lines[: len(lines) // 2])),
        ("has no sparse", yaml.safe_dump(without)),
        ("has no", "".join(lines[: lines.index("logger:\n")])),
        ("model.heads=2 there and 1 here", yaml.safe_dump(shallower)),
    ):
        file.write_text(text)
        assert isinstance(yaml.safe_load(text), dict)
        said = of_no_use(lambda: evaluated(run), what, capsys)
        assert said.startswith("warning: ") and what in said and "best.pt" in said
        assert evaluated(run) == expected
    # Another place of the data, or another logger, is what the file is there for.
    file.write_text(yaml.safe_dump({**whole, "runs": "elsewhere", "device": "auto"}))
    capsys.readouterr()
    assert evaluated(run) == expected and capsys.readouterr().err == ""


def test_constructors_are_checked_without_asserts_too() -> None:
    code = (
        "from omegaconf import OmegaConf\n"
        "from padst_exp.config import build\n"
        "for target in ('shutil.rmtree', 'subprocess.run', 'padst_exp.errors.require'):\n"
        "    try: build(OmegaConf.create({'_target_': target}), 'model')\n"
        "    except ValueError as error: print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-O", "-c", code], env=environment, capture_output=True, text=True,
        timeout=120, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(line.startswith("model._target_: ") for line in lines), lines
    assert lines[2].endswith("require is no constructor: it takes valid by position")
