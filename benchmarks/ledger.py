"""The ledger of pages: the engine's PagePool, libstars' through ctypes, and libstars' from C, on the same operations.

    python benchmarks/ledger.py      writes results/ledger.json; the last column needs a C compiler

2,000 pages of 16 tokens. "A request" looks for its prompt, shares what is there, takes and publishes the rest, gives
all back: 400 prompts in turn, which fill the pool, so that pages are reused. "match" finds what is there. Times are
those of the one thread that runs, the least of several runs, in microseconds.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from common import RESULTS, Figure, describe_machine, write_json

from stars.bindings import libstars
from stars.bindings.ledger import Ledger
from stars.page_pool import PagePool

PAGES, SIZE, TEXTS, REPEATS = 2000, 16, 400, 15
SOURCE = Path(__file__).with_name("ledger.c")


def least(run: Callable[[list[int]], object], texts: list[list[int]]) -> float:
    """Microseconds of one call, by the fastest of REPEATS runs over all texts."""
    best = float("inf")
    for _ in range(REPEATS):
        begin = time.thread_time_ns()
        for text in texts:
            run(text)
        best = min(best, (time.thread_time_ns() - begin) / len(texts) / 1000)
    return best


def chunks(text: list[int]) -> list[tuple[int, ...]]:
    """As the engine's cache makes them."""
    return [tuple(text[i : i + SIZE]) for i in range(0, len(text) - SIZE + 1, SIZE)]


def of_pool(count: int, texts: list[list[int]]) -> dict[str, float]:
    """The engine's ledger."""
    pool = PagePool(PAGES)

    def request(text: list[int]) -> None:
        found = pool.match(chunks(text))
        pool.share(found)
        pages = found + pool.alloc(count - len(found))
        pool.publish(pages, chunks(text))
        pool.free(pages)

    times = {"alloc and release": least(lambda text: pool.free(pool.alloc(count)), texts),
             "a request": least(request, texts), "match": least(lambda text: pool.match(chunks(text)), texts[-50:])}
    if count == 16:
        times["check"] = least(lambda text: pool.check_integrity(Counter()), texts[:5])
    return times


def of_ledger(count: int, texts: list[list[int]]) -> dict[str, float]:
    """libstars', through ctypes."""
    ledger = Ledger(PAGES, SIZE)

    def request(text: list[int]) -> None:
        found = ledger.match(text)
        ledger.share(found)
        pages = found + ledger.alloc(count - len(found))
        ledger.publish(pages, text)
        ledger.release(pages)

    times = {"alloc and release": least(lambda text: ledger.release(ledger.alloc(count)), texts),
             "a request": least(request, texts), "match": least(ledger.match, texts[-50:])}
    if count == 16:
        times["check"] = least(lambda text: ledger.check_integrity(Counter()), texts[:5])
    return times


def from_c() -> dict[str, float]:
    """ledger.c's microseconds by its names; empty where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return {}
    library = libstars.library_path()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "ledger"
        subprocess.run([compiler, "-O2", "-I", str(library.parents[1]), str(SOURCE), str(library),
                        f"-Wl,-rpath,{library.parent}", "-o", str(program)], check=True)
        printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    return {name: nanoseconds / 1000 for name, nanoseconds in json.loads(printed).items()}


def main() -> None:
    """Measures all three and prints them side by side."""
    rng = random.Random(1)
    ours, theirs = dict[str, float](), dict[str, float]()
    for count in (1, 4, 16):
        texts = [[rng.randrange(50_000) for _ in range(SIZE * count)] for _ in range(TEXTS)]
        for times, measure in ((ours, of_pool), (theirs, of_ledger)):
            times.update({f"{name}, {PAGES if name == 'check' else count} pages": value
                          for name, value in measure(count, texts).items()})
    in_c = from_c()
    print(f"{'microseconds':40}{'PagePool':>10}{'ctypes':>10}{'C':>10}")
    for name in {**ours, **in_c}:
        cells = (f"{times[name]:10.2f}" if name in times else " " * 10 for times in (ours, theirs, in_c))
        print(f"{name:40}{''.join(cells)}")
    figures = [Figure(name, ours.get(name), "us", "libstars through ctypes", theirs.get(name),
                      ours[name] / theirs[name] if name in ours else None,
                      detail={"libstars from C, us": in_c.get(name)}) for name in {**ours, **in_c}]
    settings = {"pages": PAGES, "page_size": SIZE, "texts": TEXTS, "repeats": REPEATS}
    write_json(RESULTS / "ledger.json", describe_machine(), settings, figures)


if __name__ == "__main__":
    main()
