"""Files and folders that appear in one step: made in a folder that names its owner, then moved into place.

    PARENT/.p2p-HOST-PID-BORN-RANDOM/     what a process is writing; gone when it ends, and if it was killed,
                                          when the next run on that machine begins
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
    """A new folder of this process in `parent`; what is not moved out of it goes with it. Raises OSError."""
    pid = os.getpid()
    folder = Path(tempfile.mkdtemp(prefix=f".p2p-{_host()}-{pid}-{_born(pid) or 0}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Where to write a file, which is then at its place in one step: readers see the old one or the new one.

    Raises OSError.
    """
    with aside(file.parent) as own:
        yield own / file.name
        os.replace(own / file.name, file)


@contextmanager
def appearing(folder: Path, whole: str) -> Iterator[Path]:
    """A folder to fill, which is then at its place in one step. whole: the file by which a finished one is
    known.

    A folder that stands there without it (a copy that was stopped, say) is renamed to NAME.incomplete-...; a
    finished one, of another worker at the same job, is not touched. Raises OSError, there too.
    """
    with aside(folder.parent) as own:
        made = own / folder.name
        made.mkdir()
        yield made
        if folder.exists() and not finished(folder / whole):
            os.rename(folder, folder.with_name(f"{folder.name}.incomplete-{secrets.token_hex(4)}"))
        os.rename(made, folder)


def settle(made: Path, place: Path) -> None:
    """Moves a file or a folder to a place where nothing is. Whoever is stopped midway leaves nothing there.

    Raises OSError; FileExistsError where there is something by now.
    """
    if made.is_dir():
        place.mkdir()              # fails if something is there
    else:
        try:
            os.link(made, place)   # likewise; os.replace would not
            return
        except FileExistsError:
            raise
        except OSError:            # a file system without links
            os.close(os.open(place, os.O_CREAT | os.O_EXCL))
    try:
        os.replace(made, place)    # in one step, over what is empty
    except BaseException:
        if made.exists():
            place.rmdir() if made.is_dir() else place.unlink()
        raise


def finished(file: Path) -> bool:
    """Whether the file that ends a folder is there; an empty one is what a power failure leaves."""
    with suppress(OSError):
        return file.stat().st_size > 0
    return False


def sweep(parent: Path) -> None:
    """Removes what killed processes of this machine left in `parent`; nothing of living ones or other
    machines."""
    with suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            owner = OWNED.fullmatch(entry.name)
            if owner and owner[1] == _host() and not _alive(int(owner[2]), owner[3]):
                shutil.rmtree(entry.path, ignore_errors=True)


def _host() -> str:
    """This machine; of containers that share its name, each (they do not see each other's processes)."""
    space = ""
    with suppress(OSError):
        space = f"-{os.stat('/proc/self/ns/pid').st_ino}"
    return re.sub(r"[^\w.]", "_", platform.node())[:64] + space


def _alive(pid: int, born: str) -> bool:
    """Whether the process that was started then runs; True where that cannot be told."""
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
    """When a process was started, in clock ticks since the machine was ("-": it has ended, but was not waited
    for); None where the system has no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *rest = text.rpartition(")")[2].split()   # after the program's name, which may hold anything
    return "-" if state in "ZX" else rest[18]
