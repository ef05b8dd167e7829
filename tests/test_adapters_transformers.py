"""The adapter to transformers: the engine's texts, attempts, rewards and decisions, drawn by generate.

The law test compares two p-values with law.FALSE_POSITIVE_RATE / 2: it fails a correct adapter once in 1e6 choices of
its seed.
"""

from __future__ import annotations

import math
import shutil
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

import law
import stars
import stars.adapters
from stars import CARDS, STARS, BlockwiseBestOfK, Engine, RequestError, RewardError, Sample, SamplingParams
from stars.adapters import hf_generate, hf_stack
from stars.reward import FunctionReward, causal
from test_law import case, segment_law
from tiny_models import MAX_POSITIONS
from toy import EOS

pytestmark = pytest.mark.usefixtures("one_torch_thread")
TEXTS = ["The quick brown fox", "Once upon a time there was a little girl", "A", "Numbers such as 3"]
NEW = 17  # four segments of 4 and one of 1
SAMPLING = dict(do_sample=True, temperature=0.9, top_k=50)
POLICY = STARS(segment_size=4, max_attempts=7, beta=0.4, reward_threshold=1.0, alpha=0.5)


def summed(prompt, responses):
    """A reward that any text has: a sum over tokens and places, with ties."""
    return [round(0.3 * sum((token * 7 + place) % 5 - 2 for place, token in enumerate(ids)), 3) for ids in responses]


def reward():
    return FunctionReward(summed, inputs="ids")


class Tiny:
    """A tiny model as transformers loads it, and the engine's."""

    def __init__(self, directory: Path, dtype: str = "float32"):
        self.directory, self.dtype = directory, dtype
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), attn_implementation="eager").eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory, padding_side="left")

    def inputs(self, texts=TEXTS):
        return self.tokenizer(list(texts), return_tensors="pt", padding=True)

    def generate(self, texts=TEXTS, *, policy=POLICY, reward=None, tokenizer=True, new=NEW, adapter=None, **options):
        """What generate makes of the texts with return_dict_in_generate=True."""
        adapter = adapter or stars.adapters.transformers(
            policy=policy, reward=reward, tokenizer=self.tokenizer if tokenizer else None)
        options = {"return_dict_in_generate": True, "max_new_tokens": new, **options}
        return self.model.generate(**self.inputs(texts), custom_generate=adapter, **options)

    def engine_says(self, texts=TEXTS, *, policy=POLICY, reward=None, new=NEW, **params):
        """The engine's responses to the same token ids."""
        engine = Engine(str(self.directory), reward, dtype=self.dtype)
        prompts = [{"prompt_token_ids": self.tokenizer(text)["input_ids"]} for text in texts]
        outputs = engine.generate(prompts, SamplingParams(max_tokens=new, **params), policy=policy, use_tqdm=False)
        return [completion for output in outputs for completion in output.outputs]


@pytest.fixture(scope="module")
def tiny(tiny_model):
    made = {}

    def get(dtype="float32", **options) -> Tiny:
        key = (dtype, *sorted(options.items()))
        if key not in made:
            made[key] = Tiny(tiny_model(tokenizer=True, **options), dtype)
        return made[key]

    return get


@pytest.fixture
def llama(tiny):
    return tiny(family="llama")


def facts(completion):
    """All that is decided of a response; rewards of attempts behind a winner are not, and logits differ by rounding."""
    return (completion.token_ids, completion.text, completion.finish_reason, completion.stop_reason, completion.reward,
            [(segment.token_ids, segment.reward, segment.threshold, segment.accepted, segment.winner)
             for segment in completion.segments])


