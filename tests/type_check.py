"""Runs mypy over the package, as tests/test_types.py does: `python tests/type_check.py` prints what it finds.

mypy finds modules by folder, and no folder is called `stars`: the files are handed to it under their import names. What
it is strict about, and where not yet, stands in pyproject.toml. It keeps what it knows in build/mypy.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from mypy.build import build
from mypy.config_parser import parse_config_file
from mypy.errors import CompileError
from mypy.modulefinder import BuildSource
from mypy.options import Options

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"stars": "engine", "stars.kernels": "kernels", "stars.bindings": "bindings"}


def sources() -> Iterator[BuildSource]:
    """Every file of the package with its import name."""
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            yield BuildSource(str(path.relative_to(ROOT)), name)


def main() -> int:
    os.chdir(ROOT)
    options = Options()
    parse_config_file(options, lambda: None, "pyproject.toml")
    options.cache_dir = os.path.join("build", "mypy")
    options.python_executable = sys.executable
    try:
        errors = build(list(sources()), options).errors
    except CompileError as error:
        errors = error.messages
    print("\n".join([*errors, f"{len(errors)} lines"]))
    return 1 if errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
