"""`stars demo`: the shipped pair or a chat model at work, plain sampling beside STARS, every attempt in sight."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stars.calibration import Calibration
from stars.cli.options import checked_quantile, shipped_pair
from stars.cli.terminal import Style, terminal_width, wants_color, wrapped
from stars.demo_chat import chat_model, chat_reward, held_out, said_of
from stars.line_file import check_writable
from stars.outputs import Metrics, RequestOutput
from stars.policies import STARS, Sample
from stars.sampling import SamplingParams
from stars.trace import request_trace, write_trace
from stars.trace.show import BAR_LEGEND, LEGEND, Scale, number, segment_lines

if TYPE_CHECKING:
    from stars.engine import Engine

OPENINGS = (
    "This film was",
    "I went to see this with my sister and",
    "The acting in this movie",
    "After twenty minutes I",
)
TEMPERATURE, TOP_K, SEGMENT_SIZE = 0.8, 40, 16
SAMPLES = 16  # plain samples of each prompt that the threshold is measured on


class Show(NamedTuple):
    """What is demonstrated."""

    title: str
    model: Path
    reward: Path
    words: str  # of both
    prompts: list[Any]  # as `Engine.generate` takes them
    names: list[str]  # of the prompts, as they are printed
    leads: list[str]  # what stands in front of each response
    max_tokens: int


class Run(NamedTuple):
    """One prompt, done both ways."""

    plain: RequestOutput
    plain_seconds: float
    aligned: RequestOutput
    aligned_seconds: float


def demo(args: argparse.Namespace) -> int:
    """Runs the command."""
    quantile = checked_quantile(args.quantile)
    show = _reviews(args.max_tokens) if args.chat is None else _chat(args.chat, args.max_tokens)
    params = SamplingParams(temperature=TEMPERATURE, top_k=TOP_K, max_tokens=show.max_tokens, seed=args.seed)
    if args.trace is not None:
        check_writable(args.trace)
    width = terminal_width()
    style = Style(not args.no_color and wants_color("auto", sys.stdout))
    from stars.engine import Engine

    begin = time.perf_counter()
    engine = Engine(show.model, show.reward)
    _say(style("title", show.title))
    _say(*wrapped(show.words, width))
    _say(f"loaded in {time.perf_counter() - begin:.1f} s")
    found = engine.calibrate(show.prompts, params, quantile, SAMPLES, segment_size=SEGMENT_SIZE)
    policy = STARS(segment_size=SEGMENT_SIZE, reward_threshold=found, beta="auto")
    each = "" if len(show.prompts) == 1 else f", {SAMPLES} for each of the {len(show.prompts)} openings below"
    _say("", *wrapped(
        f"reward threshold {number(found)}: the {quantile:g} quantile of the rewards of {found.samples} plain samples "
        f"(mean {number(found.mean)}){each}; beta {found.beta:.3f} "
        f"is a share of the spread of those of one {'opening' if each else 'prompt'}, {found.spread:.2f}", width))
    _say(*wrapped(f"segments of {SEGMENT_SIZE} tokens, {params.max_tokens} tokens in all, temperature {TEMPERATURE}, "
                  f"top_k {TOP_K}, seed {args.seed}, alpha {policy.alpha:g}, at most "
                  f"{policy.max_attempts} attempts a segment", width))
    _say(*(style("dim", line) for line in wrapped(LEGEND, width) + wrapped(BAR_LEGEND, width)))
    _warm_up(engine, show.prompts[0], params, policy)
    # One scale for all: from the worst plain sample to the best, which the threshold lies near.
    scale = Scale([*found.quantiles.values(), found])
    runs = [_both_ways(engine, prompt, name, lead, params, policy, scale, style, width)
            for prompt, name, lead in zip(show.prompts, show.names, show.leads, strict=True)]
    _summary(runs, found, style)
    if args.trace is not None:
        write_trace(args.trace, [run.aligned for run in runs], engine.tokenizer, params)
        _say("", *wrapped(f"trace written to {args.trace}: look at it with `stars trace show {args.trace}` or "
                          f"`stars trace html {args.trace}`", width))
    return 0


def _reviews(max_tokens: int | None) -> Show:
    """The shipped pair."""
    words = ("Both models are toys, trained on film reviews: a small language model that continues them and a "
             "small reward model that scores how well the reviewer liked the film. Texts make little sense; what "
             "counts is what the reward model lets through.")
    return Show("STARS on the shipped pair", *shipped_pair(), words, list(OPENINGS),
                [f'"{opening}"' for opening in OPENINGS], list(OPENINGS), 64 if max_tokens is None else max_tokens)


def _chat(message: str, max_tokens: int | None) -> Show:
    """A real chat model, and a reward over its own weights."""
    model, reward = chat_model(), chat_reward()
    words = ("The language model is SmolLM2-135M-Instruct, as 4-bit weights of a GGUF file. The reward is a LoRA "
             "adapter and a head over the same weights, trained on which of two replies people preferred (HH-RLHF). "
             + said_of(held_out(reward)))
    return Show("STARS on a chat model", model, reward, words, [{"messages": [{"role": "user", "content": message}]}],
                [f'"{message}"'], [""], 128 if max_tokens is None else max_tokens)


def _both_ways(engine: Engine, prompt: Any, name: str, lead: str, params: SamplingParams, policy: STARS, scale: Scale,
               style: Style, width: int) -> Run:
    """Plain sampling, then STARS segment by segment as it happens."""
    begin = time.perf_counter()
    plain = engine.generate(prompt, params, Sample(), use_tqdm=False)[0]
    plain_seconds = time.perf_counter() - begin
    plain.outputs[0].reward = _reward(engine, prompt, params)
    _say("", *(style("bold", line) for line in wrapped(name, width)))
    _say(f"  plain sampling, reward {number(plain.outputs[0].reward)}")
    _say(*wrapped(lead + (plain.outputs[0].text or ""), width, "      "))
    _say("  STARS, segment by segment")
    shown = 0
    seconds = 0.0
    begin = time.perf_counter()
    for output in engine.stream(prompt, params, policy):
        seconds += time.perf_counter() - begin  # printing is not decoding
        segments = request_trace(output, engine.tokenizer, params).completions[0].segments
        for segment in segments[shown:]:
            _say(*segment_lines(segment, scale, style, width))
        shown = len(segments)
        begin = time.perf_counter()
    completion = output.outputs[0]
    metrics = completion.metrics
    _say(style("bold", f"  = reward {number(completion.reward)} after {metrics.attempts_counted} attempts for "
                       f"{metrics.segments} segments"))
    return Run(plain, plain_seconds, output, seconds)


def _reward(engine: Engine, prompt: Any, params: SamplingParams) -> float | None:
    """The reward of the plain text: the same seed draws it again, so that scoring stays out of the time above."""
    return engine.generate(prompt, params, Sample(score=True), use_tqdm=False)[0].outputs[0].reward


def _warm_up(engine: Engine, prompt: Any, params: SamplingParams, policy: STARS) -> None:
    """Measures step times and records passes once, so that the figures below are those of a running engine."""
    short = dataclasses.replace(params, max_tokens=2 * SEGMENT_SIZE, ignore_eos=True, seed=0)
    engine.generate(prompt, short, Sample(), use_tqdm=False)
    engine.generate(prompt, short, policy, use_tqdm=False)


def _summary(runs: list[Run], found: Calibration, style: Style) -> None:
    plain, aligned = Metrics(), Metrics()
    for run in runs:
        plain.add(run.plain.metrics)
        aligned.add(run.aligned.metrics)
    plain_seconds, aligned_seconds = sum(run.plain_seconds for run in runs), sum(run.aligned_seconds for run in runs)
    plain_token, aligned_token = plain_seconds / plain.lm_tokens_kept, aligned_seconds / aligned.lm_tokens_kept
    rows = [
        ("", "plain", "STARS"),
        ("mean reward of the texts above", number(_mean_reward([run.plain for run in runs])),
         number(_mean_reward([run.aligned for run in runs]))),
        (f"mean reward of {found.samples} plain samples", number(found.mean), ""),
        ("attempts, up to the accepted one", "", f"{aligned.attempts_counted}"),
        ("accept rate", "", f"{aligned.accept_rate:.2f}"),
        ("segments kept by fallback", "", f"{aligned.fallbacks} of {aligned.segments}"),
        ("candidates drawn at once, at most", f"{plain.width}", f"{aligned.width}"),
        ("LM tokens drawn / kept", f"{plain.lm_tokens_drawn} / {plain.lm_tokens_kept}",
         f"{aligned.lm_tokens_drawn} / {aligned.lm_tokens_kept}"),
        ("RM tokens scored / from scratch", "", f"{aligned.rm_tokens_scored} / {aligned.rm_tokens_full_rescore}"),
        ("time in LM / RM", f"{plain.lm_seconds:.2f} / {plain.rm_seconds:.2f} s",
         f"{aligned.lm_seconds:.2f} / {aligned.rm_seconds:.2f} s"),
        ("kept tokens a second", f"{1 / plain_token:,.0f}", f"{1 / aligned_token:,.0f}"),
        ("time of a kept token", f"{1e3 * plain_token:.2f} ms", f"{1e3 * aligned_token:.2f} ms"),
    ]
    _say("", style("title", "Summary"))
    for name, left, right in rows:
        _say(f"  {name:<36}{left:>18}{right:>18}".rstrip())
    _say("", style("bold", f"Alignment made a token {aligned_token / plain_token:.2f} times as expensive as plain "
                           "sampling with the same engine."))


def _mean_reward(outputs: Sequence[RequestOutput]) -> float:
    return _mean([output.outputs[0].reward for output in outputs if output.outputs[0].reward is not None])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _say(*lines: str) -> None:
    """Prints at once: the demonstration is watched while it runs."""
    for line in lines:
        print(line)
    sys.stdout.flush()
