"""Directories that appear whole or not at all. Torch-free."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_taken(directory: Path) -> bool:
    """Whether something stands there that `replaced_directory` would remove."""
    return directory.exists() and (not directory.is_dir() or any(directory.iterdir()))


@contextmanager
def replaced_directory(directory: Path) -> Iterator[Path]:
    """Yields a temporary sibling that takes the place of `directory` on success and vanishes on failure."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        existed = directory.exists()
        old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
        try:
            if existed:
                directory.replace(old)  # an empty directory may be replaced by a directory
            temporary.replace(directory)
        except BaseException:
            if existed and not directory.exists():  # Ctrl-C or an error between the two renames
                old.replace(directory)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def recover_directory(directory: Path) -> bool:
    """Puts back what `replaced_directory` had set aside when the process was killed between its two renames.

    Returns:
        Whether there was something to put back.
    """
    if directory.exists() or not directory.parent.is_dir():
        return False
    set_aside = [path for path in directory.parent.glob(f".{directory.name}.old.*") if any(path.iterdir())]
    if not set_aside:
        return False
    max(set_aside, key=lambda path: path.stat().st_mtime_ns).replace(directory)
    return True
