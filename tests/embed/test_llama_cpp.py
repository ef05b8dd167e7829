"""`stars.adapters.llama_cpp` against the engine and against the law, on tiny models in float32, with a real llama.cpp.

Needs llama-cpp-python: `make embed`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make embed")
pytest.importorskip("gguf", reason="the gguf package writes the files of these tests: pip install gguf==0.19.0")

import law  # noqa: E402
import stars  # noqa: E402
import test_law  # noqa: E402
from gguf_files import write_gguf  # noqa: E402
from llama_toys import write_lora, write_mamba, write_toy  # noqa: E402
from stars import (  # noqa: E402
    STARS,
    BlockwiseBestOfK,
    CausalReward,
    Engine,
    RequestError,
    SamplingParams,
    adapters,
)
from stars.adapters import llama_sequences  # noqa: E402
from stars.demo_chat import chat_model  # noqa: E402
from stars.errors import ModelError, RewardError, TokenizerError  # noqa: E402
from tiny_models import TinyModel  # noqa: E402
from toy import facts  # noqa: E402

pytestmark = [pytest.mark.embed, pytest.mark.usefixtures("one_torch_thread")]

ROOT = Path(__file__).resolve().parents[2]
LLAMA = Path(os.environ.get("LLAMA_DIR") or Path(llama_cpp.__file__).parents[1])  # of headers and libraries
PROMPTS = ["The quick brown", "Once upon a time there was a little girl", "Numbers"]
CHAT = {"messages": [{"role": "user", "content": "Who lived near the forest?"}]}


def loaded(path, n_ctx: int = 128, **options) -> llama_cpp.Llama:
    """The file in llama.cpp, with a cache in float32."""
    return llama_cpp.Llama(str(path), n_ctx=n_ctx, n_threads=1, n_threads_batch=1, n_batch=64, verbose=False, type_k=0,
                           type_v=0, **options)


def checksum(prompt, responses):
    """A reward that every text has, and that any letter changes: -1.5 to 1.5, with ties."""
    return [0.5 * (sum(map(ord, text)) % 7) - 1.5 for text in responses]


@pytest.fixture(scope="module")
def written(tiny_model, tmp_path_factory):
    """written(family=…, …): a tiny model as a GGUF file, and the Llama that has read it."""
    files: dict = {}

    def get(**options):
        tiny = TinyModel(**({"hidden": 64, "heads": 4, "kv_heads": 2, "intermediate": 96, "layers": 2,
                             "tokenizer": True, "chat_template": True} | options))
        if tiny not in files:
            path = tmp_path_factory.mktemp("gguf") / "model.gguf"
            files[tiny] = write_gguf(path, tiny_model(tiny)), loaded(path)
        return files[tiny]

    yield get
    for _, llama in files.values():
        llama.close()


POLICIES = {
    "soft": dict(segment_size=4, max_attempts=5, beta=0.3, reward_threshold=1.5, alpha=0.6),
    "hard": dict(segment_size=3, max_attempts=4, beta=0.0, reward_threshold=1.0, alpha=1.0),
}


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("name", POLICIES)
def test_the_engines_texts_attempts_and_decisions(written, name, width):
    path, llama = written()
    policy = STARS(**POLICIES[name], width=width)
    params = [SamplingParams(max_tokens=17, n=2, seed=seed, temperature=0.9, top_k=40) for seed in (1, 2, 3, 4)]
    prompts = [*PROMPTS, CHAT]
    wanted = Engine(path, checksum).generate(prompts, params, policy, use_tqdm=False)
    with adapters.llama_cpp(llama, checksum, policy) as engine:
        found = engine.generate(prompts, params)
        assert engine.stack.free_sequences == 64
    for mine, theirs in zip(found, wanted, strict=True):
        assert shown(mine) == shown(theirs)
        assert [one.text for one in mine.outputs] == [one.text for one in theirs.outputs]
        assert mine.prompt_token_ids == theirs.prompt_token_ids and mine.prompt_reward == theirs.prompt_reward
    assert sum(one.metrics.fallbacks for one in found) and sum(one.metrics.accepted for one in found)


def shown(output) -> list:
    """What two runs must agree on: all up to the attempt that was accepted, behind which a wider one draws more."""
    return [(token_ids, reason, reward, [
        (ids, own, threshold, accepted, attempts[: 1 + next(
            (place for place, one in enumerate(attempts) if one.accepted), len(attempts))])
        for ids, own, threshold, accepted, attempts in segments])
        for token_ids, reason, reward, segments in facts(output)]


@pytest.mark.parametrize("policy", [BlockwiseBestOfK(k=5, segment_size=4), None], ids=["best_of_k", "plain"])
def test_the_engines_texts_under_other_policies(written, policy):
    path, llama = written()
    params = [SamplingParams(max_tokens=19, seed=5, temperature=0.0), SamplingParams(max_tokens=9, seed=6, top_p=0.9),
              SamplingParams(max_tokens=24, seed=7, min_p=0.02, stop_token_ids=[40, 41, 42, 43, 44]),
              SamplingParams(max_tokens=21, seed=8, ignore_eos=True)]
    reward = None if policy is None else checksum
    wanted = Engine(path, reward).generate([*PROMPTS, CHAT], params, policy, use_tqdm=False)
    with adapters.llama_cpp(llama, reward, policy) as engine:
        found = engine.generate([*PROMPTS, CHAT], params)
    for mine, theirs in zip(found, wanted, strict=True):
        [one], [other] = mine.outputs, theirs.outputs
        assert (one.token_ids, one.text, one.finish_reason, one.stop_reason) == (
            other.token_ids, other.text, other.finish_reason, other.stop_reason)
        assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-3)
        if policy is not None:
            assert [(segment.token_ids, segment.reward, segment.winner) for segment in one.segments] == [
                (segment.token_ids, segment.reward, segment.winner) for segment in other.segments]


@pytest.mark.parametrize("tokenizer_seed", [0, 1], ids=["the model's vocabulary", "another one"])
def test_reward_models_decide_as_in_the_engine(written, tiny_model, tokenizer_seed):
    path, llama = written()
    reward = tiny_model(family="qwen2", head="reward", tokenizer=True, tokenizer_seed=tokenizer_seed)
    policy = STARS(segment_size=4, max_attempts=5, beta=0.2, reward_threshold=0.1, alpha=0.5, width=3)
    params = SamplingParams(max_tokens=15, seed=4, n=2)
    wanted = Engine(path, CausalReward(reward)).generate(PROMPTS, params, policy, use_tqdm=False)
    with adapters.llama_cpp(llama, CausalReward(reward), policy) as engine:
        found = engine.generate(PROMPTS, params)
    for mine, theirs in zip(found, wanted, strict=True):
        for one, other in zip(mine.outputs, theirs.outputs, strict=True):
            assert (one.text, one.token_ids) == (other.text, other.token_ids)
            assert [segment.accepted for segment in one.segments] == [segment.accepted for segment in other.segments]
            assert [segment.winner for segment in one.segments] == [segment.winner for segment in other.segments]
            assert one.reward == pytest.approx(other.reward, abs=1e-4)
            assert one.metrics.rm_tokens_scored < one.metrics.rm_tokens_full_rescore  # nothing is read twice


def test_windows_are_forgotten_and_found_again(written):
    """Of a model whose layers see three tokens, with attempts longer than that, cells of lanes are given away."""
    path, llama = written(family="gemma3_text", head_dim=24, window=3, layers=8, tied=True)
    policy = STARS(**POLICIES["soft"], width=3)
    params = [SamplingParams(max_tokens=40, n=3, seed=seed, temperature=2.5) for seed in (1, 2, 3, 4)]
    wanted = Engine(path, checksum).generate([*PROMPTS, CHAT], params, policy, use_tqdm=False)
    with adapters.llama_cpp(llama, checksum, policy, n_ctx=256, n_seq_max=10) as engine:
        found = engine.generate([*PROMPTS, CHAT], params)
        assert engine.stack.free_sequences == 10
    assert [shown(one) for one in found] == [shown(one) for one in wanted]


@pytest.mark.parametrize("first", [0, 3, 4])
def test_what_windows_have_lost_is_not_shared(written, monkeypatch, first):
    """A prompt of which another response still has too little is read again."""
    _, llama = written()
    with adapters.llama_cpp(llama) as engine:
        params = SamplingParams(max_tokens=40, seed=2, ignore_eos=True)
        begun = engine.stream({"prompt_token_ids": [1, 5, 6, 7, 8, 9]}, params)
        next(begun)
        monkeypatch.setattr(engine._context, "window", 3)
        monkeypatch.setattr(engine._context, "first", lambda sequence: first)
        read = engine.stack.prompt_tokens
        assert read == 6
        next(engine.stream({"prompt_token_ids": [1, 5, 6, 7, 8, 9]}, params))
        assert engine.stack.prompt_tokens - read == (0 if first <= 6 - 3 else 6)
        begun.close()


# -- what is run, and room ----------------------------------------------------------------------------------------


def test_nothing_that_is_held_is_run_again(written):
    """A prompt once for all its responses; of each segment the last token before it once for all lanes; of each attempt
    every token but its last."""
    _, llama = written()
    policy = STARS(**POLICIES["soft"], width=3)
    with adapters.llama_cpp(llama, checksum, policy) as engine:
        outputs = engine.generate([PROMPTS[1], PROMPTS[1] + " who", PROMPTS[0]],
                                  SamplingParams(max_tokens=17, n=2, seed=3))
        tokens = [one.prompt_token_ids for one in outputs]
        assert tokens[1][: len(tokens[0]) - 1] == tokens[0][:-1]
        shared = next(place for place, pair in enumerate(zip(tokens[0], tokens[1], strict=False)) if len(set(pair)) > 1
                      ) if tokens[1][: len(tokens[0])] != tokens[0] else len(tokens[0])
        bos = 1  # all that the third has in common with the first
        assert engine.stack.prompt_tokens == len(tokens[0]) + len(tokens[1]) - shared + len(tokens[2]) - bos
        segments = [segment for one in outputs for completion in one.outputs for segment in completion.segments]
        first = sum(len(one.outputs) for one in outputs)
        drafted = sum(len(attempt.token_ids) - 1 for segment in segments for attempt in segment.attempts)
        assert engine.stack.draft_tokens == drafted + len(segments) - first
        assert engine.forward_tokens == engine._context.rows


def test_prompts_are_read_in_passes_of_n_batch(written):
    path, llama = written()
    params, prompt = SamplingParams(max_tokens=8, seed=3), "The dog sleeps on and on. " * 4
    wanted = Engine(path).generate(prompt, params, use_tqdm=False)[0]
    assert len(wanted.prompt_token_ids) > 30
    with adapters.llama_cpp(llama, n_seq_max=4, n_batch=7) as engine:
        assert engine.generate(prompt, params)[0].outputs[0].text == wanted.outputs[0].text


@pytest.mark.parametrize("sizes", [dict(n_seq_max=3), dict(n_seq_max=11), dict(n_ctx=256), dict(n_seq_max=256)],
                         ids=str)
def test_room_changes_no_text(written, sizes):
    """Fewer lanes than the policy's width, responses that wait for sequences or for cells: only the time changes."""
    _, llama = written()
    policy = STARS(**POLICIES["soft"], width=8)
    params = SamplingParams(max_tokens=40, n=5, seed=2)
    with adapters.llama_cpp(llama, checksum, policy, n_ctx=2048) as engine:
        wanted = engine.generate(PROMPTS, params)
    with adapters.llama_cpp(llama, checksum, policy, **sizes) as engine:
        cells = engine.stack._free_cells
        found = engine.generate(PROMPTS, params)
        assert engine.stack._free_cells == cells and engine.stack.free_sequences == sizes.get("n_seq_max", 64)
        assert all(engine._context.used(one) == 0 for one in range(engine.stack.free_sequences))
    assert [shown(one) for one in found] == [shown(one) for one in wanted]


