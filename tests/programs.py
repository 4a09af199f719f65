"""How programs are started in this process."""

from collections.abc import Callable


def exit_status(main: Callable[[], object]) -> int:
    """With which status a program ends that reads `sys.argv`."""
    try:
        main()
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code
    return 0
