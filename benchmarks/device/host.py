"""Does libstars run on this machine's processor? One operation, in a process of its own; where that ends with a signal,
what was being called, and which of its circumstances decides.

libstars is built beside the stages (`build_libstars.py`). Here it is loaded, its CPUs are counted and a product is
formed by several threads. After a crash the same is run again with single circumstances changed, under a handler that
says the address, the registers and the calls, and what the machine says of its CPUs is written down.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from build_libstars import LIBRARY
from record import OutOfTime, Record, Settings, seconds_left

HERE = Path(__file__).resolve().parent
RUN_SECONDS = 12.0  # of one process, imports included
PROGRAM = """
import sys
sys.path.insert(0, {here!r})
import importable
importable.install()
import torch
from stars.bindings import libstars
from stars.kernels.linear import pack, linear, linear_reference
print("isa", libstars.isa(), "threads", libstars.num_threads(), flush=True)
x, matrix = torch.randn(37, 640), torch.randn(1031, 640)
weight, out, right = pack(matrix), torch.empty(37, 1031), torch.empty(37, 1031)
print("packed", weight.packed, flush=True)
linear(x, weight, out)
linear_reference(x, weight, right)
print("error", float((out - right).abs().max() / right.abs().max()), flush=True)
"""
WITHOUT_TORCH = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.stars_usable_cpus.argtypes = [ctypes.c_char_p]
print("usable", library.stars_usable_cpus(None), flush=True)
print("threads", library.stars_num_threads(), flush=True)
"""
CIRCUMSTANCES = {"again": {}, "16 CPUs given": {"STARS_USABLE_CPUS": "16"}, "two threads": {"STARS_NUM_THREADS": "2"},
                 "avx2": {"STARS_ISA": "avx2"}}
