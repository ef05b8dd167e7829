"""The scheduler for vLLM, in vLLM's own process: its law, what it withholds, what it runs, what it gives back.

A model of five tokens with a second implementation in numpy (`toy.ToyModel`), written as a checkpoint. Tokens are
vLLM's own draws, the uniforms of the accept test are the controller's. False positives: as in law.py, each comparison
fails a correct scheduler once in 1e6 choices of its seed; seeds are fixed.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import law
import stars
import test_law
from embed import vllm_rewards
from law import FALSE_POSITIVE_RATE, MAX_TOKENS, PROMPT
from toy import EOS, ToyModel

pytestmark = pytest.mark.embed
# One thread: several of OpenMP wait for each other at every operation, which takes 20 times as long on a busy machine.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1",
               "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make embed installs its CPU build")

BLOCK = 32  # tokens, the fewest that vLLM's attention on a CPU takes
MODEL = ToyModel(vocab=5, seed=4, layers=1, hidden=64, head_dim=32)
DRAWS = 1024


def write(model: ToyModel, directory: Path) -> Path:
    """`model` as a checkpoint."""
    config = model.config
    (directory / "config.json").write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": config.vocab_size,
        "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "intermediate_size": 24, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 100.0,
        "eos_token_id": EOS, "torch_dtype": "float32", "tie_word_embeddings": False}))
    names = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    names |= {name: f"self_attn.{name}_proj" for name in "qkvo"}
    names |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    tensors = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.final_norm,
               "lm_head.weight": model.out}
    tensors |= {f"model.layers.0.{names[name]}.weight": weight for name, weight in model.layers[0].items()}
    save_file({name: torch.tensor(weight).float().contiguous() for name, weight in tensors.items()},
              directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """vLLM with the scheduler, and prompts beyond 128 tokens read in chunks beside others."""
    torch.set_num_threads(1)
    return vllm.LLM(
        str(write(MODEL, tmp_path_factory.mktemp("toy"))), skip_tokenizer_init=True, enforce_eager=True,
        dtype="float32", seed=0, block_size=BLOCK, max_num_seqs=64, max_num_batched_tokens=1024, max_model_len=256,
        long_prefill_token_threshold=128, scheduler_cls="stars.adapters.vllm_scheduler.StarsScheduler",
        additional_config={"stars_reward": "embed.vllm_rewards:by_ids"})


class Watch:
    """What the scheduler does, step by step."""

    def __init__(self, scheduler, monkeypatch):
        self.scheduler = scheduler
        self.rows: Counter = Counter()  # of the model, by request
        self.replayed = 0  # tokens that were drawn again by order
        schedule, update, replayed = scheduler.schedule, scheduler.update_from_output, scheduler._replayed

        def scheduling(*args):
            output = schedule(*args)
            self.rows.update(output.num_scheduled_tokens)
            return output

        def updating(*args):
            outputs = update(*args)
            self.check()
            return outputs

        def replaying(held):
            self.replayed += len(held.replay)
            replayed(held)

        monkeypatch.setattr(scheduler, "schedule", scheduling)
        monkeypatch.setattr(scheduler, "update_from_output", updating)
        monkeypatch.setattr(scheduler, "_replayed", replaying)

    @property
    def pool(self):
        return self.scheduler.kv_cache_manager.block_pool

    def blocks(self, request_id: str):
        return self.scheduler.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks.get(request_id, [])

    def cached(self) -> int:
        """Blocks that a prompt may find."""
        return sum(block.block_hash is not None for block in self.pool.blocks)

    def check(self) -> None:
        """No block of an aligned request may be found, or is shared, beyond what was committed."""
        for request_id, held in self.scheduler._held.items():
            for place, block in enumerate(self.blocks(request_id)):
                if (place + 1) * BLOCK > held.cacheable:
                    assert block.block_hash is None and block.ref_cnt == 1


@pytest.fixture
def watch(llm, monkeypatch):
    """Of a scheduler that holds and remembers nothing; and so it must be afterwards."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    llm.llm_engine.abort_request([name.rpartition("-")[0] for name in scheduler.requests])  # of a test that failed
    assert llm.reset_prefix_cache()
    vllm_rewards.seen.clear()
    watch = Watch(scheduler, monkeypatch)
    free = watch.pool.get_num_free_blocks()
    yield watch
    assert not scheduler._held and not scheduler._later and not scheduler.requests
    assert watch.pool.get_num_free_blocks() == free


