"""One stage in a process of its own: stage.py NAME --out FILE [--facts FILE] [--quick] [--dry-run]."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import importable
from record import Record, Settings
from stages import STAGES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--out", required=True)
    parser.add_argument("--facts")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    importable.install()
    record = Record(options.out, options.name, with_aims=not options.dry_run)
    facts = json.loads(Path(options.facts).read_text()) if options.facts else {}
    settings = Settings(options.dry_run, options.quick or options.dry_run, facts)
    try:
        _break_for_a_test(options.name)
        module, _, function = next(stage.module for stage in STAGES if stage.name == options.name).partition(":")
        import torch

        torch.set_num_threads(1 if settings.dry else min(8, os.cpu_count() or 1))
        if not settings.dry and not torch.cuda.is_available():
            record.fact("gpu", False)
            raise RuntimeError("torch finds no GPU here: use a CUDA build of torch on a machine with one, or --dry-run")
        with torch.no_grad():
            getattr(importlib.import_module(module), function or "run")(record, settings)
    except BaseException as error:
        traceback.print_exc()
        lines = "".join(traceback.format_exception(error)).strip().splitlines()
        record.finish("failed", "\n".join(lines[-12:]))
        return 1
    problems = ["a check failed"] * any(not check["passed"] for check in record.content["checks"])
    problems += [f"lost: {', '.join(record.lost)}"] if record.lost else []
    record.finish("failed" if problems else "ok", "; ".join(problems) or None)
    return 1 if problems else 0


def _break_for_a_test(name: str) -> None:
    """STARS_DEVICE_BREAK="micro=raise,engine=hang": how the runner's isolation of stages is tested."""
    for entry in os.environ.get("STARS_DEVICE_BREAK", "").split(","):
        stage, _, how = entry.partition("=")
        if stage == name and how == "raise":
            raise RuntimeError("broken on purpose")
        if stage == name and how == "hang":
            time.sleep(3600)
        if stage == name and how == "crash":
            os.abort()


if __name__ == "__main__":
    sys.exit(main())
