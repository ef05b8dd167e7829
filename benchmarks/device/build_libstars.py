"""Builds the C++ library in the background, where there is a compiler: the host's references serve as well."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from importable import ROOT
from stage import die_with_the_runner

LIBRARY = ROOT / "bindings" / "lib" / "libstars.so"


def main() -> int:
    die_with_the_runner()
    missing = [tool for tool in ("cmake", "g++") if shutil.which(tool) is None]
    if LIBRARY.exists() or missing:
        print(f"nothing to build: {'it is there' if LIBRARY.exists() else ', '.join(missing) + ' not found'}")
        return 0
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        for command in (["cmake", *generator, "-S", str(ROOT), "-B", folder, "-DCMAKE_BUILD_TYPE=Release",
                         f"-DSTARS_OUTPUT_DIR={out}"], ["cmake", "--build", folder, "--target", "stars", "--parallel"]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"libstars was not built: {done.stderr[-600:] or done.stdout[-600:]}")
                return 1
        built = next(out.rglob("libstars.so"))
        LIBRARY.parent.mkdir(exist_ok=True)
        beside = LIBRARY.with_suffix(".part")
        shutil.copy2(built, beside)
        os.replace(beside, LIBRARY)  # whoever looks for it finds it whole
    print("libstars was built")
    return 0


if __name__ == "__main__":
    sys.exit(main())