def assert_same(found, wanted):
    assert [facts(one) for one in found] == [facts(one) for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert math.isclose(one.cumulative_logprob, other.cumulative_logprob, rel_tol=0, abs_tol=1e-3)
        for name in ("accepted", "fallbacks", "attempts_counted", "lm_tokens_kept"):
            assert getattr(one.metrics, name) == getattr(other.metrics, name)
        for mine, theirs in zip(one.segments, other.segments, strict=True):
            for drawn, known in zip(mine.attempts, theirs.attempts, strict=False):  # widths draw more or fewer beyond
                assert drawn.token_ids == known.token_ids
                if drawn.reward is not None and known.reward is not None:
                    assert (drawn.reward, drawn.accepted) == (known.reward, known.accepted)


# -- the engine's texts ------------------------------------------------------------------------------------------------

FAMILIES = [dict(family="llama"), dict(family="qwen2", window=8), dict(family="qwen3"), dict(family="gemma2", window=8),
            dict(family="gemma3_text", window=8), dict(family="phi3"), dict(family="mistral", window=8)]


@pytest.mark.parametrize("options", FAMILIES, ids=lambda options: options["family"])
def test_families_make_the_engines_texts_at_any_width(tiny, options):
    """Windows are shorter than prompts and responses: what ours keeps beyond them, the mask hides."""
    one = tiny(**options)
    wanted = one.engine_says(reward=reward(), seed=11, n=2, temperature=0.9, top_k=50)
    assert any(not segment.accepted for output in wanted for segment in output.segments) or options["family"] not in (
        "gemma3_text", "qwen3"), "no held attempt wins"
    for width in (1, 3, 8):
        policy = STARS(segment_size=4, max_attempts=7, beta=0.4, reward_threshold=1.0, alpha=0.5, width=width)
        rows = Counter()

        def count(model, args, kwargs, rows=rows):
            rows["ran"] += kwargs["input_ids"].numel()

        hook = one.model.register_forward_pre_hook(count, with_kwargs=True)
        found = one.generate(policy=policy, reward=reward(), seed=11, num_return_sequences=2, **SAMPLING)
        hook.remove()
        assert_same(found.stars, wanted)
        prompt, drafts = found.forward_tokens
        assert rows["ran"] == prompt + drafts
        assert prompt == one.inputs()["input_ids"].numel()  # each once, for both of its responses
        for row, output in enumerate(found.stars):
            assert found.sequences[row, prompt // 4 :].tolist()[: len(output.token_ids)] == output.token_ids


def test_tokens_are_run_once(tiny):
    """Of one response: after the prompt, whose logits are there, a segment's first round runs its tokens but the last,
    each later round the same, and each accepted segment's last token is run with the next one."""
    one, size = tiny(family="llama"), 4
    for width in (1, 3):
        policy = STARS(segment_size=size, max_attempts=6, beta=0.3, reward_threshold=1.0, alpha=1.0, width=width)
        found = one.generate(TEXTS[:1], policy=policy, reward=reward(), seed=5, new=16, eos_token_id=None, **SAMPLING)
        [output] = found.stars
        wanted = 0
        for place, segment in enumerate(output.segments):
            rounds = -(-len(segment.attempts) // width)
            assert rounds * width == len(segment.attempts)  # 6 attempts are whole rounds of 1 and of 3
            wanted += len(segment.attempts) * (size - 1) + (width if place else 0)
        assert output.metrics.attempts > len(output.segments)
        assert found.forward_tokens.drafts == wanted


@pytest.mark.parametrize("edits", [{}, {"repetition_penalty": 1.4}], ids=["plain", "edited"])
def test_no_response_runs_a_committed_token_twice_whatever_its_company_does(llama, monkeypatch, edits):
    """In a round of those that retry and those that have committed, the first draw a pass earlier."""
    ran, first, mixed = Counter(), [], []
    draft, forward = hf_stack.HFStack.draft, hf_stack.HFStack._forward

    def noted_forward(self, lanes, token_ids, mask, positions):
        first.append(positions[:, 0].tolist())
        return forward(self, lanes, token_ids, mask, positions)

    def noted(self, asked):
        first.clear()
        drafted = draft(self, asked)
        if not first:  # one token each, from logits that were there
            return drafted
        place, kinds = 0, set()
        for one, attempts in asked:
            last = self._inputs.after[one.sequence.row] + len(one.token_ids) - 1  # position of its last token
            again = first[0][place] == last
            assert first[0][place : place + len(attempts)] == [last if again else last + 1] * len(attempts)
            ran[one, last] += again
            kinds.add(again)
            place += len(attempts)
        mixed.append(len(kinds) > 1)
        return drafted

    monkeypatch.setattr(hf_stack.HFStack, "draft", noted)
    monkeypatch.setattr(hf_stack.HFStack, "_forward", noted_forward)
    policy = STARS(segment_size=4, max_attempts=7, beta=0.4, reward_threshold=1.0, alpha=0.5, width=2)
    wanted = llama.engine_says(reward=reward(), seed=9, n=2, temperature=0.9, top_k=50, **edits)
    found = llama.generate(policy=policy, reward=reward(), seed=9, num_return_sequences=2, **SAMPLING, **edits)
    assert_same(found.stars, wanted)
    assert any(mixed) and max(ran.values()) == 1


@pytest.mark.parametrize("policy", [
    STARS(segment_size=5, max_attempts=3, beta=0.0, reward_threshold=0.5, alpha=1.0),
    STARS(segment_size=4, max_attempts=5, beta=0.2, reward_threshold=9.0, alpha=1.0, width=2),  # most fall back
    BlockwiseBestOfK(k=4, segment_size=3), Sample()], ids=["hard", "held", "best_of_k", "sample"])
def test_policies_make_the_engines_texts(llama, policy):
    scores = None if isinstance(policy, Sample) else reward()
    wanted = llama.engine_says(policy=policy, reward=scores and reward(), seed=3, temperature=0.9, top_p=0.9)
    found = llama.generate(policy=policy, reward=scores, seed=3, do_sample=True, temperature=0.9, top_k=0, top_p=0.9)
    if policy == Sample():  # the engine draws such a response in one segment
        assert [one.token_ids for one in found.stars] == [one.token_ids for one in wanted]
    else:
        assert_same(found.stars, wanted)


def test_greedy_is_generates_own(llama):
    inputs = llama.inputs()
    wanted = llama.model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
    found = llama.generate(policy=Sample(), do_sample=False, return_dict_in_generate=False)
    assert torch.equal(found, wanted)
    aligned = llama.generate(reward=reward(), do_sample=False, seed=1)
    assert torch.equal(aligned.sequences, wanted)
    assert_same(aligned.stars, llama.engine_says(reward=reward(), temperature=0.0, seed=1))
    assert all(len(segment.attempts) == 1 for one in aligned.stars for segment in one.segments)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_models_draw_from_float32(tiny, dtype, monkeypatch):
    seen = set()
    draw = hf_generate.HFStack._forward

    def noted(self, *arguments):
        logits = draw(self, *arguments)
        seen.add(logits.dtype)
        return logits

    monkeypatch.setattr(hf_generate.HFStack, "_forward", noted)
    found = tiny(dtype, family="llama").generate(reward=reward(), seed=2, **SAMPLING)
    assert seen == {torch.float32}
    assert all(one.finish_reason in ("stop", "length") and one.metrics.lm_tokens_kept for one in found.stars)


def test_rewards_that_read_text_and_rewards_of_another_vocabulary(tiny, tiny_model):
    one = tiny(family="llama")

    def by_text(prompt, responses):
        return [len(prompt) / 100 + sum(map(ord, text)) % 7 / 3 for text in responses]

    for make in (lambda: by_text, lambda: str(tiny_model(tokenizer=True, head="reward")),
                 lambda: str(tiny_model(tokenizer=True, head="reward", tokenizer_seed=3))):
        policy = STARS(segment_size=4, max_attempts=4, beta=0.5, reward_threshold=1.0, alpha=0.5)
        found = one.generate(policy=policy, reward=make(), seed=4, **SAMPLING)
        wanted = one.engine_says(policy=policy, reward=make(), seed=4, temperature=0.9, top_k=50)
        assert [facts(a)[:2] for a in found.stars] == [facts(b)[:2] for b in wanted]
        assert [a.reward for a in found.stars] == pytest.approx([b.reward for b in wanted], abs=1e-4)


def test_conversations_reach_rewards_that_render_them(tiny_model):
    one = Tiny(tiny_model(tokenizer=True, chat_template=True))
    talks = [[{"role": "user", "content": "Hello"}], [{"role": "user", "content": "Tell me about the dog, please."}]]
    texts = [one.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) for talk in talks]
    judge = str(tiny_model(tokenizer=True, chat_template=True, head="reward", tokenizer_seed=3))
    policy = STARS(segment_size=4, max_attempts=4, beta=0.5, reward_threshold=1.0, alpha=0.5)
    inputs = one.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    adapter = stars.adapters.transformers(policy=policy, reward=judge, tokenizer=one.tokenizer)
    found = one.model.generate(**inputs, custom_generate=adapter, max_new_tokens=9, return_dict_in_generate=True,
                               seed=8, messages=talks, **SAMPLING)
    engine = Engine(str(one.directory), judge, dtype="float32")
    wanted = [engine.generate({"messages": talk}, SamplingParams(max_tokens=9, seed=8, temperature=0.9, top_k=50),
                              policy=policy, use_tqdm=False)[0].outputs[0] for talk in talks]
    assert [a.token_ids for a in found.stars] == [b.token_ids for b in wanted]
    assert [a.reward for a in found.stars] == pytest.approx([b.reward for b in wanted], abs=1e-4)
    with pytest.raises(RequestError, match="one conversation for each of the 2 prompts"):
        one.model.generate(**inputs, custom_generate=adapter, max_new_tokens=9, messages=talks[0])


# -- the law -----------------------------------------------------------------------------------------------------------


def as_llama(toy):
    """A toy model of tests/toy.py in transformers."""
    shape = toy.config
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=len(toy.final_norm), intermediate_size=len(toy.layers[0]["gate"]),
        num_hidden_layers=len(toy.layers), num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim, rms_norm_eps=1e-6, max_position_embeddings=256, bos_token_id=None, pad_token_id=None,
        eos_token_id=EOS, rope_parameters={"rope_type": "default", "rope_theta": 100.0}, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config).eval()
    names = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "q": "self_attn.q_proj",
             "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj",
             "up": "mlp.up_proj", "down": "mlp.down_proj"}
    weights = {"model.embed_tokens": toy.embedding, "model.norm": toy.final_norm, "lm_head": toy.out}
    weights |= {f"model.layers.{place}.{names[name]}": value for place, layer in enumerate(toy.layers)
                for name, value in layer.items()}
    model.load_state_dict({f"{name}.weight": torch.tensor(value) for name, value in weights.items()})
    return model


