"""What a stage finds out, part by part, written to its file as it is found: a kill loses only what comes after."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK, FAILED, RUNNING, NO_TIME = "ok", "failed", "running", "no time"
"""How a part stands. One that is still running when its stage has ended was cut off."""


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
        """Measured bytes per second of the best reader: the limit of what reads weights and keys."""
        return self.facts.get("read_gb_s", 0) * 1e9 or None

    @property
    def copy_bandwidth(self) -> float | None:
        """Measured bytes per second of a large copy, read and written: the limit of what writes as much as it reads."""
        return self.facts.get("copy_gb_s", 0) * 1e9 or None


def empty(stage: str) -> dict[str, Any]:
    """What a stage's file holds before anything was found."""
    return {"stage": stage, "status": RUNNING, "seconds": 0.0, "error": None, "parts": {}, "checks": [], "figures": [],
            "facts": {}, "notes": []}


class Record:
    """Checks, figures and facts of one stage. Parts in `done` are not run: what they found is in `content` already."""

    def __init__(self, path: str | Path, stage: str, with_aims: bool = True, content: dict[str, Any] | None = None):
        self.path = Path(path)
        self.with_aims = with_aims  # a dry run has figures, but none that could reach an aim
        self.begin = time.perf_counter()
        self.content = empty(stage) if content is None else content | {"status": RUNNING, "error": None}
        self.done: Collection[str] = frozenset(self.content["parts"])
        self.part_name = ""
        self.save()

    def part(self, name: str, function: Callable[..., object], *arguments: Any, least: float = 0.0) -> None:
        """Runs one part of the stage. An exception costs that part and no other, unless it leaves the device unusable:
        then the part's name is noted as what has ended the process, and DeviceLost is raised.

        least: seconds it needs; with fewer left it is not begun.
        """
        if name in self.done:
            return
        if seconds_left() < least:
            self.content["parts"][name] = NO_TIME
            self.note(f"no time was left for {name}")
            return
        self.content["parts"][name], self.part_name = RUNNING, name
        self.content["part_began"] = time.monotonic()
        self.save()
        failed = sum(not check["passed"] for check in self.content["checks"])
        try:
            function(*arguments)
        except OutOfTime as error:
            self.content["parts"][name] = NO_TIME
            self.note(str(error))
        except Exception as error:
            lines = "".join(traceback.format_exception(error)).strip().splitlines()
            print("\n".join(lines), flush=True)
            self.content["parts"][name] = FAILED
            self.note(f"{name} failed: {' | '.join(line.strip() for line in lines[-6:])[-600:]}")
        else:
            now = sum(not check["passed"] for check in self.content["checks"])
            self.content["parts"][name] = OK if now == failed else FAILED
        finally:
            self.part_name = ""
            self.save()
        lost = device_lost()  # also by a kernel that was still running when the part had ended
        if lost is not None:
            self.content["parts"][name], self.content["ended_by"] = FAILED, name
            self.note(f"{name} left the device unusable: {lost[:300]}")
            raise DeviceLost(lost)

    def check(self, name: str, passed: bool, **detail: Any) -> bool:
        """A correctness check and the numbers behind it."""
        self.content["checks"].append({"name": name, "part": self.part_name, "passed": bool(passed), "detail": detail})
        if not passed:
            print(f"  FAILED {name}: {detail}", flush=True)
        self.save()
        return bool(passed)

    @contextmanager
    def checking(self, name: str):
        """An exception inside is a failed check of this name, and the part goes on; a lost device ends it."""
        try:
            yield
        except Exception as error:
            lines = "".join(traceback.format_exception(error)).strip().splitlines()
            self.check(name, False, error=lines[-12:])
            if device_lost() is not None:
                raise

    def figure(self, name: str, value: float | None, unit: str, limit: float | None = None, of: str = "",
               aim: str = "", higher_is_better: bool = False, **detail: Any) -> None:
        """A measured figure; `limit` is the best it could be in the same unit, or what it is compared with: `of` says.

        The ratio is value / limit. `aim` names the row of `aims.AIMS` that the figure stands for, whose bound is on the
        ratio. `higher_is_better` only says how to read it.
        """
        ratio = value / limit if value is not None and limit else None
        self.content["figures"].append({
            "name": name, "part": self.part_name, "value": value, "unit": unit, "limit": limit, "of": of,
            "ratio": ratio, "aim": aim if self.with_aims else "", "higher_is_better": higher_is_better,
            "detail": detail})
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

    def finish(self, error: str | None = None) -> bool:
        """The stage has run to its end, or ended with `error`; whether all of it is well."""
        parts = self.content["parts"]
        lost = [name for name, how in parts.items() if how in (FAILED, RUNNING)]
        bad = sum(not check["passed"] for check in self.content["checks"])
        problems = [f"{bad} checks failed"] * bool(bad) + [f"failed: {', '.join(lost)}"] * bool(lost)
        self.content["error"] = error or "; ".join(problems) or None
        self.content["status"] = FAILED if self.content["error"] else OK
        self.save()
        return self.content["status"] == OK

    def save(self) -> None:
        """Replaces the file in one step, so that whoever reads it finds whole JSON."""
        self.content["seconds"] = round(time.perf_counter() - self.begin, 2)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.content, default=str))
        os.replace(beside, self.path)


def complete(content: dict[str, Any]) -> bool:
    """Whether a stage has nothing left to repeat."""
    return content["status"] == OK and all(how == OK for how in content["parts"].values())


def kept(content: dict[str, Any]) -> dict[str, Any]:
    """A stage's content with its good parts alone, for a run that repeats the others."""
    good = {name for name, how in content["parts"].items() if how == OK}
    return empty(content["stage"]) | {
        "parts": {name: OK for name in content["parts"] if name in good}, "facts": content["facts"],
        "checks": [check for check in content["checks"] if check["part"] in good],
        "figures": [figure for figure in content["figures"] if figure["part"] in good]}


def seconds_left(before: float = 1.0) -> float:
    """Until `before` seconds ahead of the stage's deadline; an hour where there is none."""
    deadline = os.environ.get("STARS_STAGE_DEADLINE")
    return 3600.0 if deadline is None else float(deadline) - before - time.monotonic()


class OutOfTime(Exception):
    """A part that found no time for all of its work: what it has found counts, and it is to be repeated."""


class DeviceLost(RuntimeError):
    """Nothing more can be run on the device by this process."""


def device_lost() -> str | None:
    """The error that the device answers every call with from now on, if there is one: an illegal access, say."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:  # of whatever class a version of torch gives it
        return f"{type(error).__name__}: {error}"
    return None


def number(value: float | None) -> str:
    """Three digits, or as many as an integer has."""
    if value is None:
        return "none"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
