"""Weights of 8 bits: an 8B pair in fp8 and in int8, made on the device, beside what 16 bits gave in this run.

Tiles are chosen inside a pass of the whole model first, a few of them. Accuracy is that of a whole pass, beside the
dequantised weights in float32. int4 in groups of 128 is asked for its step alone, where time is left.
"""

from __future__ import annotations

import gc
import statistics

import torch
from bench import Bench, fitting
from chain import Pass, Replay, Shape, Store, error
from models import config_of, random_decoder
from record import Record, Settings
from rehearse import compile_first
from tables import PREFIX, whole
from tune_chain import Tuner, kinds, rehearse

from stars.kernels.triton import tuned
from stars.model.decoder import Decoder

SCHEMES = ("fp8", "int8")
TOKENS = 64
LANES = {False: (1, 16), True: (1, 4)}  # by whether the run is dry
BEFORE = "8B: step ms"
"""The fact by which steps over 16 bits are known, by lanes."""


def llama_8b(record: Record, settings: Settings) -> None:
    """8B and 8B, or 1B and 1B on a card with less memory."""
    compile_first(record, settings, [lambda silent, scheme=scheme: rehearse(settings, scheme) for scheme in SCHEMES])
    name = fitting(record, settings, "Llama-3.1-8B", "Llama-3.2-1B")
    if BEFORE not in settings.facts:
        record.part("bf16", baseline, record, settings, name, least=6.0)
        _free(settings)
    for scheme, seconds in zip(SCHEMES, (9.0, 9.0), strict=True):
        record.part(scheme, of_scheme, record, settings, name, scheme, least=seconds)
        _free(settings)
    record.part("int4", step_alone, record, settings, name, "int4-32" if settings.dry else "int4-128", least=5.0)


def baseline(record: Record, settings: Settings, name: str) -> None:
    """Steps over 16 bits, where no stage of this run has measured them."""
    bench = Bench(record, settings, name, seed=None)
    found = {str(lanes): 1e3 * statistics.median(bench.step_seconds(lanes)) for lanes in LANES[settings.dry]}
    for lanes, ms in found.items():
        record.figure(f"{bench.name}: step, {lanes} lane{'s' * (lanes != '1')}, bf16", ms, "ms")
    record.fact(BEFORE, found)
    settings.facts[BEFORE] = found


def of_scheme(record: Record, settings: Settings, name: str, scheme: str) -> None:
    """Tiles, accuracy, steps and tokens of a pair."""
    dtype, shape = (torch.float32, "toy") if settings.dry else (torch.bfloat16, name)
    lm, rm = (random_decoder(config_of(shape, head), settings.device, dtype, head, seed=None, scheme=scheme)
              for head in ("lm", "reward"))
    facts = settings.facts
    if not settings.dry:
        tuner = Tuner(record, settings, lm, rm)
        for kind in kinds(False, scheme):
            tuner.measure(kind)
        facts = facts | {key: value for key, value in record.content["facts"].items() if key.startswith(PREFIX)}
        del tuner
        _free(settings)
    table = whole(facts)
    with tuned.using(tuned.Table() if table is None else tuned.parse(table)):
        accuracy(record, settings, lm, scheme)
        bench = Bench(record, settings, name, pair=(lm, rm), scheme=scheme)
        steps(record, settings, bench, scheme)
        bench.tokens = min(bench.tokens, TOKENS)
        bench.aligned(0.3, aim=f"aligned-{scheme}", repeats=2)


def accuracy(record: Record, settings: Settings, decoder: Decoder, scheme: str) -> None:
    """The error of logits is no more than twice that of 16-bit weights; a token is another one only where two of them
    lie within that error."""
    shape = Shape(4 if settings.dry else 16, 1)
    one = Pass(decoder, Store(decoder, settings, shape.rows, 32 if settings.dry else 1024), shape)
    got, right = Replay(one, tuned._table(), settings.dry).outcome(), one.reference()
    wrong, theirs = error(got, right), settings.facts.get("chain errors", {}).get("16 rows")
    record.figure(f"8B {scheme}: error of logits beside dequantised weights in float32", wrong, "of them", theirs,
                  "that of bf16 weights")
    record.check(f"8B {scheme}: logits beside dequantised weights in float32", wrong <= 2 * (theirs or 0.01),
                 error=wrong, bf16=theirs)
    best, drawn = right.argmax(1, keepdim=True), got.argmax(1, keepdim=True)
    behind = (right.gather(1, best) - right.gather(1, drawn))[:, 0]
    within = 2 * (got - right).abs().amax(1)
    record.check(f"8B {scheme}: greedy tokens are those of float32, but for ties within the error",
                 bool((behind <= within).all()), other_tokens=int((best != drawn).sum()), of=shape.rows)
    record.figure(f"8B {scheme}: greedy tokens of float32", float((best == drawn).float().mean()), "of them",
                  rows=shape.rows)


def steps(record: Record, settings: Settings, bench: Bench, scheme: str, aimed: bool = True) -> None:
    """At 1 and 16 lanes, over 16 bits and over their own bytes."""
    before = settings.facts.get(BEFORE, {})
    for lanes in LANES[settings.dry]:
        times = bench.step_seconds(lanes)
        ms, size, bandwidth = 1e3 * statistics.median(times), bench.step_bytes(lanes), settings.bandwidth
        name = f"{bench.name}: step, {lanes} lane{'s' * (lanes > 1)} over {bench.context} shared keys"
        record.figure(name, ms, "ms", None if bandwidth is None else 1e3 * size / bandwidth,
                      "its bytes at read bandwidth", bytes=size, spread=[1e3 * min(times), 1e3 * max(times)])
        aim = f"step-{scheme}{'-16' * (lanes == 16)}" if aimed and lanes in (1, 16) else ""
        record.figure(f"{name}, steps a second", 1e3 / ms, "/s", 1e3 / before[str(lanes)] if str(lanes) in before else
                      None, "with bf16 weights", aim, higher_is_better=True)


def step_alone(record: Record, settings: Settings, name: str, scheme: str) -> None:
    """Without a search for tiles."""
    bench = Bench(record, settings, name, seed=None, scheme=scheme)
    steps(record, settings, bench, scheme, aimed=False)


def _free(settings: Settings) -> None:
    gc.collect()
    if not settings.dry:
        torch.cuda.empty_cache()