def drawn_by_generate(drawn, rows=1024):
    """law.DRAWS responses, in calls of `rows` lanes' responses."""
    model = as_llama(law.MODEL)
    fn = FunctionReward(lambda prompt, responses: [drawn.reward(ids) for ids in responses], inputs="ids")
    adapter = stars.adapters.transformers(policy=drawn.policy, reward=fn)
    params = drawn.params
    outputs = []
    for call in range(law.DRAWS // rows):
        outputs += model.generate(
            torch.tensor([law.PROMPT]), attention_mask=torch.ones(1, 3, dtype=torch.long), custom_generate=adapter,
            seed=params.seed + call, num_return_sequences=rows, do_sample=True, temperature=params.temperature,
            top_k=params.top_k, top_p=params.top_p, max_new_tokens=params.max_tokens, return_dict_in_generate=True,
            pad_token_id=EOS).stars
    return outputs


def law_p_values(drawn, outputs):
    """Of the segments that followed each prefix, and of the attempts that won."""
    winners = Counter()
    for output in outputs:
        segment = output.segments[0]
        winners[(segment.winner + 1) if segment.accepted else 0] += 1
    exact = segment_law((), drawn)[1]
    return (law.p_value(law.followers(outputs), lambda prefix: segment_law(prefix, drawn)[0]),
            law.p_value({(): winners}, lambda prefix: exact))


@pytest.mark.parametrize("options", [dict(width=3), dict(width=1, temperature=0.7, top_k=4)], ids=["wide", "filtered"])
def test_the_law(options):
    drawn = case(**options)
    assert min(law_p_values(drawn, drawn_by_generate(drawn))) > law.FALSE_POSITIVE_RATE / 2


def test_the_law_test_sees_noise_that_is_used_again(monkeypatch):
    """All attempts of a segment draw the same tokens."""
    drawing = hf_stack.Drawing

    def repeating(asked, proposal, device):
        return drawing([one._replace(attempts=[attempt._replace(attempt=1) for attempt in one.attempts])
                        for one in asked], proposal, device)

    monkeypatch.setattr(hf_stack, "Drawing", repeating)
    drawn = case(width=3)
    assert min(law_p_values(drawn, drawn_by_generate(drawn))) < law.FALSE_POSITIVE_RATE / 2


@pytest.mark.parametrize("wrong", [lambda one: one._replace(row=one.first), lambda one: one.cut(one.stop - 1)],
                         ids=["another_row", "a_column_less"])
def test_a_history_that_is_not_the_winners_makes_other_texts(llama, monkeypatch, wrong):
    """What the comparison of texts would see of a cache that is rewound wrongly."""
    wanted = llama.engine_says(reward=reward(), seed=11, temperature=0.9, top_k=50)
    settle = hf_stack.HFStack.settle

    def broken(self, settled):
        settle(self, settled)
        for response, kept, _ in settled:
            if kept:
                response.sequence.history = wrong(response.sequence.history)

    monkeypatch.setattr(hf_stack.HFStack, "settle", broken)
    found = llama.generate(reward=reward(), seed=11, **SAMPLING)
    assert [one.token_ids for one in found.stars] != [one.token_ids for one in wanted]


# -- generate's settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, params", [
    (dict(repetition_penalty=1.7), dict(repetition_penalty=1.7)),
    (dict(min_new_tokens=9, eos_token_id=[2, *range(70, 85)]), dict(min_tokens=9, stop_token_ids=range(70, 85))),
    (dict(suppress_tokens=list(range(50, 200))), dict(logit_bias={token: -100 for token in range(50, 200)})),
    (dict(top_k=0, min_p=0.02), dict(top_k=0, min_p=0.02)),
], ids=["repetition", "min_new_tokens", "suppressed", "min_p"])
def test_settings_are_the_engines(llama, given, params):
    wanted = llama.engine_says(reward=reward(), seed=6, **{"temperature": 0.9, "top_k": 50, **params})
    found = llama.generate(reward=reward(), seed=6, **{**SAMPLING, **given})
    assert [(one.token_ids, one.finish_reason) for one in found.stars] == [
        (one.token_ids, one.finish_reason) for one in wanted]


