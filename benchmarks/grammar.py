"""What a grammar costs: responses that must fit a JSON schema beside free ones, tokens drawn a second.

    python benchmarks/grammar.py --model DIR_OR_GGUF [--repeats 5] [--tokens 96] [--out FILE]

One lane, and eight lanes of one response (the best of eight segments of 16 tokens by a reward that costs nothing).
Constrained drafts are drawn step by step, and free ones are not, so the ratio holds that, too. Masks are filled in a
thread while the model runs: counted are the seconds of filling, how long the host waited for them after the forward
pass, and the seconds in which matchers took what was drawn. Runs alternate in one process. Beside that, how long the
first request with a grammar takes until it is compiled, one with another schema, and one with a known schema.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    Figure,
    describe_machine,
    interleave,
    load_prompts,
    print_table,
    set_threads,
    speedup,
    write_json,
)

import stars
from stars.edit_buffers import EditBuffers
from stars.grammar import Grammars, Matcher
from stars.structured import StructuredOutputsParams

SEGMENT, WIDTH = 16, 8
SCHEMA: dict[str, Any] = {
    "type": "array", "minItems": 40, "items": {
        "type": "object", "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 40}, "age": {"type": "integer", "minimum": 0},
            "kind": {"enum": ["cat", "dog", "parrot", "other"]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 4},
            "home": {"type": "object", "properties": {"street": {"type": "string", "maxLength": 40},
                                                      "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
                     "required": ["street", "zip"], "additionalProperties": False}},
        "required": ["name", "age", "kind", "tags", "home"], "additionalProperties": False}}
POLICIES = {1: stars.Sample(), WIDTH: stars.BlockwiseBestOfK(WIDTH, SEGMENT)}


def timed(owner: type, name: str, seconds: dict[str, float], calls: dict[str, int]) -> None:
    """Has a method count its calls and their time."""
    method = getattr(owner, name)

    def counting(*args: Any) -> Any:
        begin = time.perf_counter()
        try:
            return method(*args)
        finally:
            seconds[name] += time.perf_counter() - begin
            calls[name] += 1

    setattr(owner, name, counting)


def compile_seconds(engine: stars.Engine) -> dict[str, float]:
    """Until a grammar is compiled: the first of an engine, another one, and a known one."""
    config = engine.model_config
    grammars = Grammars(engine.tokenizer, config.vocab_size, config.eos_token_ids)
    found = {}
    for name, schema in (("first", SCHEMA), ("another", SCHEMA["items"]), ("known", SCHEMA)):
        begin = time.perf_counter()
        grammars.of(StructuredOutputsParams(json=schema))
        found[name] = time.perf_counter() - begin
    return found


def main() -> None:
    """Runs the comparison and writes its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "grammar.json")
    options = parser.parse_args()
    set_threads(options.threads)
    engine = stars.Engine(options.model, lambda prompt, responses: [0.0] * len(responses), max_num_seqs=8,
                          max_num_lanes=WIDTH, cache_tokens=8192)
    compiled = compile_seconds(engine)
    prompts = load_prompts(None, 8)
    seconds, calls = defaultdict[str, float](float), defaultdict[str, int](int)
    for owner, name in ((Matcher, "fill"), (Matcher, "accept"), (EditBuffers, "send_masks")):
        timed(owner, name, seconds, calls)
    drawn: dict[str, list[int]] = defaultdict(list)

    def run(width: int, constrained: bool) -> Callable[[int], None]:
        def once(index: int) -> None:
            params = stars.SamplingParams(
                max_tokens=options.tokens, seed=index, logit_bias={token: -100.0 for token in
                                                                   engine.model_config.eos_token_ids},
                structured_outputs={"json": SCHEMA} if constrained else None)
            [output] = engine.generate(prompts[index % len(prompts)], params, POLICIES[width], use_tqdm=False)
            if output.outputs[0].error is not None:
                raise RuntimeError(output.outputs[0].error)
            drawn[f"{width}{constrained}"].append(output.metrics.lm_tokens_drawn)

        return once

    figures: list[Figure] = []
    for width in POLICIES:
        seconds.clear()
        calls.clear()
        times = interleave({"constrained": run(width, True), "free": run(width, False)}, options.repeats)
        ours, theirs = (drawn[f"{width}{constrained}"][-options.repeats :] for constrained in (True, False))
        total = sum(times["constrained"]) * (options.repeats + 1) / options.repeats  # with the warm-up
        figures.append(speedup(
            f"{width} lane{'s' if width > 1 else ''}, a JSON schema: tokens drawn a second", ours, times["constrained"],
            "the same without a grammar", times["free"], their_tokens=theirs,
            tokens_a_second=statistics.median(count / spent for count, spent in zip(ours, times["constrained"],
                                                                                    strict=True)),
            mask_us=1e6 * seconds["fill"] / calls["fill"], accept_us=1e6 * seconds["accept"] / calls["accept"],
            wait_us_a_step=1e6 * seconds["send_masks"] / calls["send_masks"],
            step_us=1e6 * total / calls["send_masks"], masks=calls["fill"]))
    settings = {"model": Path(options.model).name, "tokens": options.tokens, "repeats": options.repeats,
                "threads": options.threads, "schema_characters": len(str(SCHEMA)), "compile_seconds": compiled,
                "vocabulary": engine.model_config.vocab_size}
    print(settings)
    print_table(figures)
    for figure in figures:
        print(figure.name, figure.detail)
    write_json(options.out, describe_machine(), settings, figures)


if __name__ == "__main__":
    main()
