"""SIGTERM and SIGINT end a run between two steps, with a checkpoint."""

import signal
import threading
from types import FrameType, TracebackType


class Interrupted(SystemExit):
    """The run was asked to end and has saved its state.

    Uncaught, it ends the process with the status that shells give to the signal: 143 for SIGTERM,
    130 for SIGINT.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class Interruption:
    """A context in which the first SIGTERM or SIGINT is only noted; a second one acts at once.

    Attributes:
        signum: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before = {
            signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)
        }

    def __enter__(self) -> "Interruption":
        # Python delivers signals to the main thread only, and lets only it set handlers.
        if threading.current_thread() is threading.main_thread():
            for signum in self._before:
                signal.signal(signum, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
