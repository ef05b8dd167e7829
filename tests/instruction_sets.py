"""A fixture that runs a test once per instruction set that libstars was built for and this machine has."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from stars.bindings import library, libstars

INSTRUCTION_SETS = ("base", "avx2", "avx512", "avx512_vnni")


def load_copy(name: str, folder: Path):
    """A second libstars, which chose its instruction set under STARS_ISA=name; None if this machine lacks it."""
    (folder / "lib").mkdir(exist_ok=True)
    # The loader knows a library by its file: another file is another library, with choices of its own.
    shutil.copy(libstars.library_path(), folder / "lib" / "libstars.so")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARS_ISA", name)
        patch.setenv("STARS_LIBRARY", str(folder / "lib" / "libstars.so"))
        copy = library._load()
        return copy if copy.stars_isa().decode() == name else None


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def instruction_set(request, tmp_path_factory):
    """Replaces the library of `stars.bindings` for the tests of a module."""
    if not libstars.available():
        pytest.skip("libstars was not built")
    copy = load_copy(request.param, tmp_path_factory.mktemp(request.param))
    if copy is None:
        pytest.skip(f"this machine has no {request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_lib", copy)
        yield request.param