@pytest.mark.parametrize(("width", "layers", "supported", "lanes"), [
    (None, -1, False, 1), (None, -1, True, 4), (None, 0, True, 1), (3, 0, False, 3)])
def test_a_width_that_is_left_open_is_one_where_a_cpu_draws(written, monkeypatch, width, layers, supported, lanes):
    _, llama = written()
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: supported)
    monkeypatch.setattr(llama.model_params, "n_gpu_layers", layers)
    with adapters.llama_cpp(llama, checksum, STARS(**POLICIES["soft"], width=width)) as engine:
        assert max(one.metrics.width for one in engine.generate(PROMPTS, SamplingParams(max_tokens=8))) == lanes


def test_streams_grow_and_end_with_the_whole(written):
    _, llama = written()
    policy = STARS(**POLICIES["hard"], width=3)
    with adapters.llama_cpp(llama, checksum, policy) as engine:
        params = SamplingParams(max_tokens=17, seed=4)
        [whole] = engine.generate(PROMPTS[0], params)
        outputs = list(engine.stream(PROMPTS[0], params))
        assert shown(outputs[-1]) == shown(whole) and outputs[-1].finished and len(outputs) > 2
        texts = [one.outputs[0].text for one in outputs]
        assert all(later.startswith(text) for text, later in zip(texts, texts[1:], strict=False))
        begun = engine.stream(PROMPTS[0], params)
        next(begun)
        assert engine.stack.free_sequences < 64
        begun.close()
        assert engine.stack.free_sequences == 64 and not engine._proposals