def test_processors_of_a_user_know_their_rows(llama):
    """prefix_allowed_tokens_fn is told the prompt's number, whatever the lanes; a processor sees padded ids."""
    seen = []

    def allowed(row, ids):
        return [10 + row, 20 + row, 30 + row]

    def processor(ids, scores):
        seen.append(tuple(ids.shape))
        assert ids[:, : len(first)].eq(first).all(1).any()
        return scores

    inputs = llama.inputs()
    first = inputs["input_ids"][2]
    found = llama.generate(reward=reward(), num_return_sequences=2, prefix_allowed_tokens_fn=allowed, **SAMPLING)
    for row, one in enumerate(found.stars):
        assert set(one.token_ids) <= {10 + row // 2, 20 + row // 2, 30 + row // 2}
    llama.generate(TEXTS[2:3], reward=reward(), logits_processor=transformers.LogitsProcessorList(
        [lambda ids, scores: processor(torch.cat([first.expand(len(ids), -1), ids[:, 2:]], 1), scores)]), **SAMPLING)
    assert seen and {rows for rows, _ in seen} <= {1, 2, 3, 4}


def test_stop_strings_end_a_segment_and_the_text(llama):
    free = llama.engine_says(reward=reward(), seed=9, temperature=0.9, top_k=50)
    stop = "ghs"  # the end of one token and the next
    assert stop in free[3].text
    wanted = llama.engine_says(reward=reward(), seed=9, temperature=0.9, top_k=50, stop=[stop])
    criteria = transformers.StoppingCriteriaList([transformers.StopStringCriteria(llama.tokenizer, [stop])])
    found = llama.generate(reward=reward(), seed=9, stopping_criteria=criteria, **SAMPLING)
    assert_same(found.stars, wanted)
    assert found.stars[3].finish_reason == "stop" and found.stars[3].stop_reason == stop


@pytest.mark.parametrize("of_rows", [lambda ids, ends: torch.full((len(ids),), ends), lambda ids, ends: ends],
                         ids=["by row", "of all"])
def test_criteria_of_a_user_end_lanes(llama, of_rows):
    class After(transformers.StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return of_rows(ids, ids.shape[1] >= length + 6)

    length = llama.inputs()["input_ids"].shape[1]
    criteria = transformers.StoppingCriteriaList([After()])
    found = llama.generate(reward=reward(), stopping_criteria=criteria, eos_token_id=None, **SAMPLING)
    assert [(len(one.token_ids), one.finish_reason) for one in found.stars] == [(6, "stop")] * 4
    assert found.sequences.shape[1] == length + 6


def test_ends_that_no_token_is_end_nothing(llama):
    """-1 is how some switch the end off."""
    wanted = llama.generate(reward=reward(), seed=5, eos_token_id=None, **SAMPLING)
    for eos in (-1, [2**40, -1]):
        found = llama.generate(reward=reward(), seed=5, eos_token_id=eos, pad_token_id=0, **SAMPLING)
        assert [facts(one) for one in found.stars] == [facts(one) for one in wanted.stars]


def test_seeds(llama):
    def texts(**options):
        return [one.token_ids for one in llama.generate(reward=reward(), **SAMPLING, **options).stars]

    torch.manual_seed(1)
    first = texts()
    torch.manual_seed(1)
    assert texts() == first
    assert texts() != first
    mixed = texts(seed=[3, 4, 3, 4])
    assert mixed[0] == texts(seed=3)[0] and mixed[1] == texts(seed=4)[1]
    with pytest.raises(RequestError, match="seed has 3 numbers and there are 4 prompts"):
        texts(seed=[1, 2, 3])


def test_padding_and_prompts_in_chunks(llama):
    found = llama.generate(reward=reward(), seed=1, **SAMPLING)
    lengths = [len(one.token_ids) for one in found.stars]
    plain = llama.generate(reward=reward(), seed=1, return_dict_in_generate=False, prefill_chunk_size=3,
                           pad_token_id=7, **SAMPLING)
    assert plain[:, : llama.inputs()["input_ids"].shape[1]].equal(llama.inputs()["input_ids"])
    for row, length in zip(plain.flip(1), lengths, strict=True):
        assert row[: max(lengths) - length].tolist() == [7] * (max(lengths) - length)
    assert [row[found.sequences.shape[1] - max(lengths):][:length].tolist() for row, length in zip(
        plain, lengths, strict=True)] == [one.token_ids for one in found.stars]


# -- caches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 2], ids=["whole", "in_chunks"])  # for which generate makes its memory at once
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one", "several"])
def test_a_static_cache_is_rewound_too(llama, texts, chunk):
    policy = STARS(segment_size=4, max_attempts=5, beta=0.4, reward_threshold=2.5, alpha=1.0, width=2)
    wanted = llama.generate(texts, policy=policy, reward=reward(), seed=7, **SAMPLING)
    found = llama.generate(texts, policy=policy, reward=reward(), seed=7, cache_implementation="static",
                           prefill_chunk_size=chunk, **SAMPLING)
    assert_same(found.stars, wanted.stars)
    assert any(not segment.accepted for one in found.stars for segment in one.segments), "no held attempt wins"


def test_a_static_window_is_refused_by_name(tiny):
    with pytest.raises(RequestError, match="StaticSlidingWindowLayer, in the cache of MistralForCausalLM, cannot be "
                                           "rewound: leave cache_implementation"):
        tiny(family="mistral", window=8).generate(reward=reward(), cache_implementation="static", **SAMPLING)


def recurrent(kind: str):
    small = dict(vocab_size=99, hidden_size=16, num_hidden_layers=2, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    if kind == "mamba":
        return transformers.MambaForCausalLM(transformers.MambaConfig(**small, state_size=4))
    return transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(
        **small, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8, linear_key_head_dim=4,
        linear_value_head_dim=4, linear_num_key_heads=2, linear_num_value_heads=2,
        layer_types=["linear_attention", "full_attention"]))


@pytest.mark.parametrize("kind, name", [("mamba", "MambaForCausalLM"), ("qwen3_next", "Qwen3NextForCausalLM")])
def test_recurrent_states_are_refused_by_name(kind, name):
    adapter = stars.adapters.transformers(policy=POLICY, reward=reward())
    with pytest.raises(RequestError, match=f"LinearAttentionLayer, in the cache of {name}, cannot be rewound"):
        recurrent(kind).generate(torch.tensor([[1, 5, 6]]), custom_generate=adapter, max_new_tokens=4)


def test_encoders_and_decoders_are_refused():
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0))
    adapter = stars.adapters.transformers(policy=POLICY, reward=reward())
    with pytest.raises(RequestError, match="T5ForConditionalGeneration is an encoder and a decoder"):
        model.generate(torch.tensor([[1, 5, 6]]), custom_generate=adapter, max_new_tokens=4)


