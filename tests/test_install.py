"""What `cmake --install` puts in place serves programs in plain C that find it through pkg-config and through CMake.

The program and its CMakeLists.txt are in tests/install. The library is built without optimisation and for the base
instruction set, in a few seconds: nothing of the installation depends on either. The slow tests build all of it.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import stars
from stars.bindings import libstars
from stars.bindings.layouts import HEADER

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "bindings" / "examples"
PROGRAM = ROOT / "tests" / "install" / "check.c"
ABI = HEADER.constants["STARS_ABI_VERSION"]

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libraries have other names elsewhere"),
    pytest.mark.skipif(not all(map(shutil.which, ("cc", "c++", "cmake", "nm"))), reason="a tool is missing"),
]
with_pkg_config = pytest.mark.skipif(not shutil.which("pkg-config"), reason="pkg-config is missing")


def run(*command: str | Path, **environment: str | Path) -> str:
    """What a command prints. What it complains of is shown where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True,
                          env={**os.environ, **{name: str(value) for name, value in environment.items()}})
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def install(folder: Path, *options: str) -> Path:
    """The folder that libstars was installed in, which then got another name: what is installed can be moved."""
    run("cmake", "-S", ROOT, "-B", folder / "build", f"-DCMAKE_INSTALL_PREFIX={folder / 'first'}", *options)
    run("cmake", "--build", folder / "build", "--parallel")
    run("cmake", "--install", folder / "build")
    return (folder / "first").rename(folder / "moved here")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    return install(tmp_path_factory.mktemp("install"), "-DCMAKE_BUILD_TYPE=Debug", "-DSTARS_BASE_ONLY=ON",
                   "-DCMAKE_INSTALL_LIBDIR=lib")


@pytest.fixture(scope="module")
def libraries(prefix):
    return prefix / "lib"


@pytest.fixture(scope="module")
def pkg_config(libraries):
    """pkg-config's answers on libstars, as words."""
    return lambda *what: shlex.split(run("pkg-config", *what, "stars", PKG_CONFIG_PATH=libraries / "pkgconfig"))


def compiled(folder: Path, *options: str | Path) -> Path:
    """The program, by a strict C compiler and what a user gives it."""
    run("cc", "-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", PROGRAM, *options, "-o", folder / "program")
    return folder / "program"


def exported(library: Path) -> set[str]:
    return {line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()}


def configured(folder: Path, source: Path, prefix: Path, *options: str) -> Path:
    """The build folder of a project that finds libstars in `prefix`."""
    run("cmake", "-S", source, "-B", folder, f"-DCMAKE_PREFIX_PATH={prefix}", *options)
    return folder


def test_what_is_installed(prefix, libraries):
    """Each file, the library under the names that linkers and loaders look for, and no word of where it was built."""
    library = f"lib/libstars.so.{ABI}.{stars.__version__}"
    files = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if not path.is_dir()}
    assert files == {"include/stars.h", library, f"lib/libstars.so.{ABI}", "lib/libstars.so",
                     "lib/libstars.a", "lib/pkgconfig/stars.pc", *(f"lib/cmake/stars/stars{name}.cmake"
                     for name in ("Config", "ConfigVersion", "Targets", "Targets-debug"))}
    assert (libraries / "libstars.so").resolve() == (libraries / f"libstars.so.{ABI}").resolve() == prefix / library
    assert (prefix / "include" / "stars.h").read_bytes() == (ROOT / "bindings" / "stars.h").read_bytes()
    for path in [*libraries.rglob("*.cmake"), libraries / "pkgconfig" / "stars.pc"]:
        text = path.read_text()
        assert str(ROOT) not in text and str(prefix.parent) not in text, path


def test_only_the_functions_of_the_header_are_exported(libraries, tmp_path):
    """By either library: by the static one where it becomes part of another shared library."""
    run("c++", "-shared", "-o", tmp_path / "libother.so", "-Wl,--whole-archive", libraries / "libstars.a",
        "-Wl,--no-whole-archive", "-lpthread")
    assert exported(libraries / "libstars.so") == set(HEADER.functions)
    assert {name for name in exported(tmp_path / "libother.so") if "stars" in name} == set(HEADER.functions)
    if libstars.available():
        assert exported(libstars.library_path()) == set(HEADER.functions)


@with_pkg_config
def test_programs_find_it_by_pkg_config(prefix, libraries, pkg_config, tmp_path):
    assert pkg_config("--modversion") == [stars.__version__]
    says = f"stars.h {ABI}, instructions base\n"
    program = compiled(tmp_path, *pkg_config("--cflags", "--libs"))
    assert f"libstars.so.{ABI}" in run("ldd", program, LD_LIBRARY_PATH=libraries)
    assert run(program, LD_LIBRARY_PATH=libraries) == says
    # The static library alone, and nothing but static ones.
    [folder] = pkg_config("--variable=libdir")
    program = compiled(tmp_path, *pkg_config("--cflags"), f"{folder}/libstars.a", "-lstdc++", "-lm", "-lpthread")
    assert "libstars" not in run("ldd", program)
    assert run(program) == says
    assert run(compiled(tmp_path, "-static", *pkg_config("--static", "--cflags", "--libs"))) == says