# -- the law ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_llama(tmp_path_factory):
    llama = loaded(write_toy(tmp_path_factory.mktemp("toy") / "toy.gguf", law.MODEL))
    yield llama
    llama.close()


def drawn_by_llama(llama, drawn):
    reward = stars.FunctionReward(lambda prompt, responses: [drawn.reward(ids) for ids in responses], inputs="ids")
    given = drawn.params
    params = SamplingParams(max_tokens=given.max_tokens, n=given.n, seed=given.seed, temperature=given.temperature,
                            top_k=given.top_k, top_p=given.top_p, stop_token_ids=[0])
    with adapters.llama_cpp(llama, reward, drawn.policy, n_seq_max=256, n_ctx=2048) as engine:
        return engine.generate({"prompt_token_ids": law.PROMPT}, params)[0].outputs


@pytest.mark.parametrize("name", ["soft, width 1", "soft, a round beyond the cap", "hard, width 3",
                                  "segments of 3, filtered proposal"])
def test_committed_segments_follow_the_law(toy_llama, name):
    """As tests/test_law.py has it of the engine: 2048 responses, false positives once in 1e6 choices of the seed."""
    drawn = test_law.CASES[name]
    outputs = drawn_by_llama(toy_llama, drawn)
    assert len(outputs) == law.DRAWS
    assert test_law.follows_the_law(drawn, outputs), test_law.p_values(drawn, outputs)


