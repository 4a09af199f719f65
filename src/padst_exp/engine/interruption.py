"""A run that is asked to end does so between two steps, with a checkpoint."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from padst_exp.signals import ENDING, PEOPLE, exit_status

# Launchers pass a signal on to processes that have it already; a person takes longer.
IMPATIENT_S = 2.0


class Interrupted(SystemExit):
    """The run was asked to end and has saved its state.

    Uncaught, it ends the process with the status that shells give to the signal (143 for SIGTERM,
    130 for SIGINT), or with `signals.REQUEUE` where a scheduler gave warning.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(exit_status(signum))
        self.signum = signum


class Interruption:
    """A context in which signals that ask for an end are only noted.

    Ctrl-C (or Ctrl-\\) once more, two seconds later, acts at once. What is ignored on entry, as
    under nohup, stays ignored.

    Attributes:
        signum: the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._noted = 0.0
        self._handlers = _Handlers(self._note)

    def __enter__(self) -> "Interruption":
        self._handlers.set()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._handlers.restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signum is None:
            self.signum, self._noted = signum, now
        elif signum in PEOPLE and now - self._noted > IMPATIENT_S:
            self._handlers.restore()
            signal.raise_signal(signum)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """A block that these signals end where it stands, as `Interrupted`; Ctrl-C stays Python's.

    For all that comes before and after the steps, where there is nothing to save.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    handlers = _Handlers(end, but=signal.SIGINT)
    handlers.set()
    try:
        yield
    finally:
        handlers.restore()


class _Handlers:
    """What these signals do in this process, while it is `set`."""

    def __init__(
        self, handler: Callable[[int, FrameType | None], None], but: signal.Signals | None = None
    ) -> None:
        self.handler, self.signums = handler, [signum for signum in ENDING if signum != but]
        self.before: dict[int, Any] = {}

    def set(self) -> None:
        # Python delivers signals to the main thread only, and lets only it set handlers.
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in self.signums:
            before = signal.getsignal(signum)
            if before not in (signal.SIG_IGN, None):
                self.before[signum] = before
                signal.signal(signum, self.handler)

    def restore(self) -> None:
        if threading.current_thread() is threading.main_thread():
            while self.before:
                signal.signal(*self.before.popitem())
