"""Builds libstars through CMake and maps the checkout's folders to the import name `stars`.

`stars` is engine/, `stars.kernels` is kernels/, `stars.bindings` is bindings/, `stars.adapters` is bindings/adapters/:
nothing is ever importable as `engine` or `kernels` (transformers looks for a package of the second name).
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SERVE = ["fastapi>=0.115", "uvicorn>=0.54", "pydantic>=2.10"]  # guard.py stands on the inside of uvicorn


class CMakeBuild(build_ext):
    """Builds bindings/lib/libstars.so. Without CMake or a working compiler the install goes on: every C++ function has
    a reference in Python, slower (STARS_REQUIRE_LIBSTARS=1 turns that into a failure)."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext):
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        ninja = find_tool("ninja")
        build = Path(self.build_temp).resolve() / ("ninja" if ninja else "default")
        build.mkdir(parents=True, exist_ok=True)
        try:
            cmake = find_tool("cmake") or "cmake"
            generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
            # A toolchain file of another compiler or machine is named by the environment's CMAKE_TOOLCHAIN_FILE.
            subprocess.run([cmake, *generator, "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
                            f"-DSTARS_OUTPUT_DIR={library.parent.parent}"], check=True)
            subprocess.run([cmake, "--build", str(build), "--target", "stars", "--parallel"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("STARS_REQUIRE_LIBSTARS") == "1":
                raise
            print(f"stars-engine: libstars was not built ({error}); the slower Python references will be used.",
                  file=sys.stderr)

    def copy_extensions_to_source(self):
        (ROOT / "bindings" / "lib").mkdir(exist_ok=True)  # an editable install copies the library there
        super().copy_extensions_to_source()


class PlatformWheel(bdist_wheel):
    """Tags the wheel for any Python 3 on this platform: libstars is plain C, called through ctypes."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def find_tool(name):
    """A program beside this Python (pip installs cmake and ninja there) or on the PATH; None if there is none."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


setup(
    name="stars-engine",
    version="0.1.0",
    description="Decodes with a language model while a reward model watches, segment by segment, by rejection sampling",
    long_description=(ROOT / "README.md").read_text(encoding="utf8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE*", "NOTICE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10,<3.14",
    package_dir={"stars": "engine", "stars.kernels": "kernels", "stars.bindings": "bindings",
                 "stars.adapters": "bindings/adapters"},
    packages=["stars", "stars.bench", "stars.cli", "stars.model", "stars.reward", "stars.serve", "stars.serve.http",
              "stars.trace", "stars.kernels", "stars.kernels.triton", "stars.bindings", "stars.adapters"],
    package_data={"stars": ["demo_models/*/*", "demo_models/README.md", "demo_models/calibration*",
                            "trace/page.html", "py.typed", "serve/http/*.html"],
                  "stars.bindings": ["stars.h"], "stars.kernels.triton": ["tuned/*.json"],
                  "stars.adapters": ["hub/README.md", "hub/custom_generate/*"]},
    ext_modules=[Extension("stars.bindings.lib.libstars", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    install_requires=["torch>=2.6", "numpy", "safetensors", "tokenizers", "jinja2>=3.1", "tqdm"],
    extras_require={
        "gpu": ["triton>=3.6"],
        # Extras, since no torch has wheels of both: without them prefill runs through torch's attention or our own.
        "flash": ["flash-attn>=2.6"],  # where there is no wheel for the installed torch, pip compiles it for long
        "flash4": ["flash-attn-4>=4.0.0b4"],  # there are pre-releases only; naming one lets pip take them
        "hf": ["transformers>=4.57"],
        "structured": ["llguidance>=1.9"],
        "otel": ["opentelemetry-api>=1.30"],
        "serve": SERVE,
        "ray": [*SERVE, "ray[serve]>=2.60"],
        "bench": ["aiohttp>=3.10"],
        "test": ["pytest>=8", "pytest-benchmark", "hypothesis", "gguf>=0.17", "mypy>=2.4", "ruff>=0.17",
                 "transformers>=4.51", "llguidance>=1.9", "opentelemetry-sdk>=1.30",
                 'triton>=3.6; platform_system == "Linux"', *SERVE, "ray[serve]>=2.60", "aiohttp>=3.10", "httpx>=0.28",
                 "openai>=3", "langchain-openai>=1", "schemathesis>=4"],
    },
    entry_points={"console_scripts": ["stars=stars.cli:main"]},
    zip_safe=False,
)
