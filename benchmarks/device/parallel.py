"""Parts of a stage in forked processes: what breaks the device breaks it for one part, and they compile side by side.

The stage's own process must not have touched the GPU before, and does not touch it.
"""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from record import FAILED, RUNNING, Record, Settings, empty
from stage import die_with_the_runner

POLL_SECONDS = 0.05
Part = Callable[[Record, Settings], object]


def run_apart(record: Record, settings: Settings, parts: dict[str, Part], most: int) -> None:
    """Runs each of `parts` in a process, `most` at a time, in order; the stage's record has all that they find."""
    waiting = [name for name in parts if name not in record.done]
    running: dict[int, tuple[str, Path]] = {}
    results: dict[str, dict] = {}
    own = record.content
    before = {key: list(own[key]) for key in ("checks", "figures", "notes")}
    while waiting or running:
        while waiting and len(running) < most:
            name = waiting.pop(0)
            path = record.path.with_name(f"{record.path.stem}-{len(results)}.json")
            results[name] = empty(own["stage"]) | {"parts": {name: RUNNING}}
            running[_fork(record, settings, name, parts[name], path)] = name, path
        ended = {pid: status for pid in running for gone, status in [os.waitpid(pid, os.WNOHANG)] if gone}
        changed = bool(ended)
        for pid, (name, path) in list(running.items()):
            content = json.loads(path.read_text()) if path.exists() else results[name]
            if pid in ended:
                del running[pid]
                path.unlink(missing_ok=True)
                if content["parts"].get(name, RUNNING) == RUNNING:  # it did not come to its end
                    content["parts"][name] = FAILED
                    content["notes"].append(f"{name} ended in the midst of its work, {_how(ended[pid])}: see the log")
            changed |= content != results[name]
            results[name] = content
        if changed:
            for key, first in before.items():
                own[key] = first + [entry for content in results.values() for entry in content[key]]
            for name, content in results.items():  # whose process may not have come to its part yet
                own["parts"] |= {name: RUNNING} | content["parts"]
                own["facts"] |= content["facts"]
            record.save()
        time.sleep(POLL_SECONDS)


def _how(status: int) -> str:
    """How a process ended, from what `os.waitpid` says."""
    code = os.waitstatus_to_exitcode(status)
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"


def _fork(record: Record, settings: Settings, name: str, part: Part, path: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        die_with_the_runner()
        mine = Record(path, record.content["stage"], record.with_aims)
        mine.part(name, part, mine, settings)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # nothing of the parent's is to be run to its end here
