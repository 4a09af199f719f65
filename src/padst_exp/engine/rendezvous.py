"""Where the processes of a run find each other, and one line where they cannot."""

import contextlib
import errno
import os
import socket
import threading
import time
from datetime import timedelta

from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from padst_exp.errors import UserError, require

PATIENCE = timedelta(hours=1)
"""How long a process waits for others that have begun."""

SECONDS_TO_REACH = 20
"""How long it looks for process 0; an address that is wrong should not cost more."""

SECONDS_TO_GATHER = 300
"""How long process 0 waits for the others to begin."""


def variable(name: str, values: range, default: str | None) -> int:
    """The whole number that a variable of the environment holds.

    Args:
        name: of the variable.
        values: that make sense.
        default: where it is unset; None: it must be set.

    Raises:
        UserError: it holds something else.
    """
    text = os.environ.get(name, default)
    wanted = f"a whole number from {values[0]} to {values[-1]} in the environment"
    found = "nothing" if text is None else repr(text)
    good = text is not None and text.isascii() and text.isdigit() and int(text) in values
    require(good, name, found, wanted)
    assert text is not None
    return int(text)


def meet(rank: int, size: int) -> Store:
    """The store of process 0, at MASTER_ADDR and MASTER_PORT of the environment.

    Raises:
        UserError: these are missing, the port is taken, nobody answers there, or process 0 counts
            other processes.
    """
    host = os.environ.get("MASTER_ADDR", "")
    require(host != "", "MASTER_ADDR", "nothing", "the host of process 0 in the environment")
    port = variable("MASTER_PORT", range(1, 1 << 16), None)
    # Where torchrun keeps a store already, all processes are guests of it.
    hosting = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if hosting:
        _require_free(port)
    else:
        _require_answer(host, port)
    store = _store(rank, size, SECONDS_TO_GATHER if hosting else SECONDS_TO_REACH)
    if store is None:
        wanted = f"a place where all {size} processes meet" if hosting else "that of process 0"
        raise UserError(f"MASTER_ADDR: expected {wanted}, got {host}:{port}, where nobody came")
    store = PrefixStore("default_pg", store)
    _require_same_size(store, rank, size)
    store.set_timeout(PATIENCE)
    return store


def _require_same_size(store: Store, rank: int, size: int) -> None:
    """All tell process 0, which is there until they have read what it counts itself."""
    names = [f"world_size/{rank}" for rank in range(size)]
    if rank == 0:
        store.set(names[0], str(size))
        store.wait(names)
        told = [int(store.get(name)) for name in names]
    else:
        told = [int(store.get(names[0])), size]
        store.set(names[rank], str(size))
    other = next((number for number in told if number != told[0]), told[0])
    wanted = f"{told[0]}, as in process 0, in every process"
    require(other == told[0], "WORLD_SIZE", other, wanted)


def _store(rank: int, size: int, seconds: float) -> Store | None:
    """The store that the environment names, or None where it is not to be had in time."""
    found: list[Store] = []

    def look() -> None:
        timeout = timedelta(seconds=seconds)
        with contextlib.suppress(DistError, TimeoutError):
            store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
            found.append(store)

    # Where another kind of server answers, PyTorch waits for ever, whatever its timeout.
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(seconds + 5)
    return found[0] if found else None


def _require_free(port: int) -> None:
    """Ask before PyTorch does, which would write lines of its own."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            why = "in use by another process" if in_use else error.strerror
            raise UserError(f"MASTER_PORT: expected a free port, got {port}, {why}") from error


def _require_answer(host: str, port: int) -> None:
    deadline = time.monotonic() + SECONDS_TO_REACH
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except (OSError, UnicodeError) as error:
            # Process 0 may begin a little later, and a name be known by then.
            if time.monotonic() > deadline:
                raise UserError(
                    f"MASTER_ADDR: expected the host of process 0, which answers within "
                    f"{SECONDS_TO_REACH} s, got {host}:{port} ({error})"
                ) from error
        time.sleep(0.2)
