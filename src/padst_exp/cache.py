"""The folder where prepared data and measured decisions are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$PADST_CACHE`, or `~/.cache/padst_exp`. May not exist yet."""
    return Path(os.environ.get("PADST_CACHE") or Path.home() / ".cache" / "padst_exp")
