import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from padst_exp.atomic import replacing, temporary_name
from padst_exp.engine import lock
from padst_exp.engine.lock import Lock
from padst_exp.errors import UserError
from padst_exp.processes import Process

ELSEWHERE = str(Process("0123456789ab", 17, "4"))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "SILENT_S", 0.6)


def left_by(folder: Path, owner: str) -> Path:
    path = folder / "lock.json"
    path.write_text(json.dumps({"process": 17, "host": "h", "since": "then", "owner": owner}))
    return path


def dead() -> str:
    with subprocess.Popen(["sleep", "60"]) as process:
        stat = Path(f"/proc/{process.pid}/stat").read_text()
        process.kill()
    started = stat.rpartition(")")[2].split()[19]
    return str(Process(Process.here().place, process.pid, started))


def test_a_second_owner_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    first = Lock(tmp_path)
    first.acquire()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on host .* since 2"):
        Lock(tmp_path).acquire()
    first.require()
    first.release()
    first.release()
    assert not list(tmp_path.iterdir())
    Lock(tmp_path).acquire()


def test_a_dead_owner_is_outlived_at_once(tmp_path: Path) -> None:
    left_by(tmp_path, dead())
    began = time.monotonic()
    held = Lock(tmp_path)
    held.acquire()
    assert time.monotonic() - began < 0.5
    held.release()
    assert not list(tmp_path.iterdir())


def test_an_owner_elsewhere_lives_as_long_as_it_beats(tmp_path: Path) -> None:
    path = left_by(tmp_path, ELSEWHERE)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            os.utime(path)

    beating = threading.Thread(target=beat)
    beating.start()
    with pytest.raises(UserError, match="in use by process 17 on host h since then"):
        Lock(tmp_path).acquire()
    stop.set()
    beating.join()
    began = time.monotonic()
    Lock(tmp_path).acquire()
    assert time.monotonic() - began > 0.4
    # One that has been silent for long already is not waited for.
    path = left_by(tmp_path, ELSEWHERE)
    os.utime(path, (0, 0))
    began = time.monotonic()
    Lock(tmp_path).acquire()
    assert time.monotonic() - began < 0.3


def test_a_damaged_lock_is_nobodys_unless_it_beats(tmp_path: Path) -> None:
    for content in (b"", b"{", b"[1]", b"\xff"):
        (tmp_path / "lock.json").write_bytes(content)
        held = Lock(tmp_path)
        held.acquire()
        held.release()


def test_it_beats(tmp_path: Path) -> None:
    held = Lock(tmp_path)
    held.acquire()
    os.utime(held.path, (0, 0))
    deadline = time.monotonic() + 5
    while held.path.stat().st_mtime == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    held.release()


def test_who_was_silent_notices_that_another_took_over(tmp_path: Path) -> None:
    held = Lock(tmp_path)
    held.acquire()
    held.path.unlink()
    held.require()  # removed by hand: made anew
    held.path.unlink()
    left_by(tmp_path, ELSEWHERE)
    with pytest.raises(UserError, match="taken over by process 17 on host h"):
        held.require()
    held.release()
    assert (tmp_path / "lock.json").exists()


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    first = Lock(tmp_path)
    first.acquire()
    with pytest.raises(UserError, match="in use by"):
        Lock(tmp_path).acquire()
    first.release()


def test_leftovers_go_with_their_owners(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    of_the_dead = path.with_name(f".tokens.{dead()}-00000000.tmp")
    alive, elsewhere, old, named = (
        temporary_name(tmp_path / "tokens2"),
        path.with_name(f".tokens.{ELSEWHERE}-00000000.tmp"),
        path.with_name(f".tokens.{ELSEWHERE}-11111111.tmp"),
        path.with_name(".tokens.mine.tmp"),
    )
    for left in (of_the_dead, alive, elsewhere, old, named):
        left.write_text("half")
    os.utime(old, (0, 0))
    with replacing(path) as file:
        file.write(b"whole")
    assert set(tmp_path.iterdir()) == {path, alive, elsewhere, named}
    assert path.read_bytes() == b"whole"