def params(stars_args: dict | None, **options) -> vllm.SamplingParams:
    """Of a request that asks for the law, or for none."""
    return vllm.SamplingParams(**(dict(
        temperature=1.0, max_tokens=MAX_TOKENS, detokenize=False,
        extra_args=None if stars_args is None else {"stars": stars_args}) | options))


def generate(llm, prompt, *args, **options):
    """The one completion of one prompt."""
    [output] = llm.generate([{"prompt_token_ids": list(prompt)}], params(*args, **options), use_tqdm=False)
    return output


# -- the law ------------------------------------------------------------------------------------------------------


def drawn(llm, policy: stars.STARS, seeded: bool = False) -> dict:
    """How often each segment followed each prefix."""
    asked = {name: getattr(policy, name) for name in
             ("segment_size", "max_attempts", "alpha", "beta", "reward_threshold")}
    each = [params(asked | {"seed": seed}, seed=seed if seeded else None) for seed in range(DRAWS)]
    outputs = llm.generate([{"prompt_token_ids": PROMPT}] * DRAWS, each, use_tqdm=False)
    seen: dict = defaultdict(Counter)
    for output in outputs:
        ids = list(output.outputs[0].token_ids)
        for start in range(0, len(ids), policy.segment_size):
            seen[tuple(ids[:start])][tuple(ids[start : start + policy.segment_size])] += 1
        assert output.kv_transfer_params["stars"]["segments"] == math.ceil(len(ids) / policy.segment_size)
    return seen


def p_value(observed: dict, policy: stars.STARS) -> float:
    """Against the exact law of test_law.py, of this file's model."""
    case = test_law.Case(policy, stars.SamplingParams(max_tokens=MAX_TOKENS), vllm_rewards.TABLE)
    return law.p_value(observed, lambda prefix: test_law.segment_law(prefix, case, MODEL)[0])


LAWS = {
    "soft, capped": stars.STARS(2, 4, 0.2, 0.5, 3.5),
    "soft": stars.STARS(2, 50, 0.5, 0.5, 2.5),
    "hard": stars.STARS(3, 6, 0.5, 0.0, 2.5),
    "the best of three": stars.STARS(2, 3, 1.0, 0.5, math.inf),
}


@pytest.mark.parametrize("name", LAWS)
def test_segments_follow_the_law(llm, watch, name):
    """Accepted, rejected and redrawn, or, where the cap is met, the best one drawn again."""
    observed = drawn(llm, LAWS[name])
    assert p_value(observed, LAWS[name]) > FALSE_POSITIVE_RATE


def test_seeded_requests_follow_the_law_too(llm, watch):
    """Their generators live in the worker and go on over a rewind: each attempt draws anew."""
    policy = LAWS["soft, capped"]
    assert p_value(drawn(llm, policy, seeded=True), policy) > FALSE_POSITIVE_RATE


def rewards_of_others(scheduler, monkeypatch):
    """Each candidate of a step gets the reward of the next one."""
    score = scheduler._score

    def rotated(fresh):
        scored = score(fresh)
        return scored[1:] + scored[:1]

    monkeypatch.setattr(scheduler, "_score", rotated)


def a_token_is_left(scheduler, monkeypatch):
    """A retry goes on behind the first token of what was rejected."""
    rewind = scheduler._rewind

    def leaving(held):
        first = held.drafted[0]
        rewind(held)
        if held.drawn.max_tokens > 1 and first != EOS and held.drawn.attempt < held.terms.law.max_attempts:
            held.request.append_output_token_ids(first)
            held.request.num_computed_tokens += 1

    monkeypatch.setattr(scheduler, "_rewind", leaving)