def counting_columns():
    """A decoder whose positions are columns of its cache."""
    return transformers.BartForCausalLM(transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, is_decoder=True, is_encoder_decoder=False,
        forced_eos_token_id=None)).eval()


@pytest.mark.parametrize("options", [
    dict(num_return_sequences=2), dict(input_ids=torch.tensor([[3, 5], [4, 6]])),
    dict(attention_mask=torch.tensor([[0, 1]])),
], ids=["responses", "prompts", "padding"])
def test_positions_that_are_columns_are_refused_where_columns_move(options):
    """Of several responses each goes on at a place of its own, and their columns with them."""
    adapter = stars.adapters.transformers(policy=POLICY, reward=reward())
    inputs = dict(input_ids=torch.tensor([[3, 5]]), attention_mask=None, do_sample=True) | options
    with pytest.raises(RequestError, match="BartForCausalLM takes no position_ids and counts columns"):
        counting_columns().generate(**inputs, custom_generate=adapter, max_new_tokens=4)


def test_positions_that_are_columns_stay_those_of_one_response():
    model, ids = counting_columns(), torch.tensor([[3, 5, 7]])
    adapter = stars.adapters.transformers(policy=POLICY, reward=reward())
    settings = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model.generate(ids, custom_generate=adapter, **settings), model.generate(ids, **settings))


