"""stars.h is the one table of the C interface: what Python reads in it is what C compiles, and a drift is refused."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from stars.bindings import header, layouts, library, libstars, operations
from stars.bindings.layouts import HEADER, HEADER_TEXT, OPERATIONS, STRUCTURES

needs_libstars = pytest.mark.skipif(not libstars.available(), reason="libstars was not built")
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
VERSION = HEADER.constants["STARS_ABI_VERSION"]

DRIFTS = {  # text of the header, another in its place, and what must be said of it
    "order": ("float* out;\n  int64_t rows, intermediate;", "int64_t rows, intermediate;\n  float* out;",
              "field 2 of stars_swiglu_params is float* out here and int64_t rows there"),
    "type": ("int64_t rows, hidden, vocab;\n  int32_t dtype;", "int64_t rows, hidden, vocab;\n  int64_t dtype;",
             "field 7 of stars_embedding_params is int32_t dtype here and int64_t dtype there"),
    "element": ("const double* beta;", "const float* beta;",
                "field 8 of stars_decide_params is const double* beta here and const float* beta there"),
    "name": ("int64_t window;", "int64_t span;", "field 6 of stars_attention_params is int64_t window here and int64_t "
             "span there"),
    "field gone": ("  int32_t into_slab;\n", "", "field 11 of stars_batch is int32_t into_slab here and missing there"),
    "struct gone": ("stars_copy_rows_params", "stars_move_rows_params",
                    "stars_copy_rows_params is a struct of 12 fields here and missing there"),
    "number": ("STARS_OP_APPEND_DRAFT = 10", "STARS_OP_APPEND_DRAFT = 12", "STARS_OP_APPEND_DRAFT is 10 here and 12 "
               "there"),
    "status": ("STARS_OUT_OF_MEMORY = 2", "STARS_OUT_OF_MEMORY = 3", "STARS_OUT_OF_MEMORY is 2 here and 3 there"),
    "version": (f"STARS_ABI_VERSION {VERSION}", f"STARS_ABI_VERSION {VERSION + 1}",
                f"STARS_ABI_VERSION is {VERSION} here and {VERSION + 1} there"),
    "argument": ("stars_call(int32_t op,", "stars_call(int64_t op,", "stars_call is int32_t (int32_t op, const void* "
                 "params) here and int32_t (int64_t op, const void* params) there"),
    "result": ("STARS_API double stars_cpu_quota", "STARS_API float stars_cpu_quota",
               "stars_cpu_quota is double (const char* root) here and float (const char* root) there"),
}


@pytest.mark.parametrize("drift", DRIFTS)
def test_a_drift_is_named(drift):
    before, after, words = DRIFTS[drift]
    changed = HEADER_TEXT.replace(before, after)
    assert changed != HEADER_TEXT
    assert header.difference(HEADER, header.parse(changed)) == words
    assert header.difference(HEADER, header.parse(HEADER_TEXT)) is None


@needs_libstars
@pytest.mark.parametrize("drift", DRIFTS)
def test_a_library_of_another_header_is_refused(drift, monkeypatch):
    """The header changed, and nobody built the library again."""
    before, after, _ = DRIFTS[drift]
    text = HEADER_TEXT.replace(before, after)
    monkeypatch.setattr(library, "HEADER_TEXT", text)
    monkeypatch.setattr(library, "HEADER", header.parse(text))
    with pytest.raises(ImportError) as refused:
        library._load()
    told = str(refused.value)
    assert str(library.library_path()) in told and "build it again" in told
    assert header.difference(header.parse(text), HEADER) in told


@needs_libstars
def test_comments_may_differ(monkeypatch):
    monkeypatch.setattr(library, "HEADER_TEXT", HEADER_TEXT.replace("/* or NULL */", "/* may be missing */"))
    assert library._load() is not None


def test_a_library_that_cannot_be_used_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("STARS_LIBRARY", str(tmp_path / "libother.so"))
    with pytest.raises(ImportError, match="STARS_LIBRARY names .*libother.so"):
        library._load()
    monkeypatch.setenv("STARS_LIBRARY", "libc.so.6")
    with pytest.raises(ImportError, match="libc.so.6 .* no function stars_header"):
        library._load()


def test_a_package_without_a_library_says_so(monkeypatch, tmp_path):
    monkeypatch.delenv("STARS_LIBRARY", raising=False)
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "libstars.so")
    assert library._load() is None
    monkeypatch.setattr(library, "_lib", None)
    assert not libstars.available()
    with pytest.raises(RuntimeError, match="libstars was not built"):
        libstars.num_threads()


@needs_libstars
def test_the_library_has_what_the_header_declares():
    loaded = library.loaded()
    assert loaded.stars_header().decode() == HEADER_TEXT
    assert loaded.stars_abi_version() == HEADER.constants["STARS_ABI_VERSION"]
    for name, number in OPERATIONS.items():
        assert loaded.stars_call(number, None) == 1
        params = STRUCTURES[f"stars_{name}_params"]()
        for size in (0, ctypes.sizeof(params) - 8, ctypes.sizeof(params) + 8):
            params.size = size
            assert loaded.stars_call(number, ctypes.byref(params)) == 1
            assert loaded.stars_last_error().startswith(f"{name}: size must be".encode())
    assert sorted(OPERATIONS.values()) == list(range(len(OPERATIONS)))
    assert loaded.stars_call(len(OPERATIONS), ctypes.byref(params)) == 1
    assert b"unknown" in loaded.stars_last_error()


PROGRAM = """
#include <stddef.h>
#include <stdio.h>
#include "stars.h"
int main(void) {{
  printf("{{");
  {lines}
  printf("\\"\\": 0}}");
  return 0;
}}
"""


@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
def test_the_layouts_are_those_of_the_c_compiler(tmp_path):
    """Sizes of structs, offsets and sizes of their fields, and constants, as a C program prints them."""
    expected = {}
    for name, structure in STRUCTURES.items():
        expected[f"sizeof({name})"] = ctypes.sizeof(structure)
        for field, _ in structure._fields_:
            expected[f"offsetof({name}, {field})"] = getattr(structure, field).offset
            expected[f"sizeof((({name}*)0)->{field})"] = getattr(structure, field).size
    expected |= HEADER.constants
    lines = "\n  ".join(f'printf("\\"{what}\\": %lld, ", (long long)({what}));' for what in expected)
    (tmp_path / "layout.c").write_text(PROGRAM.format(lines=lines))
    built = subprocess.run([COMPILER, "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I",
                            str(Path(layouts.__file__).parent), "layout.c", "-o", "layout"],
                           cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    printed = json.loads(subprocess.run([str(tmp_path / "layout")], capture_output=True, check=True).stdout)
    del printed[""]
    assert printed == expected and len(expected) > 300


@pytest.mark.parametrize("text, quoted", [
    ("typedef struct { float x[4]; } pair;", "float x[4]"), ("typedef union { int32_t a; } both;", "typedef union"),
    ("typedef struct { int32_t a; } __attribute__((packed)) tight;", "typedef struct"),
    ("#pragma pack(1)\ntypedef struct { int32_t a; } tight;", "#pragma pack(1)"),
    ("typedef enum { A, B = 1 } kind;", "'A'"), ("STARS_API int32_t f(int32_t);", "'int32_t'"),
    ("typedef struct { float *x, *y; } pointers;", "float *x, *y"),
    ("typedef struct { struct { int32_t b; } a; } nested;", "typedef struct"), ("int32_t loose;", "int32_t loose"),
])
def test_what_the_reader_does_not_know_is_refused(text, quoted):
    with pytest.raises(ValueError, match="stars.h: .* is no declaration") as refused:
        header.parse(text)
    assert quoted in str(refused.value)


def test_a_type_that_is_not_known_is_refused():
    parsed = header.parse("typedef struct { int16_t a; } narrow;")
    with pytest.raises(ValueError, match="int16_t is no type"):
        layouts.structures(parsed)


def test_an_operation_fills_every_field_by_its_name():
    """What a binding that was not brought along with the header says, whichever of the two names a field more."""
    swiglu = operations.Operation("swiglu")
    out, gate_up = (torch.empty(1, 2), (1, 2)), (torch.ones(1, 4), (1, 4))
    with pytest.raises(TypeError, match="^swiglu: stars_swiglu_params of stars.h and the binding differ in out$"):
        swiglu(gate_up=gate_up, rows=1, intermediate=2, activation=0)
    with pytest.raises(TypeError, match="differ in bias$"):
        swiglu(gate_up=gate_up, out=out, rows=1, intermediate=2, activation=0, bias=None)
    with pytest.raises(TypeError, match="differ in out, output$"):
        swiglu(gate_up=gate_up, output=out, rows=1, intermediate=2, activation=0)
    with pytest.raises(TypeError, match="swiglu: out of stars_swiglu_params in stars.h takes no int$"):
        swiglu(gate_up=gate_up, out=7, rows=1, intermediate=2, activation=0)
    with pytest.raises(TypeError, match="swiglu: stars_swiglu_params of stars.h takes no such numbers: "):
        swiglu(gate_up=gate_up, out=out, rows=out, intermediate=2, activation=0)
    with pytest.raises(TypeError, match="attention: batch of stars_attention_params in stars.h takes no int$"):
        operations.Operation("attention")(q=None, out=None, batch=3, kv={}, heads=1, window=0, scale=1.0, softcap=0.0)


@needs_libstars
def test_the_types_of_arrays_are_those_of_the_header():
    swiglu = operations.Operation("swiglu")
    with pytest.raises(ValueError, match="^swiglu: gate_up is float64 .*expected contiguous float32"):
        swiglu(gate_up=(torch.ones(1, 4).double(), (1, 4)), out=(torch.empty(1, 2), (1, 2)), rows=1, intermediate=2,
               activation=0)
