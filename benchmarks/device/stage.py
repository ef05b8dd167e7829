"""One stage in a process of its own: stage.py NAME --out FILE [--standby] [--dry-run] [--quick] [--parts FILE].

With --standby it imports what is slow to import, says so by an empty file FILE with the suffix .ready, and then waits
for one line on its standard input, the JSON of {"deadline": of time.monotonic(), "facts": {…}}. So the imports of a
stage fall into the time of the one before it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import importable
from record import Record, Settings, kept
from stages import STAGES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--out", required=True)
    parser.add_argument("--parts", help="JSON of what a run before found in this stage: what is good is kept")
    parser.add_argument("--again", action="store_true", help="the parts that were not well are not repeated either")
    parser.add_argument("--standby", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    die_with_the_runner()
    importable.install()
    stage = next(stage for stage in STAGES if stage.name == options.name)
    facts = {}
    how = broken_for_a_test(options.name)
    if options.standby:
        if not how:
            for module in stage.imports.split(","):
                with contextlib.suppress(Exception):  # the stage says what it lacks
                    importlib.import_module(module)
        Path(options.out).with_suffix(".ready").touch()
        line = sys.stdin.readline()
        if not line:  # the runner is gone, or the time is up
            return 1
        given = json.loads(line)
        os.environ["STARS_STAGE_DEADLINE"], facts = str(given["deadline"]), given["facts"]
    before = json.loads(Path(options.parts).read_text()) if options.parts else None
    if before is not None and not options.again:
        before = kept(before)
    record = Record(options.out, options.name, with_aims=not options.dry_run, content=before)
    settings = Settings(options.dry_run, options.quick or options.dry_run, facts)
    try:
        if how:
            record.part("before it breaks", lambda: record.figure("of a stage that breaks", 1.0, "s"))
            break_for_a_test(how, record)
        else:
            run(stage.module, record, settings)
    except BaseException as error:
        traceback.print_exc()
        record.finish("\n".join("".join(traceback.format_exception(error)).strip().splitlines()[-12:]))
        return 1
    return 0 if record.finish() else 1


def run(module: str, record: Record, settings: Settings) -> None:
    """Calls the stage's function."""
    import torch

    torch.set_num_threads(1 if settings.dry else min(8, os.cpu_count() or 1))
    name, _, function = module.partition(":")
    with torch.no_grad(), tuned_in_force(settings):
        getattr(importlib.import_module(name), function or "run")(record, settings)


def tuned_in_force(settings: Settings) -> contextlib.AbstractContextManager[None]:
    """Whoever runs inside goes by the table that the stages before have measured, if there is one."""
    from tables import whole

    table = whole(settings.facts)
    if table is None:
        return contextlib.nullcontext()
    from stars.kernels.triton import tuned

    return tuned.using(tuned.parse(table))


def die_with_the_runner() -> None:
    """Linux ends this process when the one that started it ends, however that ends."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        pass  # not Linux: a killed runner leaves its stage to its own limit


def broken_for_a_test(name: str) -> str:
    """STARS_DEVICE_BREAK="micro=raise,engine=hang": how the runner's isolation of stages is tested."""
    entries = dict(entry.split("=") for entry in os.environ.get("STARS_DEVICE_BREAK", "").split(",") if entry)
    return entries.get(name, "")


def break_for_a_test(how: str, record: Record) -> None:
    """pass does nothing at all, in no time; die is one part that takes the process with it."""
    if how == "apart":
        from parallel import run_apart

        def quick(record: Record, settings: Settings) -> None:
            record.figure("of a part in a process of its own", 1.0, "s")

        run_apart(record, Settings(dry=True), {"quick": quick, "hangs": lambda *given: time.sleep(3600)}, most=2)
    if how == "stuck":
        record.part("stuck", time.sleep, 3600)
        record.part("behind it", lambda: record.figure("of a part behind one that is stuck", 1.0, "s"))
    if how == "die":
        record.part("dies", os.abort)
        record.part("behind it", lambda: record.figure("of a part behind one that dies", 1.0, "s"))
    if how == "raise":
        raise RuntimeError("broken on purpose")
    if how == "hang":
        time.sleep(3600)
    if how == "crash":
        os.abort()


if __name__ == "__main__":
    sys.exit(main())