def test_positions_that_are_distances_need_no_ids():
    """Bloom's: rows that are padded and go on at different places say what each says alone."""
    torch.manual_seed(0)
    model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2))
    ids, mask = torch.tensor([[0, 0, 5], [7, 8, 9]]), torch.tensor([[0, 0, 1], [1, 1, 1]])

    def says(ids, mask, seed):
        adapter = stars.adapters.transformers(policy=POLICY, reward=reward())
        return [one.token_ids for one in model.generate(
            ids, attention_mask=mask, custom_generate=adapter, max_new_tokens=NEW, seed=seed, eos_token_id=None,
            pad_token_id=0, return_dict_in_generate=True, **SAMPLING).stars]

    assert says(ids, mask, [1, 2]) == says(ids[:1, 2:], mask[:1, 2:], 1) + says(ids[1:], mask[1:], 2)


@pytest.mark.parametrize("model, match", [
    (lambda: transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2)), "OpenAIGPTLMHeadModel does not use the cache"),
    (lambda: transformers.CpmAntForCausalLM(transformers.CpmAntConfig(
        vocab_size=40, hidden_size=16, num_attention_heads=2, dim_head=8, dim_ff=16, num_hidden_layers=1)),
     "appends more keys than it was given tokens"),
], ids=["no cache", "more keys"])
def test_caches_that_are_no_histories_are_refused(model, match):
    adapter = stars.adapters.transformers(policy=POLICY, reward=reward())
    with pytest.raises(RequestError, match=match):
        model().eval().generate(torch.tensor([[3, 5, 7]]), custom_generate=adapter, max_new_tokens=4, pad_token_id=0)


def test_prompts_wait_where_the_reward_has_no_room(tiny, tiny_model):
    """Later prompts are read when earlier responses have ended, each once; what was held is given back."""
    one = tiny(family="llama")
    judge = str(tiny_model(tokenizer=True, head="reward"))
    policy = STARS(segment_size=4, max_attempts=4, beta=0.5, reward_threshold=1.0, alpha=0.5)
    wanted = one.generate(policy=policy, reward=judge, seed=4, num_return_sequences=2, **SAMPLING)
    adapter = stars.adapters.transformers(policy=policy, reward=judge, tokenizer=one.tokenizer, cache_tokens=112)
    found = one.generate(adapter=adapter, seed=4, num_return_sequences=2, **SAMPLING)
    assert [a.token_ids for a in found.stars] == [b.token_ids for b in wanted.stars]
    assert found.forward_tokens.prompt < wanted.forward_tokens.prompt  # less padding, and nothing twice
    assert found.forward_tokens.prompt >= one.inputs()["attention_mask"].sum()
    adapter._scoring.reward.cache.check_integrity(0)
    again = one.generate(adapter=adapter, seed=4, num_return_sequences=2, **SAMPLING)
    assert [a.token_ids for a in again.stars] == [b.token_ids for b in wanted.stars]


def test_a_reward_is_bound_anew_where_more_rows_come(tiny, tiny_model):
    one = tiny(family="llama")
    judge = str(tiny_model(tokenizer=True, head="reward"))
    adapter = stars.adapters.transformers(policy=POLICY, reward=judge, tokenizer=one.tokenizer)
    first = one.generate(adapter=adapter, seed=4, new=6, **SAMPLING)
    cache = adapter._scoring.reward.cache
    many = one.generate(adapter=adapter, seed=4, new=6, num_return_sequences=20, **SAMPLING)
    assert adapter._scoring.reward.cache is not cache
    assert [facts(a) for a in many.stars[::20]] == [facts(b) for b in first.stars]
    cache = adapter._scoring.reward.cache
    one.generate(adapter=adapter, seed=4, new=6, **SAMPLING)
    assert adapter._scoring.reward.cache is cache


# -- streamers ---------------------------------------------------------------------------------------------------------


class Noting:
    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value.flatten().tolist())

    def end(self):
        self.ended += 1


def test_a_streamer_gets_what_was_committed(llama):
    streamer = Noting()
    found = llama.generate(TEXTS[:1], reward=reward(), seed=5, streamer=streamer, **SAMPLING)
    [output] = found.stars
    assert streamer.puts == [llama.inputs(TEXTS[:1])["input_ids"][0].tolist(),
                             *(list(segment.token_ids) for segment in output.segments)]
    assert output.metrics.attempts > len(output.segments) and streamer.ended == 1
    with pytest.raises(RequestError, match="a streamer takes one sequence and there are 2"):
        llama.generate(TEXTS[:1], reward=reward(), streamer=Noting(), num_return_sequences=2, **SAMPLING)


def test_transformers_streamers(llama, capsys):
    wanted = llama.generate(TEXTS[:1], reward=reward(), seed=5, **SAMPLING)
    text = llama.tokenizer.decode(wanted.stars[0].token_ids)
    streamer = transformers.TextStreamer(llama.tokenizer, skip_prompt=True)
    llama.generate(TEXTS[:1], reward=reward(), seed=5, streamer=streamer, **SAMPLING)
    assert capsys.readouterr().out == text + "\n"
    streamer = transformers.TextIteratorStreamer(llama.tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=lambda: llama.generate(
        TEXTS[:1], reward=reward(), seed=5, streamer=streamer, **SAMPLING))
    thread.start()
    assert "".join(streamer) == text
    thread.join()


