"""Files of lines: a line stands there whole or not at all, whatever ends the run."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterable

from stars.errors import RequestError

try:
    import fcntl
except ImportError:  # a system without POSIX locks
    fcntl = None  # type: ignore[assignment]

ADVICE = "make room and run again"
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class LineFile:
    """An open file that takes lines of UTF-8, each in one write at its end.

    Where a write fails in the middle (a full disk, a size limit, an interrupt), a regular file is cut back to the lines
    before it; pipes and devices take what they can. Only one LineFile at a time has a regular file open.

    path: "-" is stdout. advice: what is to be done where there is no room left. Raises OSError, with the file's name,
    and RequestError for a file that another run has open.
    """

    def __init__(self, path: str | os.PathLike[str], advice: str = ADVICE):
        self.name = os.fspath(path)
        self.advice = advice
        standard = 1 if self.name == "-" else _standard_stream(self.name)
        if standard is None:
            self.fd = os.open(self.name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        else:  # opened by its name it would have a place of its own, and write over what the others write
            self.name = "stdout" if self.name == "-" else self.name
            self.fd = os.dup(standard)
        self.regular = stat.S_ISREG(os.fstat(self.fd).st_mode)
        self.owned = self.regular and standard is None
        if self.owned and not (self._lock(self.fd) and os.path.samestat(os.fstat(self.fd), os.stat(self.name))):
            os.close(self.fd)
            raise RequestError(f"{self.name} is being written by another run: wait for it, or name another file")

    def write(self, text: str) -> None:
        """Writes `text`, which ends with a line end (several lines stand or fall together)."""
        rest = memoryview(text.encode("utf8"))
        try:
            start = self._end()
            try:
                while rest:
                    rest = rest[os.write(self.fd, rest):]
            except BaseException:
                if start is not None:
                    with contextlib.suppress(OSError):
                        os.ftruncate(self.fd, start)
                        os.lseek(self.fd, start, os.SEEK_SET)
                raise
        except OSError as error:
            raise self._named(error) from error

    def clear(self) -> None:
        """Empties a file of its own; what was redirected here by a shell, a pipe or a device stays as it is."""
        if self.owned:
            os.ftruncate(self.fd, 0)

    def replace(self, lines: Iterable[bytes]) -> None:
        """Puts `lines` in the place of all content, at one moment: a kill leaves the old lines or the new ones."""
        path = os.path.realpath(self.name)
        beside = f"{path}.stars-tmp"  # the lock on the file covers this name, too
        try:
            with contextlib.suppress(FileNotFoundError):  # a kill left one
                os.unlink(beside)
            new = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
            try:
                os.chmod(beside, stat.S_IMODE(os.fstat(self.fd).st_mode))
                self._lock(new)
                with open(new, "wb", closefd=False) as file:
                    file.writelines(lines)
                os.fsync(new)
                os.replace(beside, path)
                os.dup2(new, self.fd, inheritable=False)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(beside)
                raise
            finally:
                os.close(new)
        except OSError as error:
            raise self._named(error) from error

    def size(self) -> int:
        """Bytes in it."""
        return os.fstat(self.fd).st_size

    def close(self) -> None:
        """Closes it."""
        try:
            os.close(self.fd)
        except OSError as error:  # where a file system tells only now
            raise self._named(error) from error

    def __enter__(self) -> LineFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end(self) -> int | None:
        """Where the next line begins, if that is the end of a regular file."""
        if not self.regular:
            return None
        size = self.size()
        appends = self.owned or fcntl is not None and fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_APPEND
        return size if appends or os.lseek(self.fd, 0, os.SEEK_CUR) == size else None

    def _lock(self, fd: int) -> bool:
        """Takes the file for this run; False where another one has it."""
        try:
            if fcntl is not None:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
        return True

    def _named(self, error: OSError) -> OSError:
        advice = f": {self.advice}" if error.errno in FULL else ""
        return OSError(error.errno, f"{error.strerror}{advice}", self.name)


class StreamLines:
    """What takes a LineFile's place where something in this process has replaced stdout."""

    name = "stdout"

    def write(self, text: str) -> None:
        """Writes whole lines at once."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def clear(self) -> None:
        """There is nothing to empty."""

    def size(self) -> int:
        """Nothing stands in it that could be read."""
        return 0

    def close(self) -> None:
        """Stdout stays open."""

    def __enter__(self) -> StreamLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_lines(path: str | os.PathLike[str], advice: str = ADVICE) -> LineFile | StreamLines:
    """A file, or stdout for "-"."""
    if path == "-":
        sys.stdout.flush()
        if sys.stdout is not sys.__stdout__:
            return StreamLines()
    return LineFile(path, advice)


def check_writable(path: str | os.PathLike[str]) -> None:
    """OSError where `path` cannot be written, as far as that is known without touching it; "-" can."""
    path = os.fspath(path)
    problem = None
    if path == "-":
        return
    if os.path.isdir(path):
        problem = errno.EISDIR
    elif os.path.exists(path):
        problem = None if os.access(path, os.W_OK) else errno.EACCES
    else:
        parent = os.path.dirname(os.path.realpath(path))
        if not path or not os.path.isdir(parent):
            problem = errno.ENOENT
        elif not os.access(parent, os.W_OK):
            problem = errno.EACCES
    if problem is not None:
        raise OSError(problem, os.strerror(problem), path)


def same_file(one: str | int, other: str | int) -> bool:
    """Whether two paths or descriptors are one regular file, by any name or link, or would create one."""
    return (file := identity(one)) is not None and file == identity(other)


def identity(path: str | int) -> tuple[int, int] | str | None:
    """What a path or descriptor stands for: (device, inode) of a regular file, the real path of one that is not there
    yet, None for everything that can be shared."""
    try:
        status = os.stat(path)
    except OSError:
        return os.path.realpath(path) if isinstance(path, str) else None
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


def _standard_stream(path: str) -> int | None:
    """1 or 2 where `path` is what stdout or stderr writes to, such as /dev/stdout."""
    for fd in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(fd)):
                return fd
    return None
