import json
import subprocess
from pathlib import Path

import pytest
import yaml

from padst_exp.engine import run_directory
from padst_exp.engine.distributed import World
from padst_exp.engine.records import read_metrics
from padst_exp.engine.run_directory import RunDirectory
from padst_exp.errors import UserError

SUMMARY = {"monitor": "x", "final": {"x": 1}}


def create(root: Path, resume: str = "never", lr: float = 0.1) -> RunDirectory:
    return RunDirectory.open(
        root,
        "run",
        World(),
        resume=resume,  # type: ignore[arg-type]
        config={"optimizer": {"lr": lr}},
        config_text=f"optimizer:\n  lr: {lr}\nruns: here\n",
        overrides=["optimizer.lr=0.1", 'name="a: b"'],
    )


def test_what_a_new_folder_holds(tmp_path: Path) -> None:
    path = create(tmp_path / "deep" / "runs").path
    assert {entry.name for entry in path.iterdir()} == {
        "config.yaml",
        "overrides.yaml",
        "env.json",
        "checkpoints",
        "lock.json",
    }
    assert yaml.safe_load((path / "config.yaml").read_text())["optimizer"] == {"lr": 0.1}
    overrides = yaml.safe_load((path / "overrides.yaml").read_text())
    assert overrides == ["optimizer.lr=0.1", 'name="a: b"']
    environment = json.loads((path / "env.json").read_text())
    assert environment["device"] == "cpu" and environment["packages"]["torch"]
    assert environment["git_commit"] is None or len(environment["git_commit"]) == 40


def test_a_copy_in_somebodys_repository_is_not_taken_for_their_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for arguments in (("init", "-q"), (*identity, "commit", "-q", "--allow-empty", "-m", "theirs")):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    copy = tmp_path / "run_directory.py"
    copy.write_text("")
    monkeypatch.setattr(run_directory, "__file__", str(copy))
    found = run_directory.environment("cpu")
    assert (found["git_commit"], found["git_dirty"]) == (None, None)
    subprocess.run(["git", "-C", str(tmp_path), "add", copy.name], check=True)
    assert len(str(run_directory.environment("cpu")["git_commit"])) == 40


def test_never_takes_a_folder_of_its_own(tmp_path: Path) -> None:
    names = [create(tmp_path).path.name for _ in range(3)]
    assert names == ["run", "run-2", "run-3"]


def test_auto_continues_the_folder_of_its_name(tmp_path: Path) -> None:
    first = create(tmp_path, "auto")
    first.close()
    again = create(tmp_path, "auto")
    assert again.path == first.path and not again.finished
    again.open_metrics(0)
    assert (again.path / "env-resume-1.json").exists()
    first.finish(SUMMARY)
    assert again.finished and again.summary() == SUMMARY


def test_auto_continues_the_newest_of_several(tmp_path: Path) -> None:
    create(tmp_path).finish(SUMMARY)
    second = create(tmp_path)
    second.close()
    assert second.path.name == "run-2"
    assert create(tmp_path, "auto").path == second.path


def test_auto_leaves_a_foreign_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    assert create(tmp_path, "auto").path.name == "run-2"
    assert (tmp_path / "run" / "thesis.tex").read_text() == "precious"


def test_auto_refuses_another_configuration(tmp_path: Path) -> None:
    create(tmp_path, "auto", lr=0.1).close()
    with pytest.raises(UserError, match=r"optimizer\.lr=0\.1 there and 0\.2 here"):
        create(tmp_path, "auto", lr=0.2)


def test_auto_says_why_it_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create(tmp_path, "auto").close()
    assert f"no run run to continue in {tmp_path}, a new one begins\n" in capsys.readouterr().err
    (tmp_path / "run").rename(tmp_path / "old")
    create(tmp_path, "auto", lr=0.2).close()
    said = capsys.readouterr().err
    assert "the nearest is old, which differs in optimizer.lr=0.1 there and 0.2 here" in said
    create(tmp_path, "never", lr=0.3).close()
    create(tmp_path, "auto", lr=0.3).close()
    assert capsys.readouterr().err == ""


def test_a_new_folder_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: str) -> None:
        assert not (tmp_path / "run").exists()
        raise OSError(30, "Read-only file system", "env.json")

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "environment", fail)
        with pytest.raises(UserError, match=r"runs: expected a folder that can be written, .*Read"):
            create(tmp_path)
    assert not list(tmp_path.iterdir())


def test_metrics_are_cut_to_the_checkpoint(tmp_path: Path) -> None:
    directory = create(tmp_path)
    path = directory.path / "metrics.jsonl"
    directory.open_metrics(0)
    for step in (1, 2, 3):
        directory.append({"step": step, "loss": 0.1 * step})
        assert len(read_metrics(path)) == step  # no buffer keeps a row from its readers
    directory.sync_metrics()
    directory.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed here
    directory.open_metrics(2)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    directory.append({"step": 3, "loss": 0.5})
    directory.close()
    assert [row["loss"] for row in read_metrics(path)] == [0.1, 0.2, 0.5]