def test_the_law_test_sees_noise_that_is_used_again(toy_llama, monkeypatch):
    """All attempts of a segment draw the same tokens."""
    drawing = llama_sequences.Drawing
    monkeypatch.setattr(llama_sequences, "Drawing", lambda asked, proposals: drawing(
        [one._replace(attempts=[attempt._replace(attempt=1) for attempt in one.attempts]) for one in asked],
        proposals))
    drawn = test_law.CASES["hard, width 3"]
    assert not test_law.follows_the_law(drawn, drawn_by_llama(toy_llama, drawn))


def test_the_toys_file_is_the_toy(toy_llama):
    with adapters.llama_cpp(toy_llama) as engine:
        from stars.adapters.llama_context import Row

        rows = [Row(token, place, [0], True) for place, token in enumerate(law.PROMPT)]
        logits = engine._context.decode(rows)[-1]
    assert logits.numpy() == pytest.approx(law.MODEL.logits(law.PROMPT), abs=1e-4)


# -- vocabularies of llama.cpp's own ------------------------------------------------------------------------------


def test_llama_cpps_vocabulary_stands_in(written, tiny_model, tmp_path):
    """Of a file that splits texts in a way that only llama.cpp knows, the texts go to any reward all the same."""
    directory = tiny_model(TinyModel(hidden=64, heads=4, kv_heads=2, intermediate=96, layers=2, tokenizer=True,
                                     chat_template=True))
    path = write_gguf(tmp_path / "model.gguf", directory, tokenizer__ggml__pre="deepseek-coder")
    llama, ours = loaded(path), stars.adapters.llama_cpp(written()[1]).tokenizer
    policy = STARS(segment_size=4, max_attempts=3, beta=0.2, reward_threshold=0.1, alpha=1.0, width=3)
    reward = CausalReward(tiny_model(family="qwen2", head="reward", tokenizer=True, tokenizer_seed=1), template="raw")
    texts = ["The dog sleeps on", "naïve façades, Größe and 東京 🙂", " two  spaces"]
    with adapters.llama_cpp(llama, reward, policy) as engine:
        tokenizer = engine.tokenizer
        assert type(tokenizer).__name__ == "VocabularyTokenizer"
        for text in texts:
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode("dog")[0] == tokenizer.bos_token_id == ours.bos_token_id
        assert tokenizer.encode("a</s>", add_special_tokens=False)[-1] == tokenizer.eos_token_id == 2
        assert tokenizer.decode([2]) == "" and tokenizer.decode([2], skip_special_tokens=False) == "</s>"
        assert (tokenizer.vocab_size, tokenizer.special_tokens) == (ours.vocab_size, ours.special_tokens)
        assert tokenizer.apply_chat_template(CHAT["messages"]) == ours.apply_chat_template(CHAT["messages"])
        outputs = engine.generate([*texts, CHAT], SamplingParams(max_tokens=10, seed=1))
        for output in outputs:
            [one] = output.outputs
            assert one.error is None and one.reward == pytest.approx(one.segments[-1].reward)
            assert one.text == stars.model.tokenizer.Detokenizer(ours, output.prompt_token_ids).decode(
                [token for token in one.token_ids if token != 2])
        with pytest.raises(RequestError, match="special_tokens"):
            engine.generate({"prompt": "a", "special_tokens": "text"})
    with adapters.llama_cpp(llama, tokenizer=directory) as engine:
        assert engine.tokenizer.same_vocabulary(ours)
    with pytest.raises(TokenizerError, match="another vocabulary than the model"):
        adapters.llama_cpp(llama, tokenizer=tiny_model(tokenizer=True, tokenizer_seed=1))
    llama.close()


