"""What a stage finds out, written to its file as it is found: a crash loses only what comes after."""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Settings:
    """How the stages run. `dry`: on the CPU, toy shapes, references for kernels, no graphs."""

    dry: bool = False
    quick: bool = False
    facts: dict[str, Any] = field(default_factory=dict)  # of the stages before

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def bandwidth(self) -> float | None:
        """Measured bytes per second of a large copy, read and written."""
        return self.facts.get("copy_gb_s", 0) * 1e9 or None


class Record:
    """Checks, figures and facts of one stage."""

    def __init__(self, path: str | Path, stage: str, with_aims: bool = True):
        self.path = Path(path)
        self.with_aims = with_aims  # a dry run has figures, but none that could reach an aim
        self.lost: list[str] = []  # measurements that failed
        self.begin = time.perf_counter()
        self.content: dict[str, Any] = {"stage": stage, "status": "running", "seconds": 0.0, "error": None,
                                        "checks": [], "figures": [], "facts": {}, "notes": []}
        self.save()

    def check(self, name: str, passed: bool, **detail: Any) -> bool:
        """A correctness check and the numbers behind it."""
        self.content["checks"].append({"name": name, "passed": bool(passed), "detail": detail})
        if not passed:
            print(f"  FAILED {name}: {detail}", flush=True)
        self.save()
        return bool(passed)

    @contextmanager
    def checking(self, name: str):
        """An exception inside is a failed check of this name, and the stage goes on; a CUDA error ends it."""
        try:
            yield
        except Exception as error:
            lines = "".join(traceback.format_exception(error)).strip().splitlines()
            self.check(name, False, error=lines[-12:])
            if _ends_the_process(error):
                raise

    @contextmanager
    def measuring(self, name: str):
        """An exception inside loses the figures of this name, and the stage goes on to the others; it is failed."""
        try:
            yield
        except Exception as error:
            self.lost.append(name)
            traceback.print_exc()
            self.note(f"{name} failed: {type(error).__name__}: {str(error)[:600]}")
            if _ends_the_process(error):
                raise

    def figure(self, name: str, value: float | None, unit: str, limit: float | None = None, of: str = "",
               aim: str = "", higher_is_better: bool = False, **detail: Any) -> None:
        """A measured figure; `limit` is the best it could be in the same unit, or what it is compared with: `of` says.

        The ratio is value / limit, the aim (such as "<= 1.1" or ">= 5") is on the ratio. `higher_is_better` only says
        how to read it.
        """
        ratio = value / limit if value is not None and limit else None
        reached = None
        aim = aim if self.with_aims else ""
        if aim and ratio is not None:
            sign, bound = aim.split()
            reached = ratio <= float(bound) if sign == "<=" else ratio >= float(bound)
        self.content["figures"].append({
            "name": name, "value": value, "unit": unit, "limit": limit, "of": of, "ratio": ratio, "aim": aim,
            "reached": reached, "higher_is_better": higher_is_better, "detail": detail})
        shown = "" if ratio is None else f"   {ratio:.2f} of {of or 'its limit'}"
        print(f"  {name}: {number(value)} {unit}{shown}", flush=True)
        self.save()

    def fact(self, name: str, value: Any) -> None:
        """Something later stages or readers need to know."""
        self.content["facts"][name] = value
        self.save()

    def note(self, text: str) -> None:
        """Why something was left out, and the like."""
        self.content["notes"].append(text)
        print(f"  {text}", flush=True)
        self.save()

    def finish(self, status: str, error: str | None = None) -> None:
        self.content["status"], self.content["error"] = status, error
        self.save()

    def save(self) -> None:
        """Replaces the file in one step, so that whoever reads it finds whole JSON."""
        self.content["seconds"] = round(time.perf_counter() - self.begin, 2)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.content, default=str))
        os.replace(beside, self.path)


def seconds_left(before: float = 10.0) -> float:
    """Until `before` seconds ahead of the stage's deadline; an hour where there is none."""
    deadline = os.environ.get("STARS_STAGE_DEADLINE")
    return 3600.0 if deadline is None else float(deadline) - before - time.monotonic()


def _ends_the_process(error: Exception) -> bool:
    """A CUDA error leaves the context unusable."""
    return "CUDA error" in str(error) or "device-side assert" in str(error)


def number(value: float | None) -> str:
    """Three digits, or as many as an integer has."""
    if value is None:
        return "none"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
