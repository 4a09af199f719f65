"""One run directory, one process: a file that names its owner and outlives no dead one.

Made by an exclusive link, which network file systems keep their word about. On the owner's own
machine the process itself tells whether it lives; elsewhere its beats do: it touches the file every
few seconds, and both touch and age are by the clock of the file's server.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import threading
import time
import uuid
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from padst_exp.atomic import temporary_name
from padst_exp.errors import UserError
from padst_exp.messages import say
from padst_exp.processes import Process

BEAT_S = 10.0
SILENT_S = 60.0
"""An owner elsewhere that has not touched the file for so long is taken for dead."""


class Lock:
    """Held from `acquire` until `release`.

    Attributes:
        path: of the file; whoever moves its folder sets it anew.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock.json"
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()

    def acquire(self) -> None:
        """Take the folder, from an owner that is dead if need be.

        Raises:
            UserError: another process has it; the line says which.
        """
        now = self._link()
        while now is not None:
            self._remove_what_is_no_lock()
            found = _Found.read(self.path)
            if found is not None and found.content.get("token") == self._token:
                break  # a network answered twice
            if found is not None:
                if found.lives(self.path, now):
                    raise UserError(
                        f"{self.path.parent}: in use by {found.owner}; wait for its end, or choose "
                        "another name"
                    )
                self._take_away(found)
            now = self._link()
        threading.Thread(target=self._beat, daemon=True).start()

    def require(self) -> None:
        """Raise a `UserError` where another process has taken the folder, as it may from one that
        was suspended for long; make the file anew where somebody removed it."""
        if self._mine() or (self._link() is None):
            return
        found = _Found.read(self.path)
        owner = "another process" if found is None else found.owner
        raise UserError(f"{self.path.parent}: taken over by {owner} while this one was silent")

    def release(self) -> None:
        """Let go of it; again does nothing."""
        self._stop.set()
        with contextlib.suppress(OSError):
            if self._mine():
                self.path.unlink()

    def _mine(self) -> bool:
        found = _Found.read(self.path)
        return found is not None and found.content.get("token") == self._token

    def _link(self) -> float | None:
        """Make the file; where there is one already, return what time it is at its server."""
        process = Process.here()
        content = {
            "process": process.pid,
            "host": socket.gethostname(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "owner": str(process),
            "token": self._token,
        }
        text = json.dumps(content, indent=2) + "\n"
        temporary = temporary_name(self.path)
        try:
            with open(temporary, "x") as file:
                file.write(text)
            try:
                os.link(temporary, self.path)
            except FileExistsError:
                return temporary.stat().st_mtime
            except OSError:  # not every file system has hard links
                try:
                    with open(self.path, "x") as file:
                        file.write(text)
                except FileExistsError:
                    return temporary.stat().st_mtime
        finally:
            temporary.unlink(missing_ok=True)
        return None

    def _remove_what_is_no_lock(self) -> None:
        """A link, a pipe or a device was put there by nobody who works on the folder."""
        with contextlib.suppress(FileNotFoundError):
            mode = self.path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                self.path.unlink()

    def _take_away(self, found: _Found) -> None:
        """Remove the file that was `found`, and no other that took its place meanwhile."""
        aside = temporary_name(self.path)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if aside.read_bytes() != found.raw:
                os.rename(aside, self.path)
            else:
                aside.unlink()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self.path)


class _Found:
    """A lock file as it was at one moment.

    Args:
        raw: its bytes.
        touched: its last beat, by its server's clock.
    """

    def __init__(self, raw: bytes, touched: float) -> None:
        self.raw, self.touched = raw, touched
        self.content: Mapping[str, Any] = {}
        with contextlib.suppress(ValueError):
            content = json.loads(raw)
            self.content = content if isinstance(content, dict) else {}

    @classmethod
    def read(cls, path: Path) -> _Found | None:
        """None where there is no such file. Opening it asks a network's server for its state."""
        try:
            with open(path, "rb") as file:
                return cls(file.read(), os.fstat(file.fileno()).st_mtime)
        except FileNotFoundError:
            return None

    @property
    def owner(self) -> str:
        """For people."""
        process, host, since = (self.content.get(key) for key in ("process", "host", "since"))
        return f"process {process} on host {host} since {since}" if process else "another process"

    def lives(self, path: Path, now: float) -> bool:
        """Whether its owner does. May wait until the owner has been silent for long.

        Args:
            path: of the file.
            now: by the clock of its server.
        """
        owner = Process.parse(str(self.content.get("owner")))
        alive = None if owner is None else owner.lives()
        if alive is not None:
            return alive
        deadline = time.monotonic() + SILENT_S - max(0.0, now - self.touched)
        if deadline > time.monotonic():
            say(
                f"{path.parent}: held by {self.owner}; waiting up to "
                f"{deadline - time.monotonic():.0f} s for a sign of life"
            )
        while time.monotonic() < deadline:
            time.sleep(min(1.0, BEAT_S))
            found = _Found.read(path)
            if found is None:
                return False
            if (found.raw, found.touched) != (self.raw, self.touched):
                return True
        return False
