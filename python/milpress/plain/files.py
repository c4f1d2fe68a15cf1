"""Files that are written as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from milpress.errors import (
    CompressionError,
    DestinationError,
    PackageNotFoundError,
    StorageError,
)

DRAFT_MARK = ".milpress-"

# Noted before they are made: a signal may end the work at any moment, and whoever handles it has
# nothing but this to go by.
_drafts: dict[Path, Callable[[], None]] = {}


def draft_of(path: Path, take_back: Callable[[Path], None]) -> Path:
    """Return a name beside a path for what is to become it, and note how it is taken back."""
    draft = path.with_name(f".{path.name}{DRAFT_MARK}{secrets.token_hex(4)}")
    _drafts[draft] = lambda: take_back(draft)
    return draft


def end_draft(draft: Path) -> None:
    """Take back what is left of a draft, if anything is."""
    take_back = _drafts.get(draft)
    if take_back is not None:
        with contextlib.suppress(OSError):
            take_back()
        # Only now: a signal in between finds it still noted.
        _drafts.pop(draft, None)


def end_all_drafts() -> None:
    """Take back every draft of this process."""
    for draft in list(_drafts):
        end_draft(draft)


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_free(path: Path, *, force: bool, is_package: bool = False) -> None:
    """Refuse a destination that is taken.

    Parameters
    ----------
    path
        The destination.
    force
        Whether what is there is replaced.
    is_package
        Whether it is for a package, which is a folder, rather than for a file.

    Raises
    ------
    DestinationError
        If something is there, without ``force``; or a folder in place of a file.
    PackageNotFoundError
        If its parent folder does not exist.
    """
    if not path.absolute().parent.is_dir():
        msg = f"{path}: the folder {path.absolute().parent} does not exist"
        raise PackageNotFoundError(msg)
    if path.is_dir() and not is_package:
        msg = f"{path} is a folder; give the path of a file"
        raise DestinationError(msg)
    if os.path.lexists(path) and not force:
        msg = f"{path} exists already; --force (force=True) replaces it"
        raise DestinationError(msg)


@contextlib.contextmanager
def draft_in_place_of(path: Path) -> Iterator[Path]:
    """Yield a name to write a file under; it takes the place of another once the block has ended.

    Whatever ends the block early, the other is as it was before. A terminal or a pipe is written to
    directly.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    target = path.resolve()
    draft = draft_of(target, remove)
    try:
        yield draft
        draft.replace(target)
    finally:
        end_draft(draft)


@contextlib.contextmanager
def folder_in_place_of(path: Path) -> Iterator[Path]:
    """Yield a new folder to write files in; it takes the place of another once the block has ended.

    Whatever ends the block early, the other is as it was before.

    Raises
    ------
    StorageError
        If the system refuses.
    """

    def give_back(previous: Path) -> None:
        if previous.exists() and not target.exists():
            previous.rename(target)
        remove(previous)

    target = path.absolute()
    draft, previous = draft_of(target, remove), draft_of(target, give_back)
    try:
        with system_errors(path):
            draft.mkdir()
            yield draft
            if target.exists():
                target.rename(previous)
            draft.rename(target)
    finally:
        end_draft(draft)
        end_draft(previous)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file such that it is there as a whole or, whatever happens, as it was before.

    Raises
    ------
    StorageError
        If the system refuses.
    """
    with system_errors(path), draft_in_place_of(path) as draft:
        draft.write_bytes(data)


@contextlib.contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Turn what the system refuses into a `StorageError` that says where."""
    try:
        yield
    except CompressionError:
        raise
    except OSError as error:
        where = error.filename or path
        reason = error.strerror or str(error)
        raise StorageError(error.errno or 0, reason, str(where)) from error