# -- bad input, and errors ----------------------------------------------------------------------------------------


def test_what_it_cannot_do_is_refused_by_name(written, tmp_path):
    path, llama = written()
    policy = STARS(reward_threshold=0.0)
    for settings in ({"stop": "a"}, {"logprobs": 2}, {"presence_penalty": 1.0}, {"logit_bias": {3: 1.0}},
                     {"min_tokens": 2}, {"detokenize": False}):
        with adapters.llama_cpp(llama) as engine, pytest.raises(RequestError, match=next(iter(settings))):
            engine.generate("a", SamplingParams(**settings))
    with adapters.llama_cpp(llama) as engine, pytest.raises(RequestError, match="no RequestOutputKind.DELTA"):
        engine.generate("a", SamplingParams(output_kind="DELTA"))
    with adapters.llama_cpp(llama, n_ctx=256) as engine:
        with pytest.raises(RequestError, match="max_tokens=300 make 3.., the limit is"):
            engine.generate("The dog", SamplingParams(max_tokens=300))
        with pytest.raises(RequestError, match="outside the model's vocabulary"):
            engine.generate(["a", {"prompt_token_ids": [9999]}])
        engine.stream("a")  # which nobody asks for anything
        assert not engine._proposals
        with pytest.raises(RequestError, match="2 prompts and 1 sampling_params"):
            engine.generate(["a", "b"], [SamplingParams()])
        with pytest.raises(RequestError, match="must be a stars.SamplingParams"):
            engine.generate("a", {"max_tokens": 3})
        with pytest.raises(RequestError, match="stream takes one prompt"):
            engine.stream(["a", "b"])
    with pytest.raises(RequestError, match="the llama.cpp adapter cannot run CARDS"):
        adapters.llama_cpp(llama, checksum, stars.CARDS(reward_threshold=1.0))
    with pytest.raises(RequestError, match="policy is None"):
        adapters.llama_cpp(llama, checksum)
    with pytest.raises(RewardError, match="reward is None"):
        adapters.llama_cpp(llama, None, policy)
    with pytest.raises(RequestError, match="n_seq_max is 2, it must be an integer of at least 3"):
        adapters.llama_cpp(llama, checksum, policy, n_seq_max=2)
    with pytest.raises(RequestError, match="n_batch is 8"):
        adapters.llama_cpp(llama, checksum, policy, n_batch=8)
    with pytest.raises(RequestError, match="n_ctx is 3"):
        adapters.llama_cpp(llama, checksum, policy, n_ctx=3)
    with pytest.raises(ModelError, match="no GGUF file"):
        adapters.llama_cpp(tmp_path)
    with pytest.raises(ModelError, match="must be a llama_cpp.Llama"):
        adapters.llama_cpp(3)
    (tmp_path / "broken.gguf").write_bytes(path.read_bytes()[:4000])
    with pytest.raises(ModelError, match="llama.cpp cannot load"):
        adapters.llama_cpp(tmp_path / "broken.gguf")