def test_a_streamer_ends_where_generate_fails(llama):
    def fails(prompt, responses):
        raise RuntimeError("no reward today")

    streamer = Noting()
    with pytest.raises(RewardError):
        llama.generate(TEXTS[:1], reward=FunctionReward(fails, inputs="ids"), streamer=streamer,
                       return_dict_in_generate=False, **SAMPLING)
    assert streamer.ended == 1


# -- what is refused, and what fails -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options, match", [
    (dict(num_beams=2), "num_beams=2"), (dict(use_cache=False), "use_cache=False"),
    (dict(prompt_lookup_num_tokens=2), "prompt_lookup_num_tokens=2"), (dict(guidance_scale=1.5), "guidance_scale=1.5"),
    (dict(output_scores=True), "output_scores=True"), (dict(output_hidden_states=True), "output_hidden_states=True"),
    (dict(typical_p=0.9, do_sample=True), "typical_p=0.9"), (dict(penalty_alpha=0.6, top_k=4), "penalty_alpha=0.6"),
    (dict(cache=transformers.DynamicCache()), "does not take a cache"), (dict(synced_gpus=True), "synced_gpus=True"),
    (dict(inputs_embeds=torch.zeros(4, 14, 36)), "inputs_embeds|token ids"),
    (dict(attention_mask=torch.tensor([[1] * 27 + [0]] * 4)), "pad on the left"),
    (dict(attention_mask=torch.ones(4, 2)), "attention_mask has 2 columns and the prompts have 28"),
    (dict(position_ids=torch.zeros(1, 1, dtype=torch.int64)),
     "position_ids or attention_mask has 1 columns and the prompts have 28"),
    (dict(input_ids=torch.zeros(0, 28, dtype=torch.int64), attention_mask=None), "the prompt is empty"),
    (dict(num_return_sequences=5000, do_sample=True), "at most 4096"),
])
def test_what_cannot_be_done_is_refused_by_name(llama, options, match):
    inputs = dict(llama.inputs()) | options
    adapter = stars.adapters.transformers(policy=POLICY, reward=reward())
    with pytest.raises(RequestError, match=match):
        llama.model.generate(**inputs, custom_generate=adapter, max_new_tokens=5)


def test_an_assistant_is_refused(llama):
    adapter = stars.adapters.transformers(policy=POLICY, reward=reward())
    with pytest.raises(RequestError, match="assistant_model"):
        llama.model.generate(**llama.inputs(TEXTS[:1]), custom_generate=adapter, assistant_model=llama.model,
                             max_new_tokens=5)


def test_rotations_that_change_with_the_length_are_refused(tiny_model):
    one = Tiny(tiny_model(family="phi3", rope="longrope", hidden=40, heads=4, tokenizer=True))
    with pytest.raises(RequestError, match="rotates anew once a text passes 48 tokens"):
        one.generate(reward=reward(), new=60, **SAMPLING)
    assert one.generate(reward=reward(), new=6, **SAMPLING).stars


@pytest.mark.parametrize("arguments, error, match", [
    (dict(policy=CARDS(reward_threshold=1.0), reward=summed), RequestError, "stars.adapters.transformers cannot run"),
    (dict(policy=POLICY), RewardError, "reward is None"),
    (dict(policy=Sample(), reward=summed), RequestError, "the policy asks for no reward"),
    (dict(policy=POLICY, reward=summed, tokenizer="gpt2"), stars.TokenizerError, "tokenizer is str"),
    (dict(policy=POLICY, reward=summed, cache_tokens=0), RequestError, "cache_tokens is 0"),
])
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        stars.adapters.transformers(**arguments)


def fails_for(first: int):
    def score(prompt, responses):
        if prompt[1] == first and len(responses[0]) > 5:
            raise RuntimeError("no reward today")
        return summed(prompt, responses)

    return FunctionReward(score, inputs="ids")


def test_a_failing_reward_names_its_row(llama):
    first = llama.tokenizer(TEXTS[2])["input_ids"][1]
    with pytest.raises(RewardError, match="row [45] of the batch: .*no reward today"):
        llama.generate(reward=fails_for(first), seed=1, num_return_sequences=2, return_dict_in_generate=False,
                       **SAMPLING)
    with pytest.warns(UserWarning, match="2 of 8 rows ended with an error"):
        found = llama.generate(reward=fails_for(first), seed=1, num_return_sequences=2, **SAMPLING)
    assert [one.finish_reason == "error" for one in found.stars] == [False] * 4 + [True] * 2 + [False] * 2
    assert "no reward today" in found.stars[4].error and len(found.stars[4].token_ids) == 4
    wanted = llama.generate(reward=reward(), seed=1, num_return_sequences=2, **SAMPLING)
    assert [facts(a) for a in found.stars[:4]] == [facts(b) for b in wanted.stars[:4]]


def test_a_reward_that_calls_its_own_generate_is_refused(llama):
    def score(prompt, responses):
        llama.generate(adapter=made[0], **SAMPLING)

    made = [stars.adapters.transformers(policy=POLICY, reward=FunctionReward(score, inputs="ids"))]
    with pytest.raises(RewardError, match="at work in this thread"):
        llama.generate(adapter=made[0], return_dict_in_generate=False, **SAMPLING)


# -- a repository ------------------------------------------------------------------------------------------------------


