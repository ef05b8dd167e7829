"""Runs mypy over the package, as tests/test_types.py does, and over further files that are named to it.

`python tests/type_check.py [FILES]` prints what mypy finds in the package, and in FILES.

mypy finds modules by folder, and no folder is called `stars`: the files are handed to it under their import names. What
it asks of them stands in pyproject.toml. It keeps what it has learnt in build/mypy: the first run reads torch's types.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mypy.build import build
from mypy.config_parser import parse_config_file
from mypy.errors import CompileError
from mypy.modulefinder import BuildSource
from mypy.options import Options

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (3, 10)
PACKAGES = {"stars": "engine", "stars.kernels": "kernels", "stars.adapters": "bindings/adapters",
            "stars.bindings": "bindings"}


def sources() -> Iterator[BuildSource]:
    """Every file of the package, with its import name."""
    seen: set[Path] = set()  # bindings/adapters lies within bindings
    for package, folder in PACKAGES.items():
        for path in sorted(set((ROOT / folder).rglob("*.py")) - seen):
            seen.add(path)
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield BuildSource(str(path.relative_to(ROOT)), ".".join((package, *parts)).removesuffix(".__init__"))


def findings(files: Sequence[BuildSource], cache: Path) -> list[str]:
    """mypy's lines on `files`: "path:line: error: what  [code]", with notes in between."""
    os.chdir(ROOT)
    options = Options()
    parse_config_file(options, lambda: None, "pyproject.toml")
    options.cache_dir = str(cache)
    options.python_executable = sys.executable
    if sys.version_info < (3, 12):  # what the oldest Python lacks is found; numpy's types for later ones need theirs
        options.python_version = OLDEST
    try:
        return build(list(files), options).errors
    except CompileError as error:
        return error.messages


def main(arguments: Sequence[str]) -> int:
    # By a name of its whole path: what mypy keeps of a name it says of another file of that name, too.
    more = [BuildSource(path, re.sub(r"\W", "_", path)) for path in arguments]
    lines = findings([*sources(), *more], ROOT / "build" / "mypy")
    print("\n".join(lines))
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
