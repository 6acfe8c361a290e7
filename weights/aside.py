"""Atomic writes: files and folders are made in a temporary folder that names its process, then moved into
place.

    PARENT/.p2p-HOST-PID-BORN-RANDOM/     the files of a running process; removed when it ends, or if it was
                                          killed, by the next run on that machine
"""
from __future__ import annotations

import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OWNED = re.compile(r"\.p2p-(.+)-(\d+)-(\d+)-[^-]+")


@contextmanager
def aside(parent: Path) -> Iterator[Path]:
    """A temporary folder of this process in `parent`; its content is removed at the end. Raises OSError."""
    pid = os.getpid()
    folder = Path(tempfile.mkdtemp(prefix=f".p2p-{_host()}-{pid}-{_born(pid) or 0}-", dir=parent))
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except BaseException:   # a stop, in the middle of it
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """The path to write a file to, which then replaces `file` atomically: readers see the old one or the new
    one. First removes what processes that were killed left beside it.

    Raises OSError.
    """
    sweep(file.parent)
    with aside(file.parent) as folder:
        yield folder / file.name
        os.replace(folder / file.name, file)


@contextmanager
def appearing(folder: Path, marker: str) -> Iterator[Path]:
    """The folder to fill, which then appears at `folder` atomically. marker: the file that marks a finished
    one.

    An existing folder without it (of a copy that was stopped, say) is renamed to NAME.incomplete-...; a
    finished one, of another worker at the same job, is not touched. Raises OSError, there too.
    """
    with aside(folder.parent) as temporary:
        contents = temporary / folder.name
        contents.mkdir()
        yield contents
        if folder.exists() and not finished(folder / marker):
            os.rename(folder, folder.with_name(f"{folder.name}.incomplete-{secrets.token_hex(4)}"))
        os.rename(contents, folder)


def settle(source: Path, place: Path) -> None:
    """Moves a file or a folder to a path that does not exist. An interruption leaves nothing there.

    Raises OSError; FileExistsError where the path exists.
    """
    if source.is_dir():
        place.mkdir()              # fails if something is there
    else:
        try:
            os.link(source, place)   # fails if something is there; os.replace would not
            return
        except FileExistsError:
            raise
        except OSError:            # a file system without links
            os.close(os.open(place, os.O_CREAT | os.O_EXCL))
    try:
        os.replace(source, place)    # atomically, over an empty one
    except BaseException:
        if source.exists():
            place.rmdir() if source.is_dir() else place.unlink()
        raise


def finished(file: Path) -> bool:
    """Whether the file that marks a finished folder exists; an empty one is left by a power failure."""
    with suppress(OSError):
        return file.stat().st_size > 0
    return False


def sweep(parent: Path) -> None:
    """Removes temporary folders of killed processes of this machine in `parent`; not those of running ones or
    other machines."""
    with suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            owner = OWNED.fullmatch(entry.name)
            if owner and owner[1] == _host() and not _alive(int(owner[2]), owner[3]):
                shutil.rmtree(entry.path, ignore_errors=True)


def _host() -> str:
    """The name of this machine, or of this container (those of one name do not see each other's
    processes)."""
    space = ""
    with suppress(OSError):
        space = f"-{os.stat('/proc/self/ns/pid').st_ino}"
    return re.sub(r"[^\w.]", "_", platform.node())[:64] + space


def _alive(pid: int, born: str) -> bool:
    """Whether the process that was started then is running; True where that is unknown."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):   # another user's
        return True
    return _born(pid) in (None, born)


def _born(pid: int) -> str | None:
    """The start of a process in clock ticks after that of the machine ("-": it has ended, but was not waited
    for); None where the system has no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()   # after the program's name, which may hold anything
    return "-" if state in "ZX" else fields[18]
