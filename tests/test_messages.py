import contextlib
import os
import sys
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import pytest

from padst_exp import messages
from padst_exp.messages import outlive_readers, say


@contextlib.contextmanager
def piped(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileIO]:
    """Lets stderr be a pipe, whose reading end this is. Inside a test: pytest captures anew."""
    kept = os.dup(2)
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", None)
            patch.setattr(messages._Unbreakable, "patience", 0.2)
            patch.setattr(messages, "UNREAD_S", 0.2)
            outlive_readers()
            with open(reader, "rb", buffering=0) as end:
                yield end
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_what_is_read_arrives_as_it_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with piped(monkeypatch) as reader:
        for line in ("one", "Stra\u00dfe", "x" * 10_000):
            say(line)
        read = b""
        while not read.endswith(b"x\n"):
            read += reader.read(1 << 16)
        assert read.decode() == f"one\nStra\u00dfe\n{'x' * 10_000}\n"


def test_a_closed_pipe_takes_everything_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    with piped(monkeypatch) as reader:
        reader.close()
        for _ in range(3):
            say("nobody reads this")
        assert os.write(2, b"nor what a library writes") > 0


def test_a_pipe_that_nobody_empties_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with piped(monkeypatch) as reader:
        began = time.monotonic()
        for number in range(3000):  # a pipe holds 65,536 bytes
            say(f"{number:06d} {'x' * 90}")
        assert time.monotonic() - began < 5
        os.set_blocking(reader.fileno(), False)
        while reader.read(1 << 20):
            pass
        say("read again")
        assert reader.read(1 << 20).endswith(b"read again\n")


def test_a_full_disk_costs_the_line_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with piped(monkeypatch):
        for target in ("/dev/full", tmp_path / "log"):
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 2)
            os.close(descriptor)
            say("a line")
        assert (tmp_path / "log").read_text() == "a line\n"
