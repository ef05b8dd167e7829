"""Servers as processes of their own: started on a free port, watched through /proc, and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

TICKS = os.sysconf("SC_CLK_TCK")


class ServerProcess:
    """A server of OpenAI's API. RuntimeError, with the end of its log, where it does not come up."""

    def __init__(self, command: Sequence[str], log: Path, *, port: int, ready: str = "/health", seconds: float = 180.0,
                 environment: Mapping[str, str] | None = None, cores: set[int] | None = None):
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[Any] = log.open("w")
        self.process = subprocess.Popen(
            [*command], stdin=subprocess.DEVNULL, stdout=self._file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **(environment or {})}, cwd=log.resolve().parent,
            preexec_fn=None if cores is None else lambda: os.sched_setaffinity(0, cores))
        try:
            self._await(ready, seconds)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def cpu_seconds(self) -> float:
        """Of it and all that it started, as far as it still runs."""
        total = 0.0
        for pid in self._family():
            with contextlib.suppress(OSError, IndexError, ValueError):
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                total += (int(fields[11]) + int(fields[12])) / TICKS
        return total

    def resident_bytes(self) -> int:
        """Memory of the same."""
        total = 0
        for pid in self._family():
            with contextlib.suppress(OSError, IndexError, ValueError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return total

    def get(self, path: str) -> str:
        """The body of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return str(response.read().decode())

    def stop(self) -> None:
        """Ends it, by force where it does not end by itself."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(ProcessLookupError):  # what it left behind
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._file.close()

    def _await(self, ready: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}: {self._last_words()}")
            with contextlib.suppress(OSError, urllib.error.URLError):
                self.get(ready)
                return
            time.sleep(0.2)
        raise RuntimeError(f"the server was not ready after {seconds:.0f} s: {self._last_words()}")

    def _last_words(self) -> str:
        self._file.flush()
        return " ".join(self.log.read_text(errors="replace").split())[-300:]

    def _family(self) -> list[int]:
        """Its process and their descendants."""
        parents: dict[int, list[int]] = {}
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with contextlib.suppress(OSError, IndexError, ValueError):
                    parent = int(Path(f"/proc/{entry.name}/stat").read_text().rsplit(")", 1)[1].split()[1])
                    parents.setdefault(parent, []).append(int(entry.name))
        found = [self.process.pid]
        for pid in found:
            found += parents.get(pid, [])
        return found


def end_on_sigterm() -> None:
    """Lets a program that is told to end still stop the servers that it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def stars_serve(arguments: Sequence[str], log: Path, **options: Any) -> ServerProcess:
    """`stars serve` of this checkout."""
    port = free_port()
    program = "import sys; from stars.cli import main; sys.exit(main())"
    return ServerProcess([sys.executable, "-c", program, "serve", *arguments, "--port", str(port)], log, port=port,
                         **options)