def rewards_unread(scheduler, monkeypatch):
    """All attempts are judged alike."""
    decide = scheduler._decide
    monkeypatch.setattr(scheduler, "_decide", lambda held, reward, handle: decide(held, 2.0, handle))


@pytest.mark.parametrize("error", [rewards_of_others, a_token_is_left, rewards_unread])
def test_a_planted_error_is_seen(llm, watch, monkeypatch, error):
    """The test of the law has the power to see it."""
    policy = LAWS["soft, capped"]
    error(watch.scheduler, monkeypatch)
    assert p_value(drawn(llm, policy), policy) < FALSE_POSITIVE_RATE


# -- what is drawn, run, and remembered ---------------------------------------------------------------------------

LONG = dict(segment_size=40, reward_threshold=math.inf, max_attempts=3, seed=1)  # a segment fills a block
PROMPT_20 = [1 + place % 3 for place in range(20)]


def attempts(prompt) -> list[list[int]]:
    """The responses that were judged, in order, without r(x)."""
    return [response for asked, response in vllm_rewards.seen if asked == list(prompt) and response]


@pytest.mark.parametrize("seed", [None, 5])
def test_a_retry_draws_anew(llm, watch, seed):
    """With a seed of its own, too; and with that the same request gives the same text."""
    outputs = [generate(llm, PROMPT_20, LONG, max_tokens=40, ignore_eos=True, seed=seed) for _ in range(2)]
    drawn = attempts(PROMPT_20)
    assert len(drawn) == 6 and len({tuple(ids) for ids in drawn[:3]}) == 3
    assert (drawn[:3] == drawn[3:]) == (seed is not None)
    for output, three in zip(outputs, (drawn[:3], drawn[3:]), strict=True):
        assert list(output.outputs[0].token_ids) == max(three, key=vllm_rewards.TABLE)


@pytest.mark.parametrize("options", [dict(), dict(n=3), dict(temperature=0.0)])
def test_no_prefix_is_run_again(llm, watch, options):
    """Rows of the model: the prompt's, one a token that was drawn, and those of what was drawn again."""
    n = options.get("n", 1)
    [output] = llm.generate([{"prompt_token_ids": PROMPT_20}], params(
        LONG, max_tokens=100, ignore_eos=True, seed=3, **options), use_tqdm=False)
    drawn = 40 * 3 + 40 * 3 + 20 * 3 if "temperature" not in options else 100
    assert all(len(one.token_ids) == 100 for one in output.outputs)
    assert sum(watch.rows.values()) == n * (len(PROMPT_20) - 1 + drawn) + watch.replayed
    assert (watch.replayed > 0) == ("temperature" not in options)
    told = output.kv_transfer_params["stars"]
    assert told["tokens_drawn"] == drawn and told["segments"] == 3


def test_nothing_rejected_is_ever_found(llm, watch):
    """Neither in the output nor in the prefix cache, of which `Watch` looks at every step, too."""
    output = generate(llm, PROMPT_20, LONG, max_tokens=100, ignore_eos=True, seed=7)
    text = PROMPT_20 + list(output.outputs[0].token_ids)
    assert watch.cached() == (len(text) - 1) // BLOCK  # the last token was never run
    lost = [ids for ids in attempts(PROMPT_20)[:3] if ids != text[20:60]]
    assert len(lost) == 2
    for rejected in lost:
        common = next(place for place, (a, b) in enumerate(zip(PROMPT_20 + rejected, text)) if a != b)
        found = generate(llm, PROMPT_20 + rejected, None, max_tokens=1).num_cached_tokens
        assert found == common // BLOCK * BLOCK
    assert generate(llm, text, None, max_tokens=1).num_cached_tokens == (len(text) - 1) // BLOCK * BLOCK