@pytest.mark.parametrize("name", ["llama_memory_seq_cp", "kv_unified"])
def test_a_version_without_what_it_needs_is_refused_by_name(written, monkeypatch, name):
    _, llama = written()
    if name == "kv_unified":
        monkeypatch.setattr(llama_cpp, "llama_context_params", type("Older", (), {"_fields_": [("n_ctx", int)]}))
    else:
        monkeypatch.delattr(llama_cpp, name)
    with pytest.raises(ModelError, match=f"has no {name}, .* llama-cpp-python==0.3.36"):
        adapters.llama_cpp(llama)


def test_models_whose_state_cannot_be_cut_are_refused_by_name(tmp_path):
    llama = loaded(write_mamba(tmp_path / "mamba.gguf"))
    with pytest.raises(ModelError, match="this model is recurrent .*mamba.* cannot be cut"):
        adapters.llama_cpp(llama)
    llama.close()


def test_a_cache_that_cannot_be_cut_is_found_out(written, monkeypatch):
    _, llama = written()
    monkeypatch.setattr(llama_cpp, "llama_memory_seq_rm", lambda *given: False)
    with pytest.raises(ModelError, match="cannot be cut, so that no candidate can be rejected"):
        adapters.llama_cpp(llama)


def test_all_is_given_back_after_errors(written):
    _, llama = written()
    policy = STARS(**POLICIES["soft"], width=3)
    params = SamplingParams(max_tokens=12, seed=1, n=2)
    with adapters.llama_cpp(llama, checksum, policy) as engine:
        wanted = engine.generate(PROMPTS, params)
        decode, calls = engine._context.decode, []

        def failing(rows):
            calls.append(rows)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return decode(rows)

        for stop in (1, 2, 5, 9):
            calls.clear()
            engine._context.decode = failing
            with pytest.raises(KeyboardInterrupt):
                engine.generate(PROMPTS, params)
            engine._context.decode = decode
            assert engine.stack.free_sequences == 64 and not engine.stack._open and not engine._proposals
        assert [shown(one) for one in engine.generate(PROMPTS, params)] == [shown(one) for one in wanted]


def test_a_reward_that_fails_or_calls_back_ends_its_own_request(written):
    _, llama = written()

    def fails(prompt, responses):
        if "Once" in prompt:
            engine.generate("a")
        return checksum(prompt, responses)

    with adapters.llama_cpp(llama, fails, STARS(**POLICIES["hard"], width=3)) as engine:
        found = engine.generate(PROMPTS, SamplingParams(max_tokens=8, seed=1))
        assert [one.outputs[0].finish_reason == "error" for one in found] == [False, True, False]
        assert "may not call the engine" in found[1].outputs[0].error
        assert engine.stack.free_sequences == 64


