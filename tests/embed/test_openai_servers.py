"""Servers that people run, each started here in a process of its own: what they tell, and texts that are made by them.

`make embed` brings the environments. What is missing is skipped, by its name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from serving_process import ServerProcess, free_port  # noqa: E402

from stars import STARS, RemoteReward, Sample, SamplingParams  # noqa: E402
from stars.adapters import openai, vllm_client  # noqa: E402
from stars.errors import ServerError  # noqa: E402
from stars.model.tokenizer import load_tokenizer  # noqa: E402
from tiny_models import TinyModel  # noqa: E402

pytestmark = pytest.mark.embed

SMALL = dict(tokenizer=True, chat_template=True, hidden=64, heads=2, kv_heads=1, head_dim=32, intermediate=64)
PROMPTS = ["The quick brown fox", "Once upon a time there was"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
               "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
IN_PROCESS = """
import sys, time
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx, params.n_parallel = sys.argv[1], int(sys.argv[2]), 1024, 4
params.kv_unified, params.cpuparams.n_threads = True, 1
server = xllamacpp.Server(params)
time.sleep(1e6)
"""


class Kind(NamedTuple):
    """A server, and what it is known to tell."""

    modules: tuple[str, ...]
    command: Callable[[Path, Path, int], list[str]]  # of a model's directory, the same as a GGUF file, and a port
    ready: str = "/v1/models"
    n: bool = True
    logprobs: int | None = 1
    extensions: bool = True
    takes_ids: bool = True
    ids: bool = True
    seeds: bool = True  # whether equal seeds draw equal tokens
    extra_body: dict[str, Any] = {}
    named: bool = False  # by its directory


def _vllm(model: Path, gguf: Path, port: int, *more: str) -> list[str]:
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port),
            "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "128", "--enforce-eager",
            "--served-model-name", "tiny", "--block-size", "32", "--max-num-seqs", "16", *more]


KINDS = {
    "vLLM": Kind(("vllm",), lambda model, gguf, port: _vllm(
        model, gguf, port, "--enable-prompt-tokens-details", "--scheduling-policy", "priority"), "/health", logprobs=0),
    "llama.cpp's": Kind(("xllamacpp",), lambda model, gguf, port: [
        sys.executable, "-c", IN_PROCESS, str(gguf), str(port)], ids=False),
    "llama-cpp-python's": Kind(("llama_cpp", "sse_starlette", "starlette_context", "pydantic_settings"),
                               lambda model, gguf, port: [
        sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), "--host", "127.0.0.1", "--port", str(port),
        "--n_ctx", "256", "--n_threads", "1", "--logits_all", "true"],
        n=False, takes_ids=False, ids=False),
    "transformers serve": Kind(("transformers", "accelerate", "fastapi", "uvicorn", "openai"),
                               lambda model, gguf, port: [
        sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--port", str(port), "--host",
        "127.0.0.1", "--device", "cpu", "--dtype", "float32"], "/health", n=False, logprobs=None, extensions=False,
        takes_ids=False, ids=False, seeds=False, named=True,
        extra_body={"generation_config": '{"do_sample": true, "top_k": 0}'}),
}


class Running(NamedTuple):
    kind: Kind
    url: str
    model: Path

    def proposer(self, policy: Any = None, reward: Any = None, **options: Any) -> Any:
        """The adapter to it."""
        if self.kind.ids:  # a character that a segment cuts in two needs one, and this model draws many bytes
            options = {"tokenizer": self.model} | options
        return openai(self.url, str(self.model) if self.kind.named else None, policy=policy or stars_policy(),
                      reward=reward or letters, parallel=not self.kind.n, extra_body=self.kind.extra_body, **options)


def stars_policy(**changes: Any) -> STARS:
    given = dict(segment_size=4, max_attempts=6, alpha=0.5, beta=1.0, reward_threshold=14.0, width=3)
    return STARS(**(given | changes))


def letters(prompt: Any, responses: list[str]) -> list[float]:
    """More for texts with many different letters."""
    return [float(len(set(text))) for text in responses]


@contextmanager
def started(kind: Kind, model: Path, gguf: Path, log: Path, *more: str) -> Iterator[str]:
    missing = [name for name in kind.modules if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed here: `make embed` makes environments that have it")
    port = free_port()
    with ServerProcess([*kind.command(model, gguf, port), *more], log, port=port, ready=kind.ready, seconds=400,
                       environment=ENVIRONMENT) as server:
        yield server.url


@pytest.fixture(scope="module")
def gguf(tiny_model, tmp_path_factory) -> Path:
    from gguf_files import write_gguf

    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_model(TinyModel(**SMALL)))


@pytest.fixture(scope="module", params=KINDS)
def server(request, tiny_model, tmp_path_factory) -> Iterator[Running]:
    kind = KINDS[request.param]
    if any(find_spec(name) is None for name in kind.modules):
        pytest.skip(f"{', '.join(kind.modules)} is not installed here: `make embed` makes environments that have it")
    with ExitStack() as stack:
        model = tiny_model(TinyModel(**SMALL))
        file = request.getfixturevalue("gguf") if "llama" in request.param else model
        log = tmp_path_factory.mktemp("server") / "log"
        yield Running(kind, stack.enter_context(started(kind, model, file, log)), model)


def test_what_it_tells(server):
    proposer = server.proposer()
    proposer.generate(PROMPTS[0], SamplingParams(max_tokens=4, seed=1))
    ways = proposer.server._ways
    kind = server.kind
    assert (ways.several, ways.logprobs, ways.extensions, ways.takes_ids, ways.tells_ids) == (
        kind.n, kind.logprobs, kind.extensions, kind.takes_ids, kind.ids)
    if not kind.n:
        with pytest.raises(ServerError, match="takes no n"):
            openai(server.url, str(server.model) if kind.named else None, policy=stars_policy(),
                   reward=letters).generate(PROMPTS[0])


def test_texts_are_made_and_decided(server):
    proposer = server.proposer()
    params = [SamplingParams(max_tokens=18, seed=seed, temperature=1.5) for seed in (1, 2)]
    outputs = proposer.generate(PROMPTS, params)
    for output in outputs:
        [completion] = output.outputs
        assert completion.error is None and completion.finish_reason in ("stop", "length")
        assert 1 <= len(completion.token_ids) <= 18 and len(completion.text) > 0
        assert completion.reward == letters("", [completion.text])[0]
        for segment in completion.segments:
            accepted = [one.accepted for one in segment.attempts]
            assert accepted[segment.winner] == segment.accepted
            if not segment.accepted:
                assert len(accepted) == 6 and not any(accepted)
                assert segment.reward == max(one.reward for one in segment.attempts)
    drawn = [[one.reward for one in segment.attempts if one.reward is not None]
             for output in outputs for segment in output.outputs[0].segments]
    assert any(len(set(rewards)) > 1 for rewards in drawn)  # candidates differ
    if server.kind.seeds:
        again = server.proposer().generate(PROMPTS, params)
        # Of first segments: what a server finds in its cache may change the last bits of what follows.
        first, second = ([[one.reward for one in output.outputs[0].segments[0].attempts] for output in run]
                         for run in (outputs, again))
        assert first == second


def test_greedy_segments_make_the_servers_own_text(server):
    """A text in segments is the text in one piece where all seams are token ids."""
    params = SamplingParams(max_tokens=12, temperature=0.0)
    whole, pieces = (server.proposer(Sample()).generate(PROMPTS[0], params)[0].outputs[0].text,
                     server.proposer(stars_policy(max_attempts=1, width=1)).generate(PROMPTS[0], params)[0].outputs[0])
    assert len(pieces.segments) == 3
    if server.kind.takes_ids and -1 not in pieces.token_ids:
        assert pieces.text == whole
    assert pieces.segments[0].token_ids and pieces.text[:2] == whole[:2]


def test_a_tokenizer_makes_prompts_of_ids_and_exact_texts(server):
    tokenizer = load_tokenizer(server.model)
    proposer = server.proposer(tokenizer=server.model)
    output = proposer.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=12, seed=5))
    assert output.outputs[0].error is None
    if server.kind.ids:
        assert output.outputs[0].text == tokenizer.decode(output.outputs[0].token_ids)
    assert output.prompt_token_ids == tokenizer.encode(tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}]), add_special_tokens=False)


# -- vLLM -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pooling(tiny_model, tmp_path_factory) -> Iterator[str]:
    """A reward model that vLLM serves."""
    rm = tiny_model(TinyModel(**(SMALL | dict(head="reward", seed=3))))
    with started(KINDS["vLLM"]._replace(command=lambda model, gguf, port: _vllm(
            model, gguf, port, "--runner", "pooling", "--convert", "classify", "--enable-prefix-caching")), rm, rm,
            tmp_path_factory.mktemp("pooling") / "log") as url:
        yield url


@pytest.mark.parametrize("server", ["vLLM"], indirect=True)
def test_both_models_served_by_vllm(server, pooling, tiny_model):
    """Prefixes are found in the cache, whoever scores."""
    from stars import CausalReward

    policy = stars_policy(segment_size=16, reward_threshold=2.0, alpha=1.0, width=4, max_attempts=8)
    params = [SamplingParams(max_tokens=32, seed=seed, ignore_eos=True) for seed in range(3)]
    prompt = [5 + place % 60 for place in range(40)]
    given = [{"prompt_token_ids": [*prompt, 7 + seed]} for seed in range(3)]
    options = dict(policy=policy, tokenizer=server.model, priority=True, max_model_len=128)
    rm = tiny_model(TinyModel(**(SMALL | dict(head="reward", seed=3))))
    found = []
    for reward in (RemoteReward(pooling, "tiny", template="raw"), CausalReward(rm, template="raw")):
        client = vllm_client(server.url, reward=reward, **options)
        outputs = client.generate(given, params)
        assert [one.outputs[0].error for one in outputs] == [None] * 3
        found.append(outputs)
    traffic = client.traffic
    rounds = traffic.requests - 1
    assert rounds >= 6 and traffic.cached_tokens > 0
    # Of each round's prompt what is left of a block of 32 tokens, and the last one; the first request is the probe.
    assert traffic.prompt_tokens - traffic.cached_tokens <= (rounds + 1) * 32 + 3 * len(prompt)
    for outputs in found:
        rewards = {one.reward for output in outputs for segment in output.outputs[0].segments
                   for one in segment.attempts if one.reward is not None}
        assert len(rewards) > 6


@pytest.mark.parametrize("server", ["vLLM"], indirect=True)
def test_a_vllm_without_prefix_caching_is_refused(server, tmp_path):
    prompt = [5 + place % 60 for place in range(100)]
    with started(server.kind, server.model, server.model, tmp_path / "log", "--no-enable-prefix-caching") as url:
        client = vllm_client(url, policy=stars_policy(segment_size=1, width=2), reward=letters, tokenizer=server.model)
        with pytest.raises(ServerError, match="found none of .* prompt tokens in its cache"):
            client.generate({"prompt_token_ids": prompt}, SamplingParams(max_tokens=24, ignore_eos=True))
