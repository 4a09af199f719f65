"""An entry point run in this process as the command line runs it, and what is wrong with that."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from padst_exp.files import sha256

SECONDS = 300
LONGEST = 3000


class Reached(Exception):
    """Everything was accepted, and training would begin now."""


def fault(
    main: Callable[[], None], arguments: Sequence[str], folder: Path, expected: str = ""
) -> str | None:
    """What is wrong with how a program took `arguments`, in `folder`; None for nothing.

    Right is a run that ends with status 0 (or is `Reached`), or one line on stderr, another status
    and a folder that is as it was, but for what a training saves that had begun. Where a line is
    `expected` to begin so, nothing else is right.
    """
    before, said = contents(folder), io.StringIO()
    argv, here = sys.argv, Path.cwd()
    os.chdir(folder)
    sys.argv = ["padst", *arguments]
    status: object = 0
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), _no_longer():
            main()
    except Reached:
        return "accepted" if expected else None
    except SystemExit as stop:
        status = stop.code
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        return f"traceback: {type(error).__name__}: {str(error)[:200]} ({place})"
    finally:
        sys.argv = argv
        os.chdir(here)
    if status == 0:
        return "accepted" if expected else None
    lines = said.getvalue().splitlines()
    errors = [line for line in lines if line.startswith("padst_exp: error: ")]
    if status not in (1, 2) or len(errors) != 1 or lines[-1:] != errors:
        return f"not one line, status {status}: {lines[-4:]}"
    if len(errors[0]) > LONGEST or not errors[0].isprintable():
        return f"too long, or not printable: {errors[0][:300]!r}"
    line = errors[0].removeprefix("padst_exp: error: ")
    if line.strip() in ("", "None") or not line.startswith(expected):
        return f"another line: {line}"
    after = contents(folder)
    begun = any(one.endswith("; resume=auto continues") for one in lines) and before <= after
    return None if after == before or begun else f"left on disk: {sorted(after ^ before)[:4]}"


def contents(folder: Path) -> set[str]:
    """What is on disk: each path with its kind, its digest or its target."""
    return {f"{path.relative_to(folder)}: {_state(path)}" for path in folder.rglob("*")}


def _state(path: Path) -> str:
    if path.is_symlink():
        return f"a link to {os.readlink(path)}"
    if path.is_file():
        return sha256(path) if os.access(path, os.R_OK) else "closed"
    return "a folder" if path.is_dir() else "no file"


@contextlib.contextmanager
def _no_longer() -> Iterator[None]:
    def stop(signum: int, frame: object) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
