"""What a chat waits beside a long batch of somebody else, and how late a deadline is kept, on the shipped pair.

    python benchmarks/fairness.py [--out FILE] [--chats 300] [--deadlines 2000] [--threads N] [--quick]

A user `chat` asks for one short text after another and thinks between them; other users keep so many long texts under
way. A chat's time runs from the moment at which it was to be asked, so the rest of the round that is under way counts.
Each row stands beside the chats alone, measured in turns of one process. "one user" is the same load without names, as
it was before there were users.

Deadlines are random, of requests of all methods in turn beside each other: one is kept within a segment where the
request's last output is late by no more than the call of `step` took that was under way at the deadline, or had just
returned then.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import DEMO_LM, DEMO_RM, OPENINGS, RESULTS, describe_machine, set_threads

import stars

CHAT = stars.STARS(reward_threshold=1.0, beta=0.7, segment_size=8)
BATCH = stars.STARS(reward_threshold=1.0, beta=0.7, segment_size=16)
METHODS = (CHAT, stars.Sample(), stars.BestOfN(4), stars.SegmentBeam(2, 2), stars.ParticleFilter(3, 0.5),
           stars.CARDS(reward_threshold=1.0), stars.RejectionSampling(1.0, 0.7, 4), stars.BlockwiseBestOfK(4))
CHAT_TOKENS, BATCH_TOKENS = 32, 128
LONG_PROMPT = 12  # openings, one after the other


class Load(NamedTuple):
    """What other users keep under way."""

    name: str
    users: dict[str | None, int]  # requests side by side of each
    chat: str | None = "chat"  # the name that the chat goes by
    chat_priority: int = 0
    batch_priority: int = 0
    long_prompts: bool = False


LOADS = (
    Load("alone", {}), Load("1:1", {"batch": 1}), Load("10:1", {"batch": 10}), Load("100:1", {"batch": 100}),
    Load("10:1 and 3:1, three users", {"batch": 10, "other": 3}),
    Load("10:1, long prompts", {"batch": 10}, long_prompts=True),
    Load("10:1, priorities", {"batch": 10}, batch_priority=1),
    Load("10:1, one user", {None: 10}, chat=None), Load("40:1, one user", {None: 40}, chat=None),
    Load("40:1, one user, priorities", {None: 40}, chat=None, batch_priority=1),
)
LONG_WAITS = ("40:1, one user", "40:1, one user, priorities")  # of which two chats a turn are enough


def chat_times(engine: stars.Engine, load: Load, count: int, thinks: float,
               first: int = 0) -> tuple[list[float], float, list[str]]:
    """Seconds of `count` chats from number `first` on, tokens of others a second, and the chats' texts."""
    chance, times, texts = random.Random(first), [], []
    others: dict[str, str | None] = {}
    asked = tokens = 0
    begin = time.perf_counter()
    due, chat = begin + thinks, None
    while len(times) < count:
        for user, many in load.users.items():
            for _ in range(many - sum(name == user for name in others.values())):
                asked += 1
                prompt = OPENINGS[asked % len(OPENINGS)]
                if load.long_prompts:
                    prompt = " ".join(chance.sample(OPENINGS, LONG_PROMPT))
                others[engine.add_request(prompt, stars.SamplingParams(
                    max_tokens=BATCH_TOKENS, seed=asked, ignore_eos=True), BATCH, user=user,
                    priority=load.batch_priority)] = user
        if chat is None and (time.perf_counter() >= due or not others):
            while time.perf_counter() < due:
                time.sleep(0.0005)
            number = first + len(times)
            chat = engine.add_request(OPENINGS[number % len(OPENINGS)], stars.SamplingParams(
                max_tokens=CHAT_TOKENS, seed=number, ignore_eos=True), CHAT, user=load.chat,
                priority=load.chat_priority)
        for output in engine.step():
            if output.finished and output.request_id == chat:
                now = time.perf_counter()
                times.append(now - due)
                texts.append(output.outputs[0].text or "")
                chat, due = None, now + thinks * chance.uniform(0.5, 1.5)
            elif output.finished:
                del others[output.request_id]
                tokens += len(output.outputs[0].token_ids)
    seconds = time.perf_counter() - begin
    for name in others:
        engine.abort(name)
    while engine.has_unfinished_requests():
        engine.step()
    engine.check_integrity()
    return times, tokens / seconds, texts


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share is not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def deadlines(engine: stars.Engine, count: int) -> dict[str, Any]:
    """How many of so many random deadlines are kept within a segment, and how late the others are."""
    chance, asked, kept, late, missed = random.Random(2), 0, 0, [], 0
    due: dict[str, float] = {}
    before = 0.0
    while kept + missed < count:
        while len(due) < 8:
            asked += 1
            seconds = chance.uniform(0.005, 0.4)
            name = engine.add_request(OPENINGS[asked % len(OPENINGS)], stars.SamplingParams(
                max_tokens=400, seed=asked, ignore_eos=True), METHODS[asked % len(METHODS)],
                budget=stars.Budget(seconds=seconds))
            due[name] = time.monotonic() + seconds
        began = time.monotonic()
        outputs = engine.step()
        now = time.monotonic()
        for output in outputs:
            if output.finished:
                deadline = due.pop(output.request_id)
                if any(one.finish_reason == "deadline" for one in output.outputs):
                    late.append(now - deadline)
                    in_time = now - deadline <= max(before, now - began)
                    kept, missed = kept + in_time, missed + (not in_time)
        before = now - began
    for name in due:
        engine.abort(name)
    while engine.has_unfinished_requests():
        engine.step()
    engine.check_integrity()
    return {"deadlines": kept + missed, "kept_within_a_segment": kept / (kept + missed), "late_seconds": {
        "median": quantile(late, 0.5), "p99": quantile(late, 0.99), "most": max(late)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "fairness.json")
    parser.add_argument("--chats", type=int, default=300, help="of each load")
    parser.add_argument("--deadlines", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=15, help="in which the chats of all loads are divided")
    parser.add_argument("--quick", action="store_true", help="whether it runs, not how fast")
    given = parser.parse_args()
    if given.quick:
        given.chats, given.deadlines, given.turns = 4, 40, 1
    set_threads(given.threads)
    warnings.simplefilter("ignore")
    engine = stars.Engine(DEMO_LM, DEMO_RM, device="cpu", max_num_seqs=32)
    chat_times(engine, LOADS[2], 2, 0.01)  # step times are measured where they are first needed
    median = quantile(chat_times(engine, LOADS[0], 5, 0.01)[0], 0.5)
    times: dict[str, list[float]] = {load.name: [] for load in LOADS}
    others: dict[str, list[float]] = {load.name: [] for load in LOADS}
    texts: dict[str, list[list[str]]] = {load.name: [] for load in LOADS}
    each = given.chats // given.turns
    for turn in range(given.turns):
        for load in LOADS:
            seconds, rate, said = chat_times(engine, load, each if load.name not in LONG_WAITS else 2, median,
                                             turn * each)
            times[load.name] += seconds
            others[load.name].append(rate)
            texts[load.name].append(said)
    rows = []
    for load in LOADS:
        row = {"load": load.name, "chats": len(times[load.name]), "others_tokens_per_second": sum(
            others[load.name]) / len(others[load.name]),
            "texts_as_alone": all(said == alone[: len(said)] for said, alone in zip(
                texts[load.name], texts["alone"], strict=True))}
        for label, share in (("median", 0.5), ("p99", 0.99)):
            own = quantile(times["alone"], share)
            row[f"{label}_seconds"] = quantile(times[load.name], share)
            row[f"{label}_over_alone"] = quantile(times[load.name], share) / own
        rows.append(row)
        print("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                        for name, value in row.items()), flush=True)
    late = deadlines(engine, given.deadlines)
    print(late)
    given.out.write_text(json.dumps({
        "machine": describe_machine(), "settings": {
            "chat": f"{CHAT_TOKENS} tokens, {CHAT}", "batch": f"{BATCH_TOKENS} tokens, {BATCH}", "max_num_seqs": 32,
            "max_num_lanes": engine.config.max_num_lanes, "thinks": "half to one and a half of a chat's own time"},
        "rows": rows, "deadlines": late}, indent=1) + "\n")


if __name__ == "__main__":
    main()