def test_threads_take_turns(written):
    _, llama = written()
    params = SamplingParams(max_tokens=16, seed=1)
    with adapters.llama_cpp(llama, checksum, STARS(**POLICIES["soft"], width=3)) as engine:
        wanted = [engine.generate(prompt, params) for prompt in PROMPTS]
        found = [None] * 3

        def run(place):
            found[place] = engine.generate(PROMPTS[place], params)

        threads = [threading.Thread(target=run, args=(place,)) for place in range(3)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert [shown(one[0]) for one in found] == [shown(one[0]) for one in wanted]


def test_after_the_end_it_says_so(written):
    path, _ = written()
    engine = adapters.llama_cpp(path)
    begun = engine.stream("The", SamplingParams(max_tokens=40, seed=1, ignore_eos=True))
    next(begun)
    engine.close()
    engine.close()
    with pytest.raises(RequestError, match="this adapter was closed"):
        engine.generate("a")
    with pytest.raises(RequestError, match="this adapter was closed"):
        next(begun)
    llama = loaded(path)
    engine = adapters.llama_cpp(llama)
    llama.close()
    with pytest.raises(RequestError, match="the Llama was closed"):
        engine.generate("a")
    engine.close()


def test_a_lora_adapter_of_the_llama_is_on_ours_too(written, tmp_path):
    path, llama = written()
    adapted = loaded(path, lora_path=str(write_lora(tmp_path / "lora.gguf", 64)))
    params = SamplingParams(max_tokens=12, seed=1, temperature=0.0)
    with adapters.llama_cpp(adapted) as engine, adapters.llama_cpp(llama) as plain:
        found = engine.generate("The dog", params)[0].outputs[0].token_ids
        ids = plain.tokenizer.encode("The dog")
        assert found != plain.generate("The dog", params)[0].outputs[0].token_ids
    adapted.reset()
    greedy = []
    for token in adapted.generate(ids, temp=0.0, repeat_penalty=1.0):
        greedy.append(token)
        if len(greedy) == 12 or token == 2:
            break
    assert found == greedy
    adapted.close()



def test_an_adapter_over_the_same_file_is_its_reward():
    """The shipped one, whose base is the chat model: as of the engine, the weights are those of the file."""
    try:
        path = chat_model()
    except stars.StarsError as error:
        pytest.skip(str(error))
    judge, policy = str(Path(stars.__file__).parent / "demo_models" / "smollm2_reward"), stars.STARS(
        8, 3, beta=1.0, reward_threshold=0.0, width=1)
    with adapters.llama_cpp(path, judge, policy, n_ctx=512, n_seq_max=4) as engine:
        [one] = engine.generate(CHAT, SamplingParams(max_tokens=16, seed=1))[0].outputs
    [wanted] = Engine(path, judge, max_model_len=512).score([CHAT], [one.token_ids])
    assert one.reward == pytest.approx(wanted, abs=1e-3)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.skipif(not (LLAMA / "include" / "llama.h").is_file(), reason="no llama.h: LLAMA_DIR names its folder")
def test_a_cpp_program_links_both(written, tmp_path):
    """bindings/examples/llama_stars.cpp under ASan and UBSan: the same text at any width, one line where it fails."""
    libraries = next(LLAMA / name for name in ("lib", "llama_cpp/lib") if (LLAMA / name / "libllama.so").exists())
    ours, program = ROOT / "bindings" / "lib", tmp_path / "llama_stars"
    subprocess.run(["c++", "-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined",
                    "-fno-sanitize-recover=undefined", f"-I{ROOT / 'bindings'}", f"-isystem{LLAMA / 'include'}",
                    ROOT / "bindings" / "examples" / "llama_stars.cpp", "-o", program, f"-L{ours}", "-lstars",
                    f"-L{libraries}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{ours}",
                    f"-Wl,-rpath,{libraries}"], check=True)
    path, _ = written()

    def run(*given):
        done = subprocess.run([program, path, PROMPTS[1], *given], capture_output=True, text=True, errors="replace",
                              env={**os.environ, "ASAN_OPTIONS": "detect_leaks=1"})
        assert done.returncode == 0, done.stderr
        return done.stdout

    texts = [run(width, "5", "40").rpartition("\n40 tokens kept of ")[0] for width in ("1", "3", "8")]
    assert texts[0] and texts[0] == texts[1] == texts[2] != run("3", "6", "40").rpartition("\n40 tokens kept of ")[0]
    assert ", the best of all that were rejected" in texts[0]  # by all widths: one attempt was held
    for given in (["/nowhere.gguf"], [path, "a", "0"]):
        done = subprocess.run([program, *given], capture_output=True, text=True, errors="replace")
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr


def test_the_examples_of_the_page_run(written, tiny_model, tmp_path, monkeypatch, capsys):
    """In order and in one namespace, as a reader would type them."""
    path, _ = written()
    page = (ROOT / "docs" / "llama_cpp.md").read_text(encoding="utf8")
    (tmp_path / "model.gguf").symlink_to(path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "rm").symlink_to(tiny_model(head="reward", tokenizer=True, chat_template=True))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    examples = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    for text in examples:
        exec(text, names)  # noqa: S102
    assert capsys.readouterr().out.count("\n") >= 5