LOOKED_AT = ("/proc/self/cgroup", "/sys/fs/cgroup/cpu.max", "/proc/sys/kernel/osrelease", "/etc/ld.so.preload")
ENVIRONMENT = ("LD_", "CXX", "STARS", "GLIBC", "MALLOC", "OMP", "KMP", "LC_", "LANG")
HANDLER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <execinfo.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>
static void on(int s, siginfo_t* i, void* c) {
  void* f[24]; char b[700]; Dl_info d; int n, k, m;
#ifdef __x86_64__
  void* pc = (void*)((ucontext_t*)c)->uc_mcontext.gregs[REG_RIP];
#else
  void* pc = 0;
#endif
  memset(&d, 0, sizeof d); dladdr(pc, &d);
  n = snprintf(b, sizeof b, "SIG%d si_code %d addr %p pc %p = %s+0x%lx (%s)\n", s, i->si_code, i->si_addr, pc,
               d.dli_fname ? d.dli_fname : "?", (long)((char*)pc - (char*)d.dli_fbase),
               d.dli_sname ? d.dli_sname : "?");
  write(2, b, n);
  m = backtrace(f, 24);
  for (k = 2; k < m && k < 16; k++) {
    memset(&d, 0, sizeof d); dladdr(f[k], &d); const char* q = d.dli_fname ? strrchr(d.dli_fname, '/') : 0;
    n = snprintf(b, sizeof b, "  #%d %s+0x%lx %.90s\n", k - 2, q ? q + 1 : "?",
                 (long)((char*)f[k] - (char*)d.dli_fbase), d.dli_sname ? d.dli_sname : "?");
    write(2, b, n);
  }
  signal(s, SIG_DFL); raise(s);
}
__attribute__((constructor)) static void start(void) {
  void* f[2]; static char stack[1 << 16]; struct sigaction a; stack_t t = {stack, 0, sizeof stack};
  backtrace(f, 2); sigaltstack(&t, 0); memset(&a, 0, sizeof a);
  a.sa_sigaction = on; a.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &a, 0); sigaction(SIGBUS, &a, 0); sigaction(SIGILL, &a, 0); sigaction(SIGABRT, &a, 0);
}
"""
"""Preloaded: where a signal came from, as no debugger need be there."""


class Ended(NamedTuple):
    """How a process ended, and what it said."""

    how: str  # "0", "SIGSEGV", "no time" …
    said: str

    @property
    def crashed(self) -> bool:
        """By a signal."""
        return self.how.startswith("SIG")


def run(record: Record, settings: Settings) -> None:
    """A check where the library is there; a note where it is not."""
    record.part("libstars", libstars, record, settings)


def libstars(record: Record, settings: Settings) -> None:
    """Waits for the library, runs it once, and looks into it if it crashed."""
    able = LIBRARY.exists() or all(shutil.which(tool) for tool in ("cmake", "g++"))
    while able and not settings.dry and not LIBRARY.exists() and seconds_left() > 3:
        time.sleep(0.1)
    if not LIBRARY.exists():
        if able and not settings.dry:
            raise OutOfTime("libstars was not built in time")
        record.note("libstars is not there and cannot be built: the CPU side ran by its references")
        return
    first = process({}, sys.executable, "-c", PROGRAM.format(here=str(HERE)))
    record.fact("libstars", {"how": first.how, "said": first.said[-600:]})
    if first.how == "no time":
        raise OutOfTime(f"libstars came to no end in {RUN_SECONDS:g} s: {first.said[-200:]}")
    if first.crashed:
        record.fact("libstars, the crash", looked_into(record))
    record.check("libstars counts this machine's CPUs and shares a product among threads", right(first), how=first.how,
                 said=first.said[-600:])


def right(ended: Ended) -> bool:
    """Whether the program came to its end with the right product."""
    lines = [line.split() for line in ended.said.splitlines()]
    errors = [float(line[1]) for line in lines if line[:1] == ["error"] and len(line) == 2]
    return ended.how == "0" and len(errors) == 1 and errors[0] < 1e-5


def looked_into(record: Record) -> dict[str, dict[str, str] | str]:
    """Each circumstance by itself, with the handler; debuggers, where one is there; and the machine."""
    found: dict[str, dict[str, str] | str] = {}
    with tempfile.TemporaryDirectory() as folder:
        handler = built_handler(Path(folder))
        environment = {"LD_PRELOAD": str(handler)} if handler else {}
        command = (sys.executable, "-c", PROGRAM.format(here=str(HERE)))
        for name, more in CIRCUMSTANCES.items():
            found[name] = process(environment | more, *command)._asdict()
            record.fact("libstars, the crash", found)
        found["without torch"] = process(environment, sys.executable, "-c", WITHOUT_TORCH, str(LIBRARY))._asdict()
        debugger = shutil.which("gdb") or shutil.which("cuda-gdb")
        if debugger and seconds_left() > 4:
            found["debugger"] = process({}, debugger, "-q", "-batch", "-ex", "run", "-ex", "bt 12", "-ex", "x/6i $pc",
                                        "--args", *command)._asdict()
    found["machine"] = "\n".join(f"{path}: {_text(path)}" for path in LOOKED_AT)
    found["environment"] = "\n".join(f"{key}={value[:120]}" for key, value in os.environ.items()
                                     if key.startswith(ENVIRONMENT))
    return found


def built_handler(folder: Path) -> Path | None:
    """The handler as a library; None without a C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    source, library = folder / "handler.c", folder / "libhandler.so"
    source.write_text(HANDLER)
    done = subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-w", "-o", str(library), str(source), "-ldl"],
                          capture_output=True, timeout=10)
    return library if done.returncode == 0 else None


def process(environment: dict[str, str], *command: str) -> Ended:
    """Runs a command for as long as there is time, its last 3,000 characters kept."""
    limit = max(0.5, min(RUN_SECONDS, seconds_left()))
    given = {key: value for key, value in os.environ.items() if key != "PYTHONFAULTHANDLER" or not environment}
    started = subprocess.Popen(command, env=given | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, errors="replace", start_new_session=True)
    try:
        said, _ = started.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        said, _ = started.communicate()
        return Ended("no time", said[-3000:])
    code = started.returncode
    return Ended(signal.Signals(-code).name if code < 0 else str(code), said[-3000:])


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()[:200]
    except OSError as error:
        return type(error).__name__