def test_an_aligned_request_finds_the_prefix_of_others(llm, watch):
    """As ever; in chunks, where a prompt is longer than a step takes."""
    prompt = PROMPT_20 * 7
    first = generate(llm, prompt, LONG, max_tokens=10, ignore_eos=True)
    rows = sum(watch.rows.values())
    second = generate(llm, prompt, LONG, max_tokens=10, ignore_eos=True)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 128)
    assert rows - watch.replayed <= sum(watch.rows.values()) - 12 <= 2 * rows


def test_others_are_scheduled_as_ever(llm, watch):
    """Greedy requests beside aligned ones of other phases give what they give alone."""
    prompts = [[1 + (place * step) % 4 for place in range(9)] for step in range(1, 9)]
    plain = params(None, temperature=0.0, max_tokens=60, ignore_eos=True)
    alone = llm.generate([{"prompt_token_ids": ids} for ids in prompts], plain, use_tqdm=False)
    mixed, each = [], []
    for place, ids in enumerate(prompts):
        mixed += [{"prompt_token_ids": ids}, {"prompt_token_ids": ids}]
        each += [params(LONG | {"segment_size": 3 + place}, max_tokens=50, ignore_eos=True), plain]
    beside = llm.generate(mixed, each, use_tqdm=False)[1::2]
    assert [one.outputs[0].token_ids for one in beside] == [one.outputs[0].token_ids for one in alone]


def test_logprobs_are_those_of_the_tokens_that_are_told(llm, watch):
    """Of what was drawn again, those of when it was drawn first."""
    output = generate(llm, PROMPT_20, LONG | {"segment_size": 5}, max_tokens=20, ignore_eos=True, logprobs=1, seed=2)
    assert watch.replayed > 0
    ids, told = list(output.outputs[0].token_ids), output.outputs[0].logprobs
    assert len(told) == 20
    for place, (token, entry) in enumerate(zip(ids, told)):
        exact = torch.log_softmax(torch.tensor(MODEL.logits(PROMPT_20 + ids[:place])), 0)[token]
        assert abs(entry[token].logprob - exact.item()) < 1e-3


def test_a_context_that_ends_clips_the_segment(llm, watch):
    """max_model_len comes before the segment is full: what there is is judged, and told."""
    output = generate(llm, PROMPT_20 * 12, LONG | {"reward_threshold": -math.inf}, max_tokens=60, ignore_eos=True)
    assert len(output.outputs[0].token_ids) == 16 and output.outputs[0].finish_reason == "length"


# -- ends and interruptions ---------------------------------------------------------------------------------------


def stepped(llm, watch, request_id: str, drafted: int, **options):
    """The scheduler's own record of a request that has so many tokens withheld."""
    llm.llm_engine.add_request(request_id, {"prompt_token_ids": PROMPT_20}, params(**options))
    for _ in range(300):
        assert not llm.llm_engine.step()
        for name, held in watch.scheduler._held.items():
            if name.startswith(request_id) and len(held.drafted) == drafted:
                return held
    raise AssertionError("it never had so many")


def finished(llm) -> dict[str, list[int]]:
    """Runs what is left; the tokens of what ended."""
    ended = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                ended[output.request_id] = list(output.outputs[0].token_ids)
    return ended


LONG_ARGS = dict(stars_args=LONG, max_tokens=80, ignore_eos=True, seed=9)


def test_an_abort_gives_everything_back(llm, watch):
    """In the midst of a draft, of a replay, and while r(x) is not yet asked; `watch` counts the blocks."""
    free = watch.pool.get_num_free_blocks()
    stepped(llm, watch, "drafting", 13, **LONG_ARGS)
    assert watch.pool.get_num_free_blocks() < free
    llm.llm_engine.abort_request(["drafting"])
    assert watch.pool.get_num_free_blocks() == free and not watch.scheduler._held
    held = stepped(llm, watch, "replaying", 39, **LONG_ARGS)
    while held.replay is None:
        llm.llm_engine.step()
    llm.llm_engine.step()
    llm.llm_engine.abort_request(["replaying"])
    llm.llm_engine.add_request("new", {"prompt_token_ids": PROMPT_20}, params(**LONG_ARGS))
    llm.llm_engine.abort_request(["new"])
    assert not finished(llm)


