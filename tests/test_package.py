"""What is shipped: the wheel's content and tags, pins, licences, and that the versions of Python agree everywhere."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import stars

ROOT = Path(__file__).resolve().parents[1]
PINNED = re.compile(r"([A-Za-z0-9_.-]+)(?:\[\w+\])?==([0-9][0-9A-Za-z.+]*)(?:; (.+))?")
MINORS = range(10, 14)


def pins() -> dict[str, list[str | None]]:
    """The markers of every package that requirements.txt pins, by its normalised name."""
    found: dict[str, list[str | None]] = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            match = PINNED.fullmatch(line)
            assert match, f"{line} is not pinned"
            found.setdefault(re.sub(r"[-_.]+", "-", match[1]).lower(), []).append(match[3])
    return found


def test_every_requirement_is_pinned_once_for_each_python():
    markers = pytest.importorskip("packaging.markers")
    for name, conditions in pins().items():
        for minor in MINORS:
            environment = {"python_version": f"3.{minor}", "platform_system": "Linux"}
            fitting = [c for c in conditions if c is None or markers.Marker(c).evaluate(environment)]
            only_elsewhere = any(c and ("Windows" in c or c == 'python_version < "3.11"') for c in conditions)
            assert len(fitting) == 1 or only_elsewhere and len(conditions) == 1 and not fitting, (name, minor)


def test_what_is_installed_here_is_pinned():
    """Whatever the package and its tests need in this environment, direct or not, has a line in requirements.txt."""
    from importlib import metadata

    requirements = pytest.importorskip("packaging.requirements")
    pinned, seen = pins(), set()
    waiting = [(name, "") for name in (
        "torch", "numpy", "safetensors", "tokenizers", "jinja2", "tqdm", "pytest", "pytest-benchmark", "hypothesis",
        "mypy", "ruff", "transformers", "fastapi", "uvicorn", "openai", "langchain-openai", "schemathesis", "aiohttp",
        "httpx")] + [("ray", "serve")]
    while waiting:
        given, extra = waiting.pop()
        name = re.sub(r"[-_.]+", "-", given).lower()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        if name.startswith(("nvidia-", "cuda-")):
            continue  # a CUDA build of torch names their versions itself
        assert name in pinned, f"{name} is installed by `make test` and not pinned"
        for text in metadata.requires(name) or ():
            requirement = requirements.Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(requirement.name, wanted) for wanted in ("", *requirement.extras)]
    assert len(seen) > 100


def test_versions_of_python_agree():
    setup = (ROOT / "setup.py").read_text()
    assert f'python_requires=">=3.{MINORS[0]},<3.{MINORS[-1] + 1}"' in setup and "range(10, 14)" in setup
    assert f"Python 3.{MINORS[0]} to 3.{MINORS[-1]}" in (ROOT / "Makefile").read_text()


def test_licence_and_notice():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence and len(licence) == 11358
    notice = (ROOT / "NOTICE").read_text()
    assert "Large Movie Review Dataset" in notice and "Andrew L. Maas" in notice
    assert (Path(stars.__file__).parent / "py.typed").is_file()


def test_every_file_is_packaged(tmp_path):
    """Pages, calibrations and models as well as code, quickly: without a build of the C++ library."""
    subprocess.run([sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)], cwd=ROOT,
                   check=True, capture_output=True)
    files = {path for path in (ROOT / "engine").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    ours = {str(path.relative_to(ROOT / "engine")) for path in files}
    packaged = {str(path.relative_to(tmp_path / "stars")) for path in (tmp_path / "stars").rglob("*") if path.is_file()}
    assert {"serve/http/playground.html", "demo_models/calibration.json"} <= ours <= packaged
    hub = ROOT / "bindings" / "adapters"
    pushed = {f"adapters/{path.relative_to(hub)}" for path in (hub / "hub").rglob("*") if path.suffix != ".pyc"
              and path.is_file()}
    assert {"adapters/hub/README.md", "adapters/hub/custom_generate/generate.py"} <= pushed <= packaged


@pytest.mark.slow
def test_the_wheel(tmp_path):
    """Builds it as a user would, and runs what was built from a directory of its own."""
    if find_spec("pip") is None:
        pytest.skip("pip is not installed")
    # From a copy: a build folder left in the checkout would put its old files into the wheel.
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(
        ".*", "build", "*.egg-info", "__pycache__", "*.so"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--quiet", "-w", str(tmp_path)],
                   check=True, env={**os.environ, "STARS_REQUIRE_LIBSTARS": "1"})
    [wheel] = tmp_path.glob("*.whl")
    assert re.fullmatch(r"stars_engine-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)  # any Python 3, this platform only
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        facts = email.message_from_bytes(archive.read(metadata))
    home = metadata.removesuffix("METADATA")
    for name in ("stars/bindings/lib/libstars.so", "stars/bindings/stars.h", "stars/py.typed", "stars/trace/page.html",
                 "stars/demo_models/README.md", "stars/demo_models/lm/model.safetensors",
                 "stars/demo_models/rm/tokenizer.json", "stars/demo_models/guide/adapter_model.safetensors",
                 "stars/demo_models/guide/adapter_config.json", "stars/demo_models/small/model.safetensors",
                 "stars/demo_models/smollm2_reward/figures.json", "stars/demo_models/smollm2_reward/NOTICE",
                 home + "licenses/LICENSE", home + "licenses/NOTICE"):
        assert name in names, name
    ours = {f"stars/{path.relative_to(ROOT / 'engine')}" for path in (ROOT / "engine").rglob("*.py")}
    ours |= {f"stars/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.py")}
    assert ours <= names
    outside = {name for name in names if not name.startswith(("stars/", home))}
    assert not outside, f"nothing is importable beside stars: {outside}"
    assert facts["License-Expression"] == "Apache-2.0" and facts["Requires-Python"] == ">=3.10,<3.14"
    code = ("import stars, sys; from stars.bindings import libstars; assert libstars.available(); "
            "assert stars.__file__.startswith(sys.argv[1]); from stars.cli import main; main(['info'])")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "installed")], capture_output=True, text=True,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")})
    assert done.returncode == 0 and "libstars      instructions" in done.stdout, done.stderr
