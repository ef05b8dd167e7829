"""Makes the checkout importable as `stars` where it is not installed, without writing anything.

The folders are mapped as setup.py maps them: `stars` is engine/, `stars.kernels` is kernels/, `stars.bindings` is
bindings/. The checkout's root stays off sys.path, so that nothing is importable as `engine` or `kernels`.
"""

from __future__ import annotations

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.util import spec_from_file_location
from pathlib import Path

ROOT = Path(os.environ.get("STARS_CHECKOUT") or Path(__file__).resolve().parents[2])
"""The checkout; processes that are started from here inherit it."""

FOLDERS = {"stars": "engine", "stars.kernels": "kernels", "stars.bindings": "bindings"}


class CheckoutFinder(MetaPathFinder):
    """Finds the mapped packages; their submodules are found through their `__path__`."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in FOLDERS:
            return None
        folder = ROOT / FOLDERS[fullname]
        return spec_from_file_location(fullname, folder / "__init__.py", submodule_search_locations=[str(folder)])


def install() -> None:
    """From here on `import stars` means this checkout, in this process and (by importing this module) in its children.

    An installed `stars` is passed over: what is measured is what lies here. benchmarks/ becomes importable, too.
    """
    os.environ["STARS_CHECKOUT"] = str(ROOT)
    if not any(isinstance(finder, CheckoutFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, CheckoutFinder())
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT.resolve()]
    for folder in (ROOT / "benchmarks", ROOT / "benchmarks" / "device"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