def test_a_preemption_keeps_the_draft(llm, watch):
    """Its keys and values are lost and run again; attempts, rewards and verdicts are what they were without."""
    undisturbed = generate(llm, PROMPT_20, **LONG_ARGS).outputs[0].token_ids
    judged = attempts(PROMPT_20)
    vllm_rewards.seen.clear()
    held = stepped(llm, watch, "disturbed", 30, **LONG_ARGS)
    assert llm.llm_engine.engine_core.engine_core.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert held.request.num_computed_tokens == 0 and len(held.drafted) == 30
    assert finished(llm) == {"disturbed": list(undisturbed)}
    assert attempts(PROMPT_20) == judged


def test_a_draft_that_others_have_cached_is_not_shared(llm, watch):
    """A preempted draft would find its own text in another's blocks, and a rewind would write there."""
    held = stepped(llm, watch, "first", 30, **LONG_ARGS)
    text = list(held.request.all_token_ids)
    llm.llm_engine.add_request("other", {"prompt_token_ids": text}, params(None, max_tokens=1))
    while watch.cached() == 0:
        llm.llm_engine.step()
    scheduler = watch.scheduler
    scheduler.running.remove(held.request)
    scheduler._preempt_request(held.request, time.monotonic())
    rows, tokens = watch.rows[held.request.request_id], held.request.num_tokens
    llm.llm_engine.step()  # `Watch` looks whether its blocks are its own
    assert watch.rows[held.request.request_id] == rows + tokens
    finished(llm)


def test_a_few_blocks_are_enough_for_many(llm, watch):
    """Requests that do not fit together push each other out, and all end as they would alone."""
    pool = watch.pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 9)
    asked = [params(LONG, max_tokens=90, ignore_eos=True, seed=seed) for seed in range(4)]
    outputs = llm.generate([{"prompt_token_ids": PROMPT_20}] * 4, asked, use_tqdm=False)
    pool.free_blocks(taken)
    assert sum(watch.rows.values()) - watch.replayed > 4 * (19 + 270)  # some were pushed out
    for output, seed in zip(outputs, range(4), strict=True):
        alone = generate(llm, PROMPT_20, LONG, max_tokens=90, ignore_eos=True, seed=seed)
        assert output.outputs[0].token_ids == alone.outputs[0].token_ids


