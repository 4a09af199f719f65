"""Times `python -m padst_exp.train --help`, which must stay under three seconds."""

import statistics
import subprocess
import sys
import time

LIMIT_SECONDS = 3.0


def main() -> int:
    """Print the median of five starts; 1 when it is over the limit."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "padst_exp.train", "--help"], check=True, capture_output=True
        )
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    print(f"padst_exp.train --help: median {median:.2f} s of 5 (limit {LIMIT_SECONDS:.0f} s)")
    return int(median > LIMIT_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
