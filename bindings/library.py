"""libstars, loaded: found, held against stars.h, and asked about its errors, instructions and threads."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stars.bindings.header import difference, parse
from stars.bindings.layouts import HEADER, HEADER_TEXT, declare

_ERRORS: dict[int, type[Exception]] = {
    HEADER.constants["STARS_OUT_OF_MEMORY"]: MemoryError, HEADER.constants["STARS_BUSY"]: RuntimeError}


def library_path() -> Path:
    """The file that is loaded: the one that was built with the package, or STARS_LIBRARY of the environment."""
    return Path(os.environ.get("STARS_LIBRARY") or Path(__file__).with_name("lib") / "libstars.so")


def _load() -> ctypes.CDLL | None:
    """The library; None where none was built or can be loaded here.

    ImportError: STARS_LIBRARY names one that cannot be loaded, or it was built from another stars.h.
    """
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        if os.environ.get("STARS_LIBRARY"):
            raise ImportError(f"STARS_LIBRARY names {path}, which cannot be used: {error}") from error
        return None
    wrong = _mismatch(library)
    if wrong is not None:
        raise ImportError(f"{path} was not built from the stars.h of this package: {wrong}; build it again, as "
                          "`pip install` does")
    declare(library, HEADER)
    return library


def _mismatch(library: ctypes.CDLL) -> str | None:
    """What the library has otherwise than the header that is installed, by the text that it was compiled from."""
    try:
        read = library.stars_header
        read.restype, read.argtypes = ctypes.c_char_p, []
        text = str(read(), "utf8")
        return None if text == HEADER_TEXT else difference(HEADER, parse(text))
    except AttributeError:
        return "it has no function stars_header"
    except ValueError as error:
        return f"its header cannot be read ({error})"


_lib = _load()


def available() -> bool:
    """Whether libstars was built and can be loaded."""
    return _lib is not None


def loaded() -> ctypes.CDLL:
    """The library; RuntimeError where there is none."""
    if _lib is None:
        raise RuntimeError("libstars was not built: install the package again where there is a C++ compiler")
    return _lib


def check_status(status: int) -> None:
    """Raises the error of a call that did not come through: MemoryError, RuntimeError where another thread is at work
    with the object, or ValueError for what was refused."""
    if status != 0:
        raise _ERRORS.get(status, ValueError)(last_error())


def last_status() -> int:
    """The status of the last call of this thread that failed: of those that return a handle."""
    return int(loaded().stars_last_status())


def last_error() -> str:
    """What the library says of the last call of this thread that failed."""
    return str(loaded().stars_last_error(), "utf8")


def isa() -> str:
    """The instruction set in use: "base", "avx2", "avx512", "avx512_vnni" or "avx512_bf16"."""
    return str(loaded().stars_isa(), "utf8")


def num_threads() -> int:
    """Threads that an operation is spread over, the caller's included."""
    return int(loaded().stars_num_threads())


def set_num_threads(count: int) -> None:
    """Sets `num_threads` from the next operation on, to at most `usable_cpus`; 0 restores the default.

    Safe while other threads run operations.
    """
    if not 0 <= count < 2**31:
        raise ValueError(f"set_num_threads: count is {count}, expected 0 (the default) or a number of threads")
    check_status(loaded().stars_set_num_threads(count))


@contextmanager
def alone() -> Iterator[None]:
    """Inside, what this thread asks for runs in it and in no other. For small operations beside another library, whose
    threads wait on the CPUs for their next work."""
    before = loaded().stars_set_alone(1)
    try:
        yield
    finally:
        loaded().stars_set_alone(before)


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity mask's, or its cgroups' quota, rounded up, where that is less."""
    return int(loaded().stars_usable_cpus(None))
