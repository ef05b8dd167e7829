"""libstars where something is out of bounds: sizes that cannot be, memory that is not there, CPUs that are not ours."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from libstars_threads import threads
from random_products import run_linear
from stars import kernels
from stars.bindings import layouts, library, libstars
from stars.bindings.layouts import STRUCTURES
from stars.bindings.library import check_status, last_error, loaded

pytestmark = [pytest.mark.threads, pytest.mark.skipif(not libstars.available(), reason="libstars was not built")]

INVALID = 1
OPERATIONS = {name: (number, STRUCTURES[f"stars_{name}_params"]) for name, number in layouts.OPERATIONS.items()}
MAY_BE_NULL = {("linear", "bias"), ("rms_norm", "residual"), ("top_logprobs", "own"),
               *((name, field) for name in ("rope_write", "attention") for field in ("k_slabs", "v_slabs"))}
NOT_ABOUT_MEMORY = {("attention", "window")}  # any number of positions
MOST = 2**46  # elements of an array


def fields_of(structure, kind, prefix=()):
    """The paths to the fields of a type in a structure and in those inside it; not that of its own size."""
    for name, own in structure._fields_:
        if own is kind and name != "size":
            yield (*prefix, name)
        elif isinstance(own, type) and issubclass(own, ctypes.Structure):
            yield from fields_of(own, kind, (*prefix, name))


def set_field(params, path, value) -> None:
    for name in path[:-1]:
        params = getattr(params, name)
    setattr(params, path[-1], value)


def params_of(name: str):
    """Parameters that would do, but that their addresses are nobody's: a call with them must be refused."""
    structure = OPERATIONS[name][1]
    params = structure(ctypes.sizeof(structure))
    for path in fields_of(structure, ctypes.c_void_p):
        set_field(params, path, 64)
    for path in fields_of(structure, ctypes.c_int64):
        set_field(params, path, 0 if path[-1] in ("window", "out_column") else 2)
    return params


def refusal(name: str, changes: dict) -> str:
    """What stars_call and stars_program_add say of parameters with these changes."""
    params = params_of(name)
    for path, value in changes.items():
        set_field(params, path, value)
    called, pointer = loaded(), ctypes.byref(params)
    assert called.stars_call(OPERATIONS[name][0], pointer) == INVALID, changes
    text = called.stars_last_error().decode()
    program = libstars.Program()
    assert called.stars_program_add(program._handle, OPERATIONS[name][0], pointer) == INVALID
    assert called.stars_last_error().decode() == text and len(text) < 200
    return text


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_size_that_cannot_be_is_named(name):
    sizes = [path for path in fields_of(OPERATIONS[name][1], ctypes.c_int64)]
    assert sizes
    for path in sizes:
        values = [-1, -(2**63)]
        if (name, path[-1]) not in NOT_ABOUT_MEMORY:
            values += [MOST + 1, 2**62, 2**63 - 1]
        for value in values:
            text = refusal(name, {path: value})
            assert text.startswith(f"{name}: ") and path[-1] in text, (path, value, text)


