"""Runs mypy over the package, as tests/test_types.py does, and over further files that are named to it.

`python tests/type_check.py` prints what is wrong, with --all what mypy finds in the files of NOT_YET, too.

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
PACKAGES = {"stars": "engine", "stars.kernels": "kernels", "stars.bindings": "bindings"}

NOT_YET = frozenset({
    "bindings/libstars.py", "engine/engine.py", "engine/model/decoder.py", "engine/scheduler.py",
    "kernels/graph.py", "kernels/linear.py", "kernels/philox.py", "kernels/prefill_attention.py",
    "kernels/rope_write.py", "kernels/sample_step.py", "kernels/triton/score.py", "kernels/types.py",
})
"""Files whose types are not in order yet: what mypy finds in them is passed over, and one without a finding has to be
taken off."""


def sources() -> Iterator[BuildSource]:
    """Every file of the package, with its import name."""
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield BuildSource(str(path.relative_to(ROOT)), ".".join((package, *parts)).removesuffix(".__init__"))


def findings(files: Sequence[BuildSource], cache: Path) -> list[str]:
    """mypy's lines on `files`: "path:line: error: what  [code]", with notes in between."""
    os.chdir(ROOT)
    options = Options()
    parse_config_file(options, lambda: None, "pyproject.toml")
    options.cache_dir = str(cache)
    options.python_executable = sys.executable
    try:
        return build(list(files), options).errors
    except CompileError as error:
        return error.messages


def verdict(lines: Sequence[str], exempt: frozenset[str]) -> list[str]:
    """What is wrong: findings in files that are not `exempt`, and exemptions that nothing needs."""
    found = {match[1] for line in lines if (match := re.match(r"([^:]+):\d+: error: ", line))}
    return [line for line in lines if line.split(":")[0] not in exempt] + [
        f"{path}: mypy finds nothing in it: take it off NOT_YET" for path in sorted(exempt - found)]


def main(arguments: Sequence[str]) -> int:
    more = [BuildSource(path, Path(path).stem) for path in arguments if path != "--all"]
    lines = findings([*sources(), *more], ROOT / "build" / "mypy")
    wrong = verdict(lines, NOT_YET)
    print("\n".join(lines if "--all" in arguments else wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