def test_room_of_the_reward_is_waited_for(llm, watch, monkeypatch):
    """What has no room is handed to vLLM once another has ended; what never will have any is refused."""
    scoring, opened = watch.scheduler._scoring, []
    open_session, close_session = scoring.open, scoring.close

    def opening(prompt, max_tokens):
        if len(opened) >= 2 or max_tokens == 7:
            return None
        opened.append(open_session(prompt, max_tokens))
        return opened[-1]

    def closing(session):
        opened.remove(session)
        close_session(session)

    monkeypatch.setattr(scoring, "open", opening)
    monkeypatch.setattr(scoring, "close", closing)
    outputs = llm.generate([{"prompt_token_ids": PROMPT_20}] * 6, [
        params(LONG, max_tokens=7 if place == 5 else 9, ignore_eos=True) for place in range(6)], use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [9] * 5 + [0]
    assert outputs[5].outputs[0].finish_reason == "error" and "too small" in outputs[5].outputs[0].stop_reason
    for name in ("a", "b", "c"):
        llm.llm_engine.add_request(name, {"prompt_token_ids": PROMPT_20}, params(LONG, max_tokens=9))
    assert len(watch.scheduler._later) == 1
    llm.llm_engine.abort_request(["c", "a", "b"])
    assert not opened


@pytest.mark.parametrize(("prompt", "stars_args", "options", "said"), [
    (PROMPT, {}, {}, "needs a reward_threshold"),
    (PROMPT, {"reward_threshold": 1.0, "segment_length": 3}, {}, "did you mean segment_size"),
    (PROMPT, {"reward_threshold": 1.0, "segment_size": 65}, {}, "raise stars_max_segment_size"),
    (PROMPT, {"reward_threshold": 1.0, "beta": "auto"}, {}, "beta"),
    (PROMPT, {"reward_threshold": 1.0, "beta": -1}, {}, "beta"),
    (PROMPT, "reward_threshold=1", {}, "as JSON text"),
    (PROMPT, {"reward_threshold": 1.0}, {"min_tokens": 2}, "min_tokens"),
    (PROMPT, {"reward_threshold": 1.0}, {"prompt_logprobs": 1}, "prompt_logprobs"),
    ([4, 0], {"reward_threshold": 1.0}, {}, "the reward function raised ValueError: no"),
    ([4, 0], {"reward_threshold": math.inf}, {}, "the reward function raised ValueError: no"),
    ([4, 1], {"reward_threshold": math.inf}, {}, "the reward is NaN"),
])
def test_what_cannot_be_had_ends_its_request_alone(llm, watch, prompt, stars_args, options, said):
    """With the finish reason "error", and the stop reason says why."""
    outputs = llm.generate([{"prompt_token_ids": prompt}, {"prompt_token_ids": PROMPT}],
                           [params(stars_args, **options), params(None, ignore_eos=True)], use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length"]
    assert said in outputs[0].outputs[0].stop_reason


# -- versions and settings ----------------------------------------------------------------------------------------


def test_a_version_that_was_not_tried_is_refused_by_name(monkeypatch):
    """Unless the environment says that it be tried."""
    from stars.adapters.vllm_hook import check_version

    monkeypatch.delenv("STARS_VLLM_ANY_VERSION", raising=False)
    check_version("0.32.0")
    check_version("0.32.0+cpu")
    with pytest.raises(stars.StarsError, match=r"was tried with vLLM 0\.32\.0 and this is 0\.33\.0.*ANY_VERSION=1"):
        check_version("0.33.0")
    monkeypatch.setenv("STARS_VLLM_ANY_VERSION", "1")
    check_version("0.33.0")


@pytest.mark.parametrize(("attribute", "value", "said"), [
    ("vllm_config.scheduler_config.async_scheduling", True, "--no-async-scheduling"),
    ("vllm_config.speculative_config", object(), "--speculative-config"),
    ("use_v2_model_runner", True, "VLLM_USE_V2_MODEL_RUNNER=0"),
    ("use_pp", True, "--pipeline-parallel-size 1"),
    ("connector", object(), "connectors"),
    ("return_sampling_mask", True, "sampling masks"),
    ("kv_cache_config.kv_cache_groups", [], "full attention"),
    ("num_sampled_tokens_per_step", 0, "serve a decoder"),
])
def test_a_setting_that_cannot_rewind_is_refused_by_name(llm, monkeypatch, attribute, value, said):
    """At the start, with what to change; as it is set here, nothing is."""
    from stars.adapters.vllm_hook import check_setting

    real = llm.llm_engine.engine_core.engine_core.scheduler
    check_setting(real)
    names = ("use_v2_model_runner", "use_pp", "connector", "ec_connector", "return_sampling_mask",
             "aux_output_connector", "is_encoder_decoder", "num_sampled_tokens_per_step")
    stub = SimpleNamespace(
        **{name: getattr(real, name) for name in names},
        vllm_config=SimpleNamespace(speculative_config=None, scheduler_config=SimpleNamespace(async_scheduling=False)),
        kv_cache_config=SimpleNamespace(kv_cache_groups=real.kv_cache_config.kv_cache_groups))
    check_setting(stub)
    *path, last = attribute.split(".")
    owner = stub
    for name in path:
        owner = getattr(owner, name)
    setattr(owner, last, value)
    with pytest.raises(stars.StarsError, match=said):
        check_setting(stub)


@pytest.mark.parametrize(("additional", "said"), [
    ({}, "has no reward"), ({"stars_reward": "no_such_module:reward"}, "cannot be imported"),
    ({"stars_reward": "x", "stars_chache_tokens": 1}, "did you mean cache_tokens"),
])
def test_a_reward_must_be_named(llm, monkeypatch, additional, said):
    """By the configuration or the environment."""
    from stars.adapters.vllm_hook import open_judge

    monkeypatch.delenv("STARS_VLLM_REWARD", raising=False)
    with pytest.raises(stars.StarsError, match=said):
        open_judge(SimpleNamespace(additional_config=additional))


# -- the shipped pair, behind vLLM's own server ---------------------------------------------------------------------

PAIR = Path(stars.__file__).parent / "demo_models"
STORY = "This film was"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """vLLM's server with processes of its own; its address. `vllm serve` asks for the metadata of a package vllm, which
    vllm-cpu is not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    tests = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": tests}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(PAIR / "lm"),
               "--port", str(port), "--served-model-name", "lm", "--enforce-eager", "--dtype", "float32",
               "--block-size", "32", "--max-num-seqs", "8",
               "--scheduler-cls", "stars.adapters.vllm_scheduler.StarsScheduler",
               "--additional-config", json.dumps({"stars_reward": str(PAIR / "rm")})]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(0.5)
        yield address
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def completion(address: str, stars_args: dict | None, **body) -> dict:
    """The answer of the completions endpoint; what of STARS is asked goes as JSON text, as its clients must."""
    if stars_args is not None:
        body["vllm_xargs"] = {"stars": json.dumps(stars_args)}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps({"model": "lm", "prompt": STORY, "max_tokens": 48} | body).encode(),
        {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        text = answer.read().decode()
    if body.get("stream"):
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        return {"pieces": [event["choices"][0]["text"] for event in events if event["choices"]]}
    return json.loads(text)


def test_a_reward_model_judges_behind_the_server(server):
    """Its rewards are those of the same tokens scored from scratch, and higher ones than of plain samples."""
    asked = dict(reward_threshold=math.inf, segment_size=12, max_attempts=4)
    plain, aligned = ([completion(server, law, seed=seed, return_token_ids=True) for seed in range(6)]
                      for law in (None, asked))
    engine = stars.Engine(PAIR / "lm", reward=PAIR / "rm")
    scores = engine.score(STORY, [answer["choices"][0]["token_ids"] for answer in plain + aligned])
    for answer, reward in zip(aligned, scores[6:], strict=True):
        told = answer["kv_transfer_params"]["stars"]
        assert told["attempts"] == 4 * told["segments"]
        assert abs(told["reward"] - reward) < 0.05
    assert sum(scores[6:]) > sum(scores[:6]) + 6 * 0.5


def test_segments_are_streamed_when_they_are_accepted(server):
    """A piece of text a segment, where other requests have one a token; a stop string ends both as ever."""
    asked = dict(reward_threshold=-math.inf, segment_size=12)
    pieces = completion(server, asked, stream=True, seed=1, ignore_eos=True)["pieces"]
    assert len([piece for piece in pieces if piece]) <= 5
    assert len(completion(server, None, stream=True, seed=1, ignore_eos=True)["pieces"]) >= 40
    whole = completion(server, asked, seed=1, ignore_eos=True)["choices"][0]["text"]
    assert "".join(pieces) == whole
    word = whole.split()[5]
    cut = completion(server, asked, seed=1, ignore_eos=True, stop=[word])["choices"][0]
    assert cut["finish_reason"] == "stop" and cut["text"] == whole[: whole.index(word)]


def test_the_server_outlives_what_it_refuses(server):
    """It answers with an error, and goes on."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        completion(server, {"reward_threshold": "high"})
    assert refused.value.code == 500  # vLLM's only answer to a request that ends with an error
    assert completion(server, None, max_tokens=3)["choices"][0]["text"]