PRODUCTS = {  # sizes that are multiplied, in every operation; 2^24 each is too much, or what stands behind
    "linear": ["rows in_features", "rows out_features", "in_features out_features",
               "rows in_features out_features 21", "rows out_stride"],
    "embedding": ["rows hidden", "hidden vocab"],
    "rms_norm": ["rows hidden", "rows x_stride", "rows out_stride"],
    "swiglu": ["rows intermediate"],
    "rescale": ["rows width"],
    "take_rows": ["rows width"],
    "rope_write": ["batch.rows heads", "batch.rows kv.kv_heads", "batch.rows kv.head_dim", "heads kv.head_dim",
                   "kv.page_size kv.kv_heads", "kv.page_size kv.head_dim", "kv.kv_heads kv.head_dim",
                   "kv.page_size kv.kv_heads kv.head_dim 16", "batch.rows heads kv.head_dim 16"],
    "attention": ["batch.rows heads", "batch.rows kv.head_dim", "heads kv.head_dim", "kv.page_size kv.kv_heads",
                  "batch.rows heads kv.kv_heads", "batch.sequences heads kv.kv_heads"],
    "sample_step": ["lanes vocab", "lanes max_steps", "lanes max_stop_ids"],
    "copy_rows": ["rows layers", "layers source_rows", "layers target_rows", "source_rows width", "target_rows width",
                  "layers source_rows width 16", "layers target_rows width 16"],
    "append_draft": ["sequences max_closing"],
    "apply_penalties": ["lanes vocab", "lanes max_steps"],
    "edit_logits": ["lanes vocab", "lanes max_steps", "lanes word_length", "word_rows word_length", "mask_rows vocab"],
    "blend_logits": ["models room", "models vocab", "room vocab", "lanes vocab", "models room vocab 16"],
    "top_logprobs": ["lanes vocab", "lanes max_steps", "lanes max_steps most 16"],
}


@pytest.mark.parametrize("name, fields", [(name, fields) for name, all_ in PRODUCTS.items() for fields in all_])
def test_a_product_that_cannot_be_is_named(name, fields):
    *names, last = fields.split()
    names, exponent = (names, int(last)) if last.isdigit() else ([*names, last], 24)
    values = {tuple(field.split(".")): 2**exponent for field in names}
    text = refusal(name, values)
    assert "is too large" in text and any(path[-1] in text for path in values), text
    # Each as large as it may be: the product wraps around, to zero here.
    small = name in ("sample_step", "apply_penalties", "edit_logits", "top_logprobs")
    limits = dict.fromkeys(("vocab", "max_steps", "word_length", "most"), 2**30) if small else {}
    assert "is too large" in refusal(name, {path: limits.get(path[-1], MOST) for path in values})


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_null_pointer_is_refused_where_there_is_something_to_read(name):
    for path in fields_of(OPERATIONS[name][1], ctypes.c_void_p):
        if (name, path[-1]) not in MAY_BE_NULL:
            text = refusal(name, {path: None})
            assert "null" in text, (path, text)
    if name in ("rope_write", "attention"):
        for slabs in ("k_slabs", "v_slabs"):
            assert "slabs must not be null" in refusal(name, {("kv", slabs): None, ("batch", "into_slab"): 1})


@pytest.mark.parametrize("name, changes", [
    ("linear", {"in_features": 0}), ("linear", {"out_features": 0}), ("linear", {"dtype": 14}),
    ("linear", {"dtype": -1}), ("embedding", {"hidden": 0}), ("embedding", {"vocab": 0}), ("embedding", {"dtype": 14}),
    ("rms_norm", {"hidden": 0}), ("rms_norm", {"eps": float("nan")}), ("swiglu", {"intermediate": 0}),
    ("rescale", {"width": 0}), ("rescale", {"softcap": float("nan")}), ("swiglu", {"activation": 2}),
    ("swiglu", {"activation": -1}),
    ("take_rows", {"width": 0}), ("rope_write", {"heads": 0}), ("attention", {"heads": 0}),
    ("attention", {"heads": 3}), ("sample_step", {"vocab": 0}), ("copy_rows", {"width": 0}),
    ("copy_rows", {"source_rows": 0}), ("copy_rows", {"target_rows": 0}), ("append_draft", {"vocab": 0}),
    ("apply_penalties", {"vocab": 0}), ("blend_logits", {"models": 0}), ("blend_logits", {"vocab": 0}),
    ("blend_logits", {"room": 0}), ("edit_logits", {"vocab": 0}), ("edit_logits", {"word_length": 1}),
    ("top_logprobs", {"vocab": 0}),
])
def test_a_size_of_zero_is_refused_where_something_is_divided_by_it(name, changes):
    (field, _), = changes.items()
    assert field in refusal(name, {(field,): changes[field]})
    if name in ("rope_write", "attention"):
        for field in ("page_size", "kv_heads", "head_dim"):
            assert field in refusal(name, {("kv", field): 0})


