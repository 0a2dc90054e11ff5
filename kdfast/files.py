"""Files and folders that are whole or not there, after a power failure too."""

from __future__ import annotations

import os
from pathlib import Path

# Behind a name: what is being written. Only a rename takes it away.
TEMPORARY = ".tmp"


def temporary_of(path: Path) -> Path:
    return path.with_name(path.name + TEMPORARY)


def write(path: Path, content: bytes) -> None:
    """The whole file or the one before."""
    temporary = temporary_of(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        # Not all of them name a file, and none the one that was asked for.
        raise OSError(error.errno, error.strerror, str(path)) from error


def rename(temporary: Path, path: Path) -> None:
    """Give what is whole, and on the disk, its name."""
    os.replace(temporary, path)
    fsync(path.parent)
    if temporary.parent != path.parent:
        fsync(temporary.parent)


def fsync(path: Path) -> None:
    # Windows opens no directory, and needs not.
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_all(folder: Path) -> None:
    """A folder with everything in it."""
    for path in folder.iterdir():
        if path.is_dir():
            fsync_all(path)
        else:
            fsync(path)
    fsync(folder)
