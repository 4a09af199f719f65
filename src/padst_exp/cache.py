"""The folder where prepared data and measured decisions are kept between runs."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """`$PADST_CACHE`, or `~/.cache/padst_exp`. May not exist yet."""
    return Path(os.environ.get("PADST_CACHE") or Path.home() / ".cache" / "padst_exp")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that other processes see whole or not at all; creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