def test_nothing_to_do_needs_no_memory():
    for name, (op, structure) in OPERATIONS.items():
        params = structure(ctypes.sizeof(structure))
        for path in fields_of(structure, ctypes.c_int64):
            set_field(params, path, 0 if path[-1] in ("rows", "sequences", "lanes", "layers", "window", "out_column")
                          else 2)
        for path in fields_of(structure, ctypes.c_void_p):
            set_field(params, path, 64 if path[0] == "kv" else None)
        assert loaded().stars_call(op, ctypes.byref(params)) == 0, (name, last_error())


def test_sizes_of_packed_matrices():
    functions = loaded()
    for sizes in ((0, 4), (4, 0), (-1, 4), (4, -(2**63)), (2**63 - 1, 4), (4, 2**63 - 1), (2**32, 2**32), (2**62, 4),
                  (2**23, 2**23 + 1), (MOST, 1)):
        assert functions.stars_packed_bytes(*sizes, 0) == 0 and b"out_features" in functions.stars_last_error()
        for function in (functions.stars_pack, functions.stars_unpack):
            assert function(64, *sizes, 0, 64) == INVALID and b"out_features" in functions.stars_last_error()
    for dtype in (-1, 3):
        assert functions.stars_packed_bytes(4, 4, dtype) == 0 and b"dtype" in functions.stars_last_error()
        assert functions.stars_pack(64, 4, 4, dtype, 64) == INVALID and b"dtype" in functions.stars_last_error()
    for function in (functions.stars_pack, functions.stars_unpack):
        assert function(None, 4, 4, 0, 64) == INVALID and b"null" in functions.stars_last_error()
        assert function(64, 4, 4, 0, None) == INVALID
    # Columns in panels of 32, inputs of pairs in twos.
    assert [functions.stars_packed_bytes(33, 5, dtype) for dtype in range(3)] == [64 * 5 * 4, 64 * 5 * 2, 64 * 6 * 2]
    assert functions.stars_packed_bytes(2**40, 2**5, 0) == 2**40 * 2**5 * 4


def test_the_binding_lets_no_size_be_cut_off():
    packed = libstars.pack(torch.ones(2, 2))
    with pytest.raises(ValueError, match="too large"):
        libstars.unpack(packed, 2**64 + 2, 2, torch.float32)
    with pytest.raises(ValueError, match="out_features .* too large"):
        libstars.unpack(packed, 2**40, 2**40, torch.float32)
    with pytest.raises(ValueError, match="must be positive"):
        libstars.pack(torch.ones(0, 2))
    for count in (-1, 2**31, 2**32 + 1):
        with pytest.raises(ValueError, match="count is"):
            libstars.set_num_threads(count)


def test_the_generator_refuses_what_it_cannot_write_to():
    functions = loaded()
    assert functions.stars_philox(1, 0, 0, 0, 0, None) == INVALID and b"null" in functions.stars_last_error()
    assert functions.stars_gumbel(1, 0, 0, 0, 4, None) == INVALID and b"null" in functions.stars_last_error()
    for vocab in (-1, 2**31, 2**62):
        assert functions.stars_gumbel(1, 0, 0, 0, vocab, 64) == INVALID and b"vocab" in functions.stars_last_error()
    assert functions.stars_gumbel(1, 0, 0, 0, 0, None) == 0


def test_a_program_refuses_what_it_cannot_run():
    program = libstars.Program()
    run, done = loaded().stars_program_run, torch.zeros(1, dtype=torch.int32)
    assert run(None, 1, None, 0) == -INVALID and run(program._handle, -1, None, 0) == -INVALID
    assert b"times" in loaded().stars_last_error()
    assert run(program._handle, 1, done.data_ptr(), -1) == -INVALID
    assert run(program._handle, 1, done.data_ptr(), 2**62) == -INVALID
    assert b"done_count" in loaded().stars_last_error()
    with pytest.raises(ValueError, match="times"):
        program.run(-1, done)
    assert program.run(3, done) == 3 and program.run(0, done) == 0