def test_programs_find_it_by_cmake(prefix, tmp_path):
    """A project without C++. Where it wants another version it is told which one there is."""
    source = PROGRAM.parent
    build = configured(tmp_path / "build", source, prefix, "-DWANTED=0.1")
    run("cmake", "--build", build)
    for library in ("stars", "stars_static"):
        assert run(build / f"check_{library}") == f"stars.h {ABI}, instructions base\n"
    with pytest.raises(AssertionError, match=re.escape(f"version: {stars.__version__}")):
        configured(tmp_path / "other", source, prefix, "-DWANTED=0.2")


@pytest.mark.skipif(not any(EXAMPLES.glob("bigram.c*")), reason="the examples are not there")
@pytest.mark.parametrize("static", ["OFF", "ON"])
def test_the_examples_find_it(static, prefix, tmp_path):
    build = configured(tmp_path, EXAMPLES, prefix, f"-DSTARS_STATIC={static}")
    run("cmake", "--build", build)
    for source in EXAMPLES.glob("bigram.c*"):
        run(build / source.name.replace(".", "_"))


def test_a_program_of_another_header_is_refused(libraries, tmp_path):
    """It was compiled with the header of the next version, and runs with this library."""
    line = f"#define STARS_ABI_VERSION {ABI}\n"
    header = (ROOT / "bindings" / "stars.h").read_text()
    assert line in header
    (tmp_path / "stars.h").write_text(header.replace(line, f"#define STARS_ABI_VERSION {ABI + 1}\n"))
    program = compiled(tmp_path, "-I", tmp_path, libraries / "libstars.so", f"-Wl,-rpath,{libraries}")
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 1 and f"compiled with version {ABI + 1}" in done.stderr, done


@pytest.mark.skipif("STARS_LIBRARY" in os.environ, reason="another library is used than the package's")
def test_the_packages_own_library_is_one_file():
    """Versions in its name, and links to it, are for linkers: a wheel has neither."""
    if not libstars.available():
        pytest.skip("libstars was not built")
    library = libstars.library_path()
    assert [path.name for path in library.parent.iterdir()] == ["libstars.so"] and not library.is_symlink()


CPU_FLAGS: Mapping[str, set[str]] = {
    "avx2": {"avx2", "fma", "f16c"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_vnni": {"avx512_vnni"}, "avx512_bf16": {"avx512_bf16"}}


def cpu_flags() -> set[str]:
    """Of /proc/cpuinfo; none on a machine of another kind."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*:(.*)", path.read_text() if path.exists() else "", re.MULTILINE)
    return set(found[1].split()) if found else set()


def widest(flags: set[str]) -> str:
    """The last instruction set for which the CPU has all that it and those before take."""
    best = "base"
    for name, needed in CPU_FLAGS.items():
        if not needed <= flags:
            break
        best = name
    return best


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines have one instruction set")
@pytest.mark.skipif("STARS_ISA" in os.environ, reason="the instruction set is not the library's choice")
def test_the_instructions_are_those_that_the_system_says_the_cpu_has():
    """The library asks the CPU without the compiler's help, which not every compiler gives."""
    if not libstars.available():
        pytest.skip("libstars was not built")
    assert libstars.isa() == widest(cpu_flags())


@pytest.mark.slow
@with_pkg_config
def test_all_instruction_sets(tmp_path):
    """As a user installs it; libraries are where the machine has them."""
    prefix = install(tmp_path)
    [config] = prefix.rglob("stars.pc")
    libraries = config.parents[1]
    said = run("pkg-config", "--cflags", "--libs", "stars", PKG_CONFIG_PATH=config.parent)
    program = compiled(tmp_path, *shlex.split(said))
    order = ["base", *CPU_FLAGS]
    for name in order[: order.index(widest(cpu_flags())) + 1]:
        assert run(program, LD_LIBRARY_PATH=libraries, STARS_ISA=name) == f"stars.h {ABI}, instructions {name}\n"


@pytest.mark.slow
def test_wheels():
    """`make wheels`: for old machines, with all that a package has."""
    run(sys.executable, ROOT / "bindings" / "packaging" / "wheels.py")
    for architecture in ("x86_64", "aarch64"):
        [wheel] = (ROOT / "build" / "wheels" / "dist").glob(f"*manylinux_2_17_{architecture}*.whl")
        assert "-py3-none-" in wheel.name
