"""Structured sparse training: dynamic topologies, learned permutations, real sparse storage."""

import os
import signal
import sys

__version__ = "0.1.0"


def end_quietly(signum: int, frame: object) -> None:
    """Answer Ctrl-C while a program of ours still imports what it needs: nothing has begun."""
    os.write(2, b"padst_exp: interrupted\n")
    os._exit(128 + signum)


# This is what Python runs first of `python -m padst_exp.train` or of `padst-train`. A library that
# is imported leaves signals alone.
_program = sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0]).startswith("padst-")
if _program and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_quietly)