# -- memory -----------------------------------------------------------------------------------------------------------

MEMORY_SCRIPT = """
import os, re, resource, torch
from stars import kernels
from stars.bindings import libstars
from stars.kernels.types import LaneState

def limit(spare):
    used = int(re.search("VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + spare if spare else resource.RLIM_INFINITY, resource.RLIM_INFINITY))

def tasks():
    return len(os.listdir("/proc/self/task"))

# Workers that cannot be had (a stack takes 8 MB, and none is left over from another thread) are done without.
x, weight = torch.randn(64, 512), kernels.pack(torch.randn(1024, 512))
out, expected = torch.empty(64, 1024), torch.empty(64, 1024)
kernels.linear(x, weight, expected)
before = tasks()
libstars.set_num_threads(4)
limit(1 << 20)
kernels.linear(x, weight, out)
limit(None)
assert tasks() == before and torch.equal(out, expected)
libstars.set_num_threads(3)
kernels.linear(x, weight, out)
assert tasks() == before + 2 and torch.equal(out, expected)

# The sampler collects a row's candidates in memory of the thread that draws: 20 MB, where 4 MB are to be had.
count, token = 3, 1_234_567
logits = torch.zeros(count, 2_000_000)
logits[:, token] = 30.0
ints = lambda value: torch.full((count,), value, dtype=torch.int32)
lanes = LaneState(ints(0), ints(0), ints(0), ints(0), ints(0), ints(8), ints(1),
                  torch.zeros(count, 8, dtype=torch.int32), torch.zeros(count, 8), torch.arange(count), ints(0),
                  ints(0), torch.ones(count), ints(0), torch.full((count,), 0.9), torch.zeros(count),
                  torch.full((count, 1), -1, dtype=torch.int32), torch.full((count,), float("inf")), ints(0))
never = torch.zeros(1, dtype=torch.int32)
with libstars.record() as program:
    kernels.sample_step(logits, lanes)  # all lanes are done: nothing is drawn, no memory is taken
lanes.done.zero_()
limit(4 << 20)
for attempt in (lambda: kernels.sample_step(logits, lanes), lambda: program.run(2, never)) * 2:
    lanes.steps.zero_(), lanes.done.zero_()
    try:
        attempt()
        raise AssertionError("20 MB were to be had")
    except MemoryError as error:
        assert str(error) == "sample_step: out of memory"
limit(None)
for threads in (3, 1):
    libstars.set_num_threads(threads)
    for attempt in (lambda: kernels.sample_step(logits, lanes), lambda: program.run(1, never)):
        lanes.steps.zero_(), lanes.done.zero_(), lanes.out_tokens.zero_()
        attempt()
        assert lanes.out_tokens[:, 0].tolist() == [token] * count
"""

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux_only
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer needs room of its own")
def test_out_of_memory_is_an_error_and_the_next_call_is_right():
    result = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, timeout=300,
                            env={**os.environ, "STARS_USABLE_CPUS": "4", "STARS_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-2000:]


ALONE_SCRIPT = """
import os
import threading
import torch
from stars import kernels
from stars.bindings import libstars

def tasks():
    return len(os.listdir("/proc/self/task"))

x, weight = torch.randn(64, 512), kernels.pack(torch.randn(1024, 512))
out, alone = torch.empty(64, 1024), torch.empty(64, 1024)
libstars.set_num_threads(3)
before = tasks()
with libstars.alone():
    with libstars.alone():
        pass
    with libstars.record() as program:
        kernels.linear(x, weight, alone)
    program.run(1, torch.zeros(1, dtype=torch.int32))
    assert tasks() == before  # no worker was woken, of a call or of a program
    other = threading.Thread(target=kernels.linear, args=(x, weight, out))  # of another thread nothing was said
    other.start(), other.join()
    assert tasks() >= before + 2 and torch.equal(out, alone)
"""


@linux_only
def test_a_thread_may_keep_to_itself():
    result = subprocess.run([sys.executable, "-c", ALONE_SCRIPT], capture_output=True, text=True, timeout=300,
                            env={**os.environ, "STARS_USABLE_CPUS": "3", "STARS_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_status_of_memory_is_a_memory_error(monkeypatch):
    with pytest.raises(MemoryError):
        check_status(2)
    monkeypatch.setattr(library, "_lib", type("Library", (), {
        "stars_program_create": staticmethod(lambda: None), "stars_last_error": staticmethod(lambda: b"out of memory"),
        "stars_program_run": staticmethod(lambda *_: -2),
    }))
    with pytest.raises(MemoryError, match="out of memory"):
        libstars.Program()
    program = libstars.Program.__new__(libstars.Program)
    program._handle, program._whole = None, True
    with pytest.raises(MemoryError, match="out of memory"):
        program.run(1, torch.zeros(1, dtype=torch.int32))


# -- threads ----------------------------------------------------------------------------------------------------------


def products(rows: int):
    generator = torch.Generator().manual_seed(rows)
    x, matrix = torch.randn(rows, 300, generator=generator), torch.randn(1409, 300, generator=generator)
    return x, kernels.pack(matrix)


def test_the_number_of_threads_is_set_while_others_are_at_work(monkeypatch):
    before = libstars.num_threads()
    monkeypatch.setenv("STARS_USABLE_CPUS", "5")
    stop, errors, counts = threading.Event(), [], []

    def work(rows: int) -> None:
        x, weight = products(rows)
        expected, count = run_linear(x, weight), 0
        while not stop.is_set():
            if not torch.equal(run_linear(x, weight), expected):
                errors.append(rows)
            count += 1
        counts.append(count)

    def change(first: int) -> None:
        turn = first
        while not stop.is_set():
            libstars.set_num_threads(1 + turn % 5)
            if not 1 <= libstars.num_threads() <= 5:
                errors.append(libstars.num_threads())
            turn += 1
            time.sleep(0.0005)

    workers = [threading.Thread(target=work, args=(rows,)) for rows in (3, 37)]
    workers += [threading.Thread(target=change, args=(first,)) for first in (0, 2)]
    for worker in workers:
        worker.start()
    time.sleep(0.7)
    stop.set()
    for worker in workers:
        worker.join()
    libstars.set_num_threads(4)
    assert libstars.num_threads() == 4  # the last word, whoever was at work
    monkeypatch.undo()
    libstars.set_num_threads(before)
    assert not errors and min(counts) > 5


def test_no_more_threads_than_usable_cpus(monkeypatch):
    before, usable = libstars.num_threads(), libstars.usable_cpus()
    assert 1 <= usable <= len(os.sched_getaffinity(0))
    try:
        libstars.set_num_threads(usable + 3)
        assert libstars.num_threads() == usable
        libstars.set_num_threads(1)
        assert libstars.num_threads() == 1
        monkeypatch.setenv("STARS_USABLE_CPUS", "6")
        for asked, given in (("4", 4), ("9", 6), ("0", 6), ("-2", 6), ("99999999999999999999", 6), ("two", 6)):
            monkeypatch.setenv("STARS_NUM_THREADS", asked)
            libstars.set_num_threads(0)
            assert libstars.num_threads() == given, asked
        libstars.set_num_threads(2**31 - 1)
        assert libstars.num_threads() == 6
        monkeypatch.setenv("STARS_USABLE_CPUS", "100000")  # at most 256 in any case
        assert libstars.usable_cpus() == 256
    finally:
        monkeypatch.undo()
        libstars.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_can_compute_that_was_forked_beside_a_running_operation():
    x, weight = products(9)
    expected = run_linear(x, weight)
    stop = threading.Event()

    def work() -> None:
        other, other_weight = products(200)
        out = torch.empty(200, 1409)
        while not stop.is_set():
            kernels.linear(other, other_weight, out)

    with threads(3):
        worker = threading.Thread(target=work)
        worker.start()
        try:
            for turn in range(10):
                child = os.fork()
                if child == 0:
                    code = 3
                    try:
                        libstars.set_num_threads(1 + turn % 3)
                        out = torch.empty(9, 1409)
                        kernels.linear(x, weight, out)
                        code = 0 if torch.equal(out, expected) else 1
                    finally:
                        os._exit(code)
                for _ in range(600):  # a deadlock is an error, not a hanging test
                    pid, status = os.waitpid(child, os.WNOHANG)
                    if pid:
                        break
                    time.sleep(0.05)
                else:
                    os.kill(child, 9)
                    os.waitpid(child, 0)
                    status = "a child that does not end"
                assert status == 0
        finally:
            stop.set()
            worker.join()


# -- a container's CPUs -----------------------------------------------------------------------------------------------

V2 = "30 23 0:26 {root} {point} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "33 31 0:30 {root} {point} rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
OTHERS = ("22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"
          "34 31 0:31 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n")


def system(folder: Path, cgroup: str, mounts: str, files: dict[str, str]) -> bytes:
    """A root of a file system with these cgroups."""
    texts = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": OTHERS + mounts, **files}
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder).encode()


def v1(path: str, quota: int, period: int = 100000) -> dict[str, str]:
    folder = f"sys/fs/cgroup/cpu{path}"
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


def v2(text: str, path: str = "") -> dict[str, str]:
    return {f"sys/fs/cgroup{path}/cpu.max": text}


CPU2, CPU1 = V2.format(root="/", point="/sys/fs/cgroup"), V1.format(root="/", point="/sys/fs/cgroup/cpu")
DOCKER = V2.format(root="/docker/4f2", point="/sys/fs/cgroup")


@pytest.mark.parametrize("cgroup, mounts, files, quota", [
    ("0::/\n", CPU2, {}, 0.0),  # the root has no such file
    ("0::/\n", CPU2, v2("max 100000\n"), 0.0),
    ("0::/\n", CPU2, v2("150000 100000\n"), 1.5),
    ("0::/\n", CPU2, v2("50000 20000\n"), 2.5),
    ("0::/\n", CPU2, v2("300000"), 3.0),  # the period's default
    # The smallest on the way up, wherever it is; neighbours do not count.
    ("0::/a/b/c\n", CPU2, {**v2("max 100000\n", "/a/b/c"), **v2("200000 100000\n", "/a/b"),
                           **v2("400000 100000\n", "/a"), **v2("1000 100000\n", "/d")}, 2.0),
    ("0::/a/b\n", CPU2, {**v2("700000 100000\n", "/a/b"), **v2("300000 100000\n", "/a")}, 3.0),
    ("0::/a/b\n", CPU2, {**v2("50000 100000\n", "/a/b"), **v2("max 100000\n", "/a")}, 0.5),
    # A container whose own cgroup is mounted, seen by the host's path; and a cgroup outside of the namespace.
    ("0::/docker/4f2\n", DOCKER, v2("250000 100000\n"), 2.5),
    ("0::/docker/4f2/job\n", DOCKER, {**v2("120000 100000\n", "/job"), **v2("250000 100000\n")}, 1.2),
    ("0::/docker/4f2x\n", DOCKER, v2("250000 100000\n"), 2.5),
    ("0::/../other\n", CPU2, {**v2("100000 100000\n"), "sys/fs/other/cpu.max": "1 100000\n"}, 1.0),
    ("0::/a\n", V2.format(root="/", point="/mnt/c\\040g"), {"mnt/c g/a/cpu.max": "130000 100000\n"}, 1.3),
    # Version 1: of the hierarchy with the cpu controller.
    ("5:memory:/m\n4:cpu,cpuacct:/a/b\n", CPU1, {**v1("/a/b", -1), **v1("/a", 180000, 60000), **v1("", -1)}, 3.0),
    ("4:cpuacct,cpu:/a\n", CPU1, v1("/a", 20000), 0.2),
    ("4:cpuset:/a\n", CPU1, v1("/a", 20000), 0.0),
    ("4:cpu:/docker/9\n", V1.format(root="/docker/9", point="/sys/fs/cgroup/cpu"), v1("", 90000, 60000), 1.5),
    # Both: the processes of one hierarchy, limited in either.
    ("4:cpu:/a\n0::/b\n", CPU1 + V2.format(root="/", point="/sys/fs/cgroup/unified"),
     {**v1("/a", 300000), **v2("200000 100000\n", "/unified/b")}, 2.0),
    # What cannot be read says nothing.
    ("0::/\n", CPU2, v2("lots\n"), 0.0),
    ("0::/\n", CPU2, v2("-5 100000\n"), 0.0),
    ("0::/\n", CPU2, v2("100000 0\n"), 0.0),
    ("0::/\n", CPU2, v2(""), 0.0),
    ("", CPU2, v2("100000 100000\n"), 0.0),
    ("nonsense\n0:\n", CPU2, v2("100000 100000\n"), 0.0),
    ("0::/a\n", "", v2("100000 100000\n", "/a"), 0.0),
    ("0::/a\n", "30 - cgroup2\n-\n\n", v2("100000 100000\n", "/a"), 0.0),
])
@linux_only
def test_the_quota_of_a_container(cgroup, mounts, files, quota, tmp_path):
    assert loaded().stars_cpu_quota(system(tmp_path, cgroup, mounts, files)) == quota


@linux_only
def test_nothing_of_the_hosts_streams_and_locales_is_needed():
    """The first operation of a process counts the CPUs, whatever C++ library the process has loaded by then."""
    names = library.library_path().read_bytes()
    if b"libstdc++.so" not in names:
        pytest.skip("this libstars needs no C++ library of the host's")
    assert b"_ZSt9terminatev" in names  # the names of what is needed do lie in the file, as they are
    assert [name for name in (b"basic_ifstream", b"basic_filebuf", b"stringstream", b"basic_istream", b"_ZNSt6locale")
            if name in names] == []


@linux_only
@pytest.mark.parametrize("text, quota", [
    ("", 0.0), ("\n", 0.0), ("max\n", 0.0), ("-1 100000\n", 0.0), ("0 100000\n", 0.0), ("150000 0\n", 0.0),
    ("150000 max\n", 0.0), ("150000x\n", 0.0), ("9" * 400, 0.0), (" 150000  50000\n", 3.0), ("\0\1" * 3000, 0.0),
    ("0" * 5000 + "150000 100000\n", 1.5),  # more than is read at once
])
def test_a_quota_is_two_whole_numbers_and_anything_else_is_none(text, quota, tmp_path):
    assert loaded().stars_cpu_quota(system(tmp_path, "0::/\n", CPU2, v2(text))) == quota


@linux_only
def test_a_file_that_cannot_be_read_is_no_quota(tmp_path):
    root = system(tmp_path, "0::/\n", CPU2, {})
    (tmp_path / "sys/fs/cgroup/cpu.max").mkdir(parents=True)  # it opens, and reading it fails
    assert loaded().stars_cpu_quota(root) == 0.0


@linux_only
def test_the_usable_cpus_are_the_quota_rounded_up_or_the_affinity(tmp_path, monkeypatch):
    cpus = len(os.sched_getaffinity(0))
    for quota, usable in ((1000, 1), (100000, 1), (100001, min(2, cpus)), (150000, min(2, cpus)), (10**9, cpus)):
        root = system(tmp_path, "0::/\n", CPU2, v2(f"{quota} 100000\n"))
        assert loaded().stars_usable_cpus(root) == usable
    assert loaded().stars_cpu_quota(str(tmp_path / "nothing").encode()) == 0.0
    assert loaded().stars_usable_cpus(str(tmp_path / "nothing").encode()) == cpus
    monkeypatch.setenv("STARS_USABLE_CPUS", "7")
    assert loaded().stars_usable_cpus(root) == 7