def test_a_repository_of_generate_runs_the_adapter(llama, tmp_path, monkeypatch):
    """From a copy of what the package has, as a clone of a pushed one would be."""
    source = Path(hf_generate.__file__).parent / "hub"
    repository = Path(shutil.copytree(source, tmp_path / "stars-generate"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    policy = STARS(segment_size=4, max_attempts=7, beta=0.4, reward_threshold=1.0, alpha=0.5)
    free = llama.generate(TEXTS[:1], policy=policy, reward=reward(), seed=5, **SAMPLING).stars[0]
    stop = free.text[-1]
    options = dict(custom_generate=str(repository), trust_remote_code=True, reward_threshold=1.0, segment_size=4,
                   max_attempts=7, beta=0.4, seed=5, max_new_tokens=NEW, tokenizer=llama.tokenizer,
                   return_dict_in_generate=True, **SAMPLING)
    streamer = Noting()
    found = llama.model.generate(**llama.inputs(TEXTS[:1]), stars_reward=reward(), streamer=streamer, **options)
    assert found.stars[0].token_ids == free.token_ids
    assert sum(streamer.puts[1:], []) == free.token_ids
    found = llama.model.generate(**llama.inputs(TEXTS[:1]), stars_reward=reward(), stop_strings=[stop], **options)
    assert found.stars[0].stop_reason == stop and found.stars[0].text == free.text[: free.text.index(stop)]
    for wrong, said in (({"reward_treshold": 1.0}, "did you mean reward_threshold"),
                        ({"stars_policy": policy}, "has its own reward_threshold, segment_size"),
                        ({"stars_reward": [1]}, "reward is list")):
        with pytest.raises((ValueError, RewardError), match=said):
            llama.model.generate(**llama.inputs(TEXTS[:1]), **{"stars_reward": reward(), **options, **wrong})
    options.pop("reward_threshold")
    with pytest.raises(ValueError, match="reward_threshold is missing"):
        llama.model.generate(**llama.inputs(TEXTS[:1]), stars_reward=reward(), **options)
    assert (repository / "custom_generate" / "requirements.txt").read_text().split() == ["stars-engine"]


def test_a_reward_model_is_loaded_once_whatever_the_settings_and_sizes(llama, tiny_model, tmp_path, monkeypatch):
    loaded = []
    load = causal.load_model
    monkeypatch.setattr(causal, "load_model", lambda directory, **given: loaded.append(directory) or load(
        directory, **given))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    repository = shutil.copytree(Path(hf_generate.__file__).parent / "hub", tmp_path / "stars-generate")
    judge = str(tiny_model(tokenizer=True, head="reward"))
    texts = {}
    for size, rows in ((4, 1), (3, 1), (4, 70)):  # another policy, and more rows than there was room for
        found = llama.model.generate(
            **llama.inputs(TEXTS[:1]), custom_generate=str(repository), trust_remote_code=True, stars_reward=judge,
            reward_threshold=1.0, segment_size=size, num_return_sequences=rows, seed=5, max_new_tokens=8,
            tokenizer=llama.tokenizer, return_dict_in_generate=True, **SAMPLING)
        texts[size, rows] = found.stars[0].text
    assert loaded == [Path(judge)] or loaded == [judge]
    assert texts[4, 1] == texts[4, 70]


def test_a_reward_model_in_memory_has_the_tokenizer_of_its_directory(llama, tiny_model):
    """In either place a tokenizer may be: the directory it was loaded from, or a path that is given."""
    directory = tiny_model(tokenizer=True, head="reward")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    given = [str(directory), loaded, stars.CausalReward(loaded, tokenizer=str(directory))]
    found = [llama.generate(TEXTS[:2], reward=one, seed=3, **SAMPLING).stars for one in given]
    assert [[facts(one)[:2] for one in output] for output in found[1:]] == [[facts(one)[:2] for one in found[0]]] * 2


def test_a_reward_model_in_memory_is_not_taken_for_another_rounding(llama, tiny_model):
    """What an engine has rounded is not what a later one, or an adapter, asks for: its weights are there no more."""
    directory = tiny_model(tokenizer=True, head="reward")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    judge = stars.CausalReward(loaded)
    engine = Engine(str(llama.directory), judge, dtype="float32", reward_quantization="int8")
    del engine
    with pytest.raises(RewardError, match="quantization='int8'.*make another one"):
        llama.generate(TEXTS[:1], reward=judge, seed=3, **SAMPLING)
    nameless = transformers.AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    nameless.config._name_or_path = ""
    with pytest.raises(RewardError, match=r"CausalReward\(model, tokenizer=tokenizer\)"):
        llama.generate(TEXTS[:1], reward=nameless, seed=3, **SAMPLING)
    with pytest.raises(RewardError, match="/nowhere.*where no tokenizer.json is"):
        stars.CausalReward(loaded, tokenizer="/nowhere")


def test_what_a_reward_wants_of_the_tokenizer_is_named_as_the_adapter_takes_it(llama, tiny_model):
    for one in (str(tiny_model(tokenizer=True, head="reward")), lambda prompt, responses: [0.0] * len(responses)):
        with pytest.raises(RewardError, match=r"given to the adapter, as tokenizer="):
            llama.generate(TEXTS[:1], reward=one, tokenizer=False, seed=3, **SAMPLING)


def test_the_limit_of_a_prompt(llama):
    with pytest.raises(ValueError, match="max_length"):
        llama.generate(["a " * (MAX_POSITIONS // 2)], reward=reward(), max_length=5, new=None)
