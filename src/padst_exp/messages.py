"""What data and models have to say while they are built."""

import os
import sys

from tqdm import tqdm


def say(line: str) -> None:
    """Write one line to stderr, on one process of a run; above the bar if there is one."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)
