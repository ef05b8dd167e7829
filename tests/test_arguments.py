"""What users type: types and sizes of numbers, names of other engines, paths and objects in place of models.

Whatever is wrong is refused by one sentence before anything is queued; a request beside it is not touched.
"""

from __future__ import annotations

import ast
import dataclasses
import decimal
import enum
import fractions
import functools
import inspect
import logging
import math
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

import stars
from stars.arguments import Absent, asks_for_nothing, bare, shown
from stars.config import EngineConfig
from stars.plan import Fixed, Lanes, Plan, Sampled, Score, Whole, plan_of
from stars.rules import Always, Argmax, Threshold
from stars.vllm_names import ENGINE, SAMPLING
from toy import ToyModel, toy_engine

PACKAGE = Path(stars.__file__).parent
PAIR = PACKAGE / "demo_models"
LM = ToyModel(vocab=5, positions=64)
PROMPT = {"prompt_token_ids": [1, 2]}
HUGE = 10**400


class Unprintable:
    """Raises when it is shown."""

    def __repr__(self):
        raise RuntimeError("no text")


ODD = [HUGE, -HUGE, 10**5000, math.nan, "1", decimal.Decimal(1), True, np.bool_(True), np.array(True),
       torch.tensor(True), np.array([1.0]), torch.tensor([1]), 1j, [1], object(), Unprintable(), b"1"]
"""Values that are no number of any field that takes one, or one that nothing holds."""


def refused(error: type[Exception], message: str, call, *args, **kwargs) -> None:
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert type(caught.value) is error and message in text, text
    assert "\n" not in text and len(text) < 400 and not text.endswith("."), text


# -- numbers ------------------------------------------------------------------------------------------------------

NUMBERS = ("temperature", "top_k", "top_p", "min_p", "n", "presence_penalty", "frequency_penalty", "repetition_penalty",
           "max_tokens", "seed")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ODD, ids=lambda value: shown(value)[:20])
def test_odd_numbers_of_sampling(name, value):
    if name == "top_k" and type(value) is int and value > 0:
        assert stars.SamplingParams(top_k=value).settle(2, 64, 5).top_k == 0  # keeps every token: off
    elif name == "max_tokens" and type(value) is int and value > 0:
        refused(stars.RequestError, "the limit is 64", toy_engine(LM).add_request, PROMPT,
                stars.SamplingParams(max_tokens=10**30))
    else:
        refused(stars.RequestError, f"SamplingParams.{name} is ", stars.SamplingParams, **{name: value})


@pytest.mark.parametrize("build, names", [
    (lambda **given: stars.STARS(**{"reward_threshold": 1.0, **given}),
     ("segment_size", "max_attempts", "alpha", "beta", "reward_threshold", "width")),
    (lambda **given: stars.CARDS(**{"reward_threshold": 1.0, **given}),
     ("entropy_threshold", "min_segment", "max_segment", "max_attempts", "alpha", "beta", "option", "width")),
    (stars.BestOfN, ("n", "temperature")), (stars.BlockwiseBestOfK, ("k", "segment_size")),
    (lambda **given: stars.RejectionSampling(**{"reward_threshold": 1.0, **given}),
     ("reward_threshold", "beta", "max_attempts", "width")),
    (stars.SpeculativeRejection, ("n", "alpha", "segment_size")),
    (stars.SegmentBeam, ("beams", "candidates", "segment_size")),
    (stars.ParticleFilter, ("particles", "beta", "segment_size", "resampling", "final")),
])
@pytest.mark.parametrize("value", ODD, ids=lambda value: shown(value)[:20])
def test_odd_numbers_of_policies(build, names, value):
    for name in names:
        if name == "reward_threshold" and value is math.nan:
            refused(stars.RequestError, " needs a reward_threshold", build, **{name: value})
        elif name == "k" and type(value) is list:
            assert build(k=value).k == (1,)
        else:
            refused(stars.RequestError, f".{name} is ", build, **{name: value})


@pytest.mark.parametrize("name", ["cache_tokens", "page_size", "max_model_len", "max_num_seqs", "max_num_lanes",
                                  "max_segment_size"])
@pytest.mark.parametrize("value", [*ODD, 1 << 31, 1.0, fractions.Fraction(1, 2)], ids=lambda value: shown(value)[:20])
def test_odd_sizes_of_an_engine(name, value):
    refused(stars.RequestError, f"{name} is ", EngineConfig.resolve, LM.config, **{name: value})


@pytest.mark.parametrize("value", [*ODD, 0, -0.5, 1.5, 2],
                         ids=lambda value: shown(value)[:20])
def test_odd_shares_of_a_gpus_memory(value):
    refused(stars.RequestError, "gpu_memory_utilization is ", EngineConfig.resolve, LM.config,
            gpu_memory_utilization=value)


def test_shares_of_a_gpus_memory():
    """vLLM's name and default. On the CPU it decides nothing; a given cache_tokens goes before it."""
    default, given = EngineConfig.resolve(LM.config), EngineConfig.resolve(LM.config, cache_tokens=4096)
    assert (default.gpu_memory_utilization, default.cache_tokens, given.gpu_memory_utilization) == (0.9, 32768, 1.0)
    for share in (1, 1.0, np.float32(0.5), fractions.Fraction(1, 3)):
        config = EngineConfig.resolve(LM.config, gpu_memory_utilization=share)
        assert config == dataclasses.replace(default, gpu_memory_utilization=float(share))


def test_caches_whose_rows_have_no_number():
    """Rows are numbered in int32: refused before anything is allocated."""
    refused(stars.RequestError, "make 2147485695 rows of 1 heads, which are numbered in int32", EngineConfig.resolve,
            LM.config, cache_tokens=(1 << 31) - 1, page_size=1, max_num_lanes=64, max_segment_size=16)
    assert EngineConfig.resolve(LM.config, cache_tokens=(1 << 31) - 1 - 2048, page_size=1, max_segment_size=16)


def test_numbers_of_numpy_become_pythons():
    params = stars.SamplingParams(
        temperature=np.float32(0.5), top_k=np.int64(3), top_p=np.float64(0.25), min_p=fractions.Fraction(1, 4),
        max_tokens=np.int32(9), n=np.uint8(2), stop_token_ids=np.array([3, 1]), ignore_eos=np.bool_(True),
        seed=np.uint64((1 << 64) - 1), presence_penalty=1, frequency_penalty=np.float16(-2),
        repetition_penalty=np.int8(2))
    assert params == stars.SamplingParams(
        temperature=0.5, top_k=3, top_p=0.25, min_p=0.25, max_tokens=9, n=2, stop_token_ids=[3, 1], ignore_eos=True,
        seed=(1 << 64) - 1, presence_penalty=1.0, frequency_penalty=-2.0, repetition_penalty=2.0)
    kinds = {name: type(getattr(params, name)) for name in NUMBERS}
    assert kinds == {name: int if name in ("top_k", "n", "max_tokens", "seed") else float for name in NUMBERS}
    assert params.ignore_eos is True and [type(token) for token in params.stop_token_ids] == [int, int]
    policy = stars.STARS(np.int64(4), np.int32(3), np.float64(0.5), 1, np.float32(0.25), np.int64(2))
    assert policy == stars.STARS(4, 3, 0.5, 1.0, 0.25, 2) and hash(policy) == hash(stars.STARS(4, 3, 0.5, 1.0, 0.25, 2))
    assert [type(value) for value in vars(policy).values()] == [int, int, float, float, float, int, str, bool]
    assert type(stars.BestOfN(np.int64(3)).n) is int and stars.Sample(np.bool_(True)).score is True
    config = EngineConfig.resolve(LM.config, cache_tokens=np.int64(64), max_num_lanes=np.int32(3))
    assert type(config.cache_tokens) is int and type(config.max_num_lanes) is int


def test_edges_that_32_bits_hold():
    """The sampler computes in float32: what it would turn into zero or infinity is brought to the door."""
    largest = float(np.finfo(np.float32).max)
    assert stars.SamplingParams(temperature=largest).temperature == largest
    refused(stars.RequestError, "SamplingParams.temperature is 3.4028", stars.SamplingParams,
            temperature=math.nextafter(largest, math.inf))
    assert stars.SamplingParams(temperature=1e-39).temperature == 0.0
    assert stars.SamplingParams(temperature=1e-37).temperature == 1e-37
    stars.STARS(reward_threshold=0.0, max_attempts=(1 << 24) - 1)
    refused(stars.RequestError, "STARS.max_attempts is 16777216, it must be an integer from 1 to 16777215", stars.STARS,
            reward_threshold=0.0, max_attempts=1 << 24)


@pytest.mark.parametrize("options", [dict(temperature=3.4e38), dict(temperature=1.2e-38), dict(top_p=1e-300),
                                     dict(min_p=1e-300), dict(top_p=math.nextafter(1.0, 0.0)), dict(top_k=1 << 40)])
def test_edges_run_without_a_warning(options):
    """A number that a buffer of 32 bits cannot hold would warn there, and raise where warnings are errors."""
    engine = toy_engine(LM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [output] = engine.generate(PROMPT, stars.SamplingParams(max_tokens=6, seed=1, ignore_eos=True, **options),
                                   use_tqdm=False)
    assert output.outputs[0].finish_reason == "length" and len(output.outputs[0].token_ids) == 6


@pytest.mark.parametrize("name, value", [("ignore_eos", "no"), ("ignore_eos", 1), ("ignore_eos", None),
                                         ("stop", b"x"), ("stop", 5), ("stop_token_ids", [1.0]),
                                         ("stop_token_ids", "12"), ("stop_token_ids", [np.bool_(True)]),
                                         ("stop_token_ids", [-1])])
def test_flags_and_lists(name, value):
    refused(stars.RequestError, f"SamplingParams.{name}", stars.SamplingParams, **{name: value})


# -- token ids that a model has not ---------------------------------------------------------------------------------

class Unreadable(list):
    def __iter__(self):
        raise OSError("a list that cannot be read")


@pytest.mark.parametrize("name", ["stop", "bad_words", "stop_token_ids", "allowed_token_ids"])
@pytest.mark.parametrize("value", [np.array(2), Unreadable([1]), 7, object()])
def test_lists_that_are_none(name, value):
    with pytest.raises(stars.RequestError, match=f"SamplingParams.{name} (is .*,|must)"):
        stars.SamplingParams(**{name: value})


@pytest.mark.parametrize("value", [np.array([1, 2]), np.array([]), [], "", 0, [1]])
def test_a_bias_that_is_no_dictionary(value):
    with pytest.raises(stars.RequestError, match="logit_bias is .* must be a dictionary"):
        stars.SamplingParams(logit_bias=value)


def test_a_class_that_has_no_schema():
    class Model:
        @classmethod
        def model_json_schema(cls):
            raise ValueError("Cannot generate a JsonSchema for\ncore_schema.IsInstanceSchema")

    with pytest.raises(stars.RequestError, match=r"makes no JSON schema \(Cannot generate a JsonSchema for core"):
        stars.SamplingParams(structured_outputs={"json": Model})


def test_stop_ids_beyond_the_vocabulary_are_refused_and_leave_the_others():
    engine = toy_engine(LM)
    params = stars.SamplingParams(max_tokens=4, ignore_eos=True, seed=1)
    engine.add_request(PROMPT, params, request_id="good")
    for token in (5, 1 << 31, HUGE):
        refused(stars.RequestError, "which is outside the model's vocabulary of 5", engine.add_request, PROMPT,
                stars.SamplingParams(stop_token_ids=[1, token]))
    [output] = [output for _ in range(4) for output in engine.step() if output.finished]
    assert output.request_id == "good" and output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("beyond", [5, 1 << 31, 1 << 70])
def test_eos_ids_beyond_the_vocabulary_can_never_be_drawn(beyond):
    """Small copies of large models keep the large one's ids: they are left out, and the others still stop."""
    params = stars.SamplingParams(max_tokens=30, n=8, seed=3)
    expected = toy_engine(LM).generate(PROMPT, params, use_tqdm=False)[0]
    output = toy_engine(ToyModel(vocab=5, positions=64, eos=(0, beyond))).generate(PROMPT, params, use_tqdm=False)[0]
    assert [o.token_ids for o in output.outputs] == [o.token_ids for o in expected.outputs]
    assert "stop" in {o.finish_reason for o in output.outputs}


# -- policies of somebody else's ------------------------------------------------------------------------------------

RULE = Threshold(alpha=1.0, beta=0.0, reward_threshold=0.5)


class Own:
    """A policy that cannot be hashed and says what the test tells it."""

    __hash__ = None

    def __init__(self, **changes):
        self.changes = changes

    def plan(self):
        return Plan(Sampled(), Fixed(4), Lanes(1, 3), Score(), RULE)._replace(**self.changes)


class Misnamed:
    """Callable, and no rule."""

    def __call__(self, judged, state):
        return None


@pytest.mark.parametrize("changes, message", [
    (dict(propose=None), "Own.plan().propose is None, it must be a stars.plan.Sampled"),
    (dict(segment=Fixed(0)), "Own.plan().segment.size is 0"),
    (dict(segment=16), "Own.plan().segment is 16, it must be a stars.plan.Fixed, Entropy or Whole"),
    (dict(segment=Whole(0), score=Score("end")), "Own.plan().segment.piece is 0"),
    (dict(lanes=Lanes(1, HUGE)), "Own.plan().lanes.attempts is 1000"),
    (dict(lanes=Lanes(1, (3, 0))), "Own.plan().lanes.attempts[1] is 0, it must be an integer of at least 1"),
    (dict(lanes=Lanes(1, ())), "Own.plan().lanes.attempts is empty"),
    (dict(lanes=Lanes(1, [3])), "Own.plan().lanes.attempts is [3], it must be an integer"),
    (dict(lanes=Lanes(2.0, 3)), "Own.plan().lanes.width is 2.0"),
    (dict(lanes=Lanes(1, 3, None)), "Own.plan().lanes.population is None"),
    (dict(lanes=(1, 3)), "Own.plan().lanes is (1, 3), it must be a stars.plan.Lanes"),
    (dict(decide=Threshold(math.nan, 0.0, 0.5)), "Own.plan().decide.alpha is nan"),
    (dict(decide=Threshold(1.0, -1, 0.5)), "Own.plan().decide.beta is -1"),
    (dict(decide=Threshold(1.0, 0.0, HUGE)), "Own.plan().decide.reward_threshold is 1000"),
    (dict(decide=Threshold(1.0, 0.0, math.nan)), "Own.plan().decide.reward_threshold is nan"),
    (dict(decide=Threshold(0.5, 0.0, 0.5)), "does not ask for that: set score.prompt to True"),
    (dict(score=Score("sometimes")), "Own.plan().score.when is 'sometimes', it must be one of segment, end, never"),
    (dict(score=Score(prompt="no")), "Own.plan().score.prompt is 'no', it must be True or False"),
    (dict(score=None), "Own.plan().score is None, it must be a stars.plan.Score"),
    (dict(score=Score("never", True), decide=Always()), "asks for the reward of the prompt and has"),
    (dict(decide=None), "Own.plan().decide is None, it must be a rule"),
    (dict(decide=Argmax), "it must be a rule: an object"), (dict(decide=Misnamed()), "it must be a rule: an object"),
    (dict(exhaust="worst"), "Own.plan().exhaust is 'worst', it must be one of best_seen"),
    (dict(exhaust="relax"), "Own.plan().exhaust is 'relax', it must say by how much"),
    (dict(exhaust="softmax", score=Score("never"), decide=Always()), "Own.plan().exhaust draws by rewards and has"),
    (dict(exhaust="back_up", lanes=Lanes(1, 3, 2)), "Own.plan().exhaust takes segments back, which whole responses"),
    (dict(exhaust="back_up", lanes=Lanes(1, 1 << 23)), "draws a segment of 8388608 attempts up to 2 times"),
    (dict(score=Score("never")), "decides by rewards"),
    (dict(score=Score("end"), decide=Argmax()), "decides by rewards"),
    (dict(segment=Whole(), lanes=Lanes(1, 1, 2), score=Score("never"), decide=Argmax()), "decides by rewards"),
    (dict(segment=Whole(), score=Score("end")), "has whole responses, each of which is one attempt"),
    (dict(segment=Whole(), lanes=Lanes(1, 1, 2)), "has whole responses, each of which is one attempt"),
])
def test_plans_that_cannot_run(changes, message):
    refused(stars.RequestError, message, plan_of, Own(**changes))


@pytest.mark.parametrize("name, value, message", [
    ("in_order", 1, "Own.plan().decide.in_order is 1, it must be True or False"),
    ("uniforms", -1, "Own.plan().decide.uniforms is -1"), ("uniforms", 0.5, "Own.plan().decide.uniforms is 0.5"),
    ("group_uniforms", 1 << 20, "Own.plan().decide.group_uniforms is 1048576"),
])
def test_rules_that_declare_what_cannot_be(name, value, message):
    rule = Misnamed()
    rule.in_order, rule.uniforms = True, 1
    assert plan_of(Own(decide=rule)).decide is rule
    setattr(rule, name, value)
    refused(stars.RequestError, message, plan_of, Own(decide=rule))


def test_objects_that_are_no_policies():
    class Raises:
        def plan(self):
            raise KeyError("x")

    class Empty:
        def plan(self):
            return None

    refused(stars.RequestError, "Raises.plan() raised KeyError", plan_of, Raises())
    refused(stars.RequestError, "Empty.plan() returned None", plan_of, Empty())
    refused(stars.RequestError, "policy is dict", plan_of, {})
    assert plan_of(Own(lanes=Lanes(np.int64(2), 3), decide=Threshold(1, 0, 0.5))) == Plan(
        Sampled(), Fixed(4), Lanes(2, 3), Score(), RULE)
    assert plan_of(Own(segment=Whole(4), lanes=Lanes(1, 1, 3), score=Score("end"))).lanes.population == 3
    assert Plan(Sampled(), Fixed(4), Lanes(), Score(), RULE) != Plan(Sampled(), Whole(4), Lanes(), Score(), RULE)


def test_segments_that_have_no_number():
    """A segment's index has 20 bits of the random counter."""
    engine = toy_engine(LM)
    engine._intake._config = EngineConfig.resolve(ToyModel(positions=(1 << 20) + 64).config, cache_tokens=1 << 21)
    policy = Own(segment=Fixed(1), score=Score("never"), decide=Always())
    refused(stars.RequestError, "makes more than 1048576 segments of 1 tokens", engine.add_request, PROMPT,
            stars.SamplingParams(max_tokens=(1 << 20) + 1), policy)
    engine.add_request(PROMPT, stars.SamplingParams(max_tokens=1 << 20), policy)  # is queued, and never run here


# -- max_tokens=None ------------------------------------------------------------------------------------------------

def test_no_max_tokens_means_what_the_context_leaves():
    engine = toy_engine(LM, stars.FunctionReward(lambda prompt, responses: [0.0] * len(responses), inputs="ids"))
    params = stars.SamplingParams(max_tokens=None, ignore_eos=True, seed=5)
    policy = stars.STARS(segment_size=16, beta=0.0, alpha=0.0, reward_threshold=62.0, max_attempts=2, width=1)
    for prompt in ([1, 2], [1] * 63):
        [output] = engine.generate({"prompt_token_ids": prompt}, params, policy, use_tqdm=False)
        completion, room = output.outputs[0], 64 - len(prompt)
        assert len(completion.token_ids) == room and completion.finish_reason == "length"
        same = engine.generate({"prompt_token_ids": prompt}, stars.SamplingParams(
            max_tokens=room, ignore_eos=True, seed=5), policy, use_tqdm=False)[0].outputs[0]
        assert same.token_ids == completion.token_ids
        # N of the schedule is that number, too: r0 = 0 here, so that tau(n) = n / N * 62.
        assert completion.segments[0].threshold == pytest.approx(min(16, room) / room * 62.0, rel=1e-12)
    refused(stars.RequestError, "the prompt of 64 tokens leaves no room for a response, the limit is 64",
            engine.add_request, {"prompt_token_ids": [1] * 64}, params)
    assert params.max_tokens is None  # what the user holds is not changed


# -- names ----------------------------------------------------------------------------------------------------------

class Kind(enum.Enum):
    """As vLLM's RequestOutputKind."""

    CUMULATIVE = 0
    DELTA = 1


@pytest.mark.parametrize("name", SAMPLING)
def test_every_sampling_parameter_of_the_list(name):
    """Accepted at its neutral values, where it has some; refused by name at others, whatever they are."""
    for value in SAMPLING[name].neutral:
        if not (name == "output_kind" and value == "CUMULATIVE"):
            assert stars.SamplingParams(**{name: value}) == stars.SamplingParams()
    for value in (7, "x", [3], {1: 2.0}, np.zeros(3), Unprintable(), Kind.DELTA):
        refused(stars.RequestError, name, stars.SamplingParams, **{name: value})
    assert name not in inspect.signature(stars.SamplingParams).parameters


@pytest.mark.parametrize("name", ENGINE)
def test_every_engine_argument_of_the_list(name):
    refused(stars.RequestError, f"Engine{'.' if ENGINE[name].neutral else ' has no parameter '}"
            f"{name if ENGINE[name].neutral else repr(name)}", toy_engine, LM, **{name: object()})
    for value in ENGINE[name].neutral[:1]:
        assert toy_engine(LM, **{name: value}).config == toy_engine(LM).config


def test_vllms_fields_are_all_known():
    """As of vLLM 0.31, internal ones left out: each is implemented or in the list."""
    fields = ("n presence_penalty frequency_penalty repetition_penalty temperature top_p top_k min_p seed stop "
              "stop_token_ids ignore_eos max_tokens min_tokens logprobs prompt_logprobs prompt_logprob_token_ids "
              "prompt_logprob_start logprob_token_ids flat_logprobs detokenize skip_special_tokens "
              "spaces_between_special_tokens include_stop_str_in_output output_kind stream_interval skip_clone "
              "output_text_buffer_length structured_outputs logit_bias allowed_token_ids extra_args bad_words "
              "skip_reading_prefix_cache thinking_token_budget repetition_detection routed_experts_prompt_start "
              "trace_decode_token_ids best_of guided_decoding logits_processors truncate_prompt_tokens").split()
    known = {*inspect.signature(stars.SamplingParams).parameters, *SAMPLING}
    assert [name for name in fields if name not in known] == []


@pytest.mark.parametrize("call, given, message", [
    (stars.SamplingParams, "max_token", "did you mean max_tokens?"),
    (stars.SamplingParams, "max_new_tokens", "it is called max_tokens"),
    (stars.SamplingParams, "topk", "did you mean top_k?"),
    (stars.SamplingParams, "zzz", "there are temperature, top_k,"),
    (stars.STARS, "reward_treshold", "did you mean reward_threshold?"), (stars.BestOfN, "k", "there are n"),
    (stars.CARDS, "entropy_treshold", "did you mean entropy_threshold?"),
    (stars.BlockwiseBestOfK, "segmentsize", "did you mean segment_size?"), (stars.Sample, "scores", "mean score?"),
    (lambda **given: toy_engine(LM, **given), "max_model_length", "did you mean max_model_len?"),
    (stars.SamplingParams, "guided_json", 'give structured_outputs={"json": ...}'),
    (stars.SamplingParams, "guided_regex", 'give structured_outputs={"regex": ...}'),
    (stars.SamplingParams, "guided_choice", 'give structured_outputs={"choice": ...}'),
    (stars.SamplingParams, "guided_grammar", 'give structured_outputs={"grammar": ...}'),
    (stars.SamplingParams, "response_format", 'give structured_outputs={"json": SCHEMA}'),
    (lambda **given: toy_engine(LM, **given), "tensor_parallel_size", "one process for each GPU"),
])
def test_names_that_are_not_there(call, given, message):
    refused(stars.RequestError, message, call, **{given: 3})


def test_neutral_values_are_told_by_type():
    assert asks_for_nothing(Kind.CUMULATIVE, ("CUMULATIVE",)) and not asks_for_nothing(Kind.DELTA, ("CUMULATIVE", 1))
    assert not asks_for_nothing(False, (0, None)) and not asks_for_nothing(np.zeros(2), (None, 0))
    assert asks_for_nothing({}, Absent((None, {}), "").neutral) and asks_for_nothing(0.0, (0,))
    assert asks_for_nothing(np.int64(0), (0,)) and asks_for_nothing(np.bool_(False), (False,))
    assert not asks_for_nothing(np.bool_(False), (0,)) and not asks_for_nothing(np.float32(0.5), (0,))


def test_the_constructor_keeps_its_signature_and_pickles():
    assert list(inspect.signature(stars.STARS).parameters) == [
        "segment_size", "max_attempts", "alpha", "beta", "reward_threshold", "width", "exhaust", "barrier"]
    params = stars.SamplingParams(0.5, 3, max_tokens=None, stop="x")
    assert pickle.loads(pickle.dumps(params)) == params and params.temperature == 0.5


# -- models, rewards, tokenizers ------------------------------------------------------------------------------------

class Pretrained(torch.nn.Linear):
    """Stands for a model or tokenizer of transformers: it has a method to write it."""

    def __init__(self):
        super().__init__(1, 1)

    def save_pretrained(self, directory):
        raise AssertionError("is only told by its presence")


@pytest.mark.parametrize("given, message", [
    ("meta-llama/Llama-3.1-8B", "run `hf download meta-llama/Llama-3.1-8B --local-dir DIR` and give DIR"),
    ("gpt2", "only names such as org/gpt2 are downloaded from the Hugging Face hub: give that one, or run `hf download "
             "gpt2 --local-dir DIR` and give DIR"), ("/models/x.Q4_K_M.gguf", "is not there"),
    (PAIR / "lm" / "model.safetensors", "is a file: give the directory that holds it"),
    ("/nowhere/model.safetensors", "give the one with config.json"), ("/nowhere/else", "is not a directory: give the "),
    (Pretrained(), "is a Pretrained of transformers, and only directories are loaded: write it with save_pretrained"),
    (torch.nn.Linear(1, 1), "is a Linear of torch"), (stars.Engine, "is Engine, it must be"), (b"x", "is bytes"),
    ("a\0b", "is not a directory"), ("x" * 5000, "x"),
])
def test_what_is_given_for_a_model(given, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for error, call in ((stars.ModelError, lambda: stars.Engine(given)),
                        (stars.ModelError if isinstance(given, (str, Path)) else stars.RewardError,
                         lambda: toy_engine(LM, given)),
                        (stars.TokenizerError, lambda: toy_engine(LM, tokenizer=given))):
        if call.__code__.co_names[0] == "toy_engine" and not hasattr(given, "save_pretrained") and callable(given):
            continue  # a callable is a reward
        with pytest.raises(error) as caught:
            call()
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_given_inside_a_reward(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(stars.ModelError, "run `hf download org/rm --local-dir DIR`", stars.CausalReward, "org/rm")
    refused(stars.ModelError, "run `hf download org/rm --local-dir DIR`", stars.EncoderReward, "org/rm")
    refused(stars.RewardError, "is a Pretrained of transformers", toy_engine, LM, stars.CausalReward(Pretrained()))


def test_a_tokenizer_by_its_path(tmp_path):
    ids = stars.Engine(PAIR / "lm", cache_tokens=64).tokenizer.encode("This film was")
    for given in (PAIR / "rm", str(PAIR / "rm"), PAIR / "rm" / "tokenizer.json"):
        engine = stars.Engine(PAIR / "lm", tokenizer=given, cache_tokens=64)
        assert engine.tokenizer.encode("This film was") == ids == [1, 967, 347, 338]
    refused(stars.TokenizerError, "has no tokenizer.json", toy_engine, LM, tokenizer=tmp_path)
    refused(stars.TokenizerError, "tokenizer is int", toy_engine, LM, tokenizer=3)
    refused(stars.TokenizerError, "is a tokenizers.Tokenizer, and only directories are loaded", toy_engine, LM,
            tokenizer=tokenizers.Tokenizer.from_file(str(PAIR / "lm" / "tokenizer.json")))


@pytest.mark.parametrize("given, name", [
    (torch.float32, "float32"), (torch.bfloat16, "bfloat16"), ("bf16", "bfloat16"), ("float", "float32"),
    ("auto", "auto")])
def test_names_of_dtypes(given, name):
    assert EngineConfig.resolve(LM.config, dtype=given, device=torch.device("cpu")).dtype == name


@pytest.mark.parametrize("given", ["half", torch.float16, "int8", torch.int8, [1], None, np.float32, 32])
def test_dtypes_that_the_cpu_has_not(given):
    refused(stars.RequestError, "dtype is ", EngineConfig.resolve, LM.config, dtype=given)
    refused(stars.RequestError, "device is ", EngineConfig.resolve, LM.config, device=given)
    refused(stars.RequestError, "deterministic is ", EngineConfig.resolve, LM.config, deterministic=given)
    if not isinstance(given, str):
        refused(stars.RequestError, "prefill_backend is ", EngineConfig.resolve, LM.config, prefill_backend=given)


@pytest.mark.parametrize("given, message", [
    ([{"role": "user", "content": "x"}], 'a bare list of messages: give {"messages": [...]}'),
    ([{"role": "system"}, {"role": "user"}], 'a bare list of messages: give {"messages": [...]}'),
    ({"role": "user", "content": "x"}, 'a single message: give {"messages": [...]}'),
    ([1, 2], 'a bare list of token ids: give {"prompt_token_ids": [...]}'),
    ((np.int64(3),), 'a bare list of token ids: give {"prompt_token_ids": [...]}'),
])
def test_prompts_without_their_dictionary(given, message):
    engine = toy_engine(LM)
    for call in (engine.generate, engine.add_request, engine.stream, engine.calibrate):
        refused(stars.RequestError, message, call, given)
    refused(stars.RequestError, f"prompts[1]: the prompt is {message}", engine.generate, [PROMPT, given],
            stars.SamplingParams(max_tokens=4))
    assert not engine.has_unfinished_requests()


def test_arguments_of_calls():
    engine = toy_engine(LM)
    for value in (HUGE, "x", None, -0.1, math.nan):
        refused(stars.RequestError, "quantile is ", engine.calibrate, PROMPT, quantile=value)
    refused(stars.RequestError, "request_id is list", engine.add_request, PROMPT,
            stars.SamplingParams(max_tokens=4), request_id=["a"])


# -- what calls refuse before anything is queued --------------------------------------------------------------------

def test_calibrate_says_what_it_lacks():
    with_reward = toy_engine(LM, stars.FunctionReward(lambda prompt, responses: [0.0] * len(responses), inputs="ids"))
    refused(stars.RequestError, "calibrate needs a reward", toy_engine(LM).calibrate, PROMPT)
    refused(stars.RequestError, "there are no prompts to calibrate on", with_reward.calibrate, [])
    refused(stars.RequestError, "sampling_params is dict, it must be", with_reward.calibrate, PROMPT, {"seed": 1})
    refused(stars.RequestError, "num_samples is 0", with_reward.calibrate, PROMPT, num_samples=0)
    assert with_reward.calibrate([PROMPT], stars.SamplingParams(max_tokens=2, seed=1), num_samples=2) == 0.0


@pytest.mark.parametrize("value", [None, 1.5, object(), [None], [["a"]]])
def test_abort_of_what_is_no_id(value):
    refused(stars.RequestError, "a request id is a string, and ", toy_engine(LM).abort, value)
    for nobody in ([], {}, set(), "a", ["a", 1]):
        assert toy_engine(LM).abort(nobody) is False


def test_numbers_that_cannot_be_printed_and_flags_as_ids():
    engine = toy_engine(LM)
    refused(stars.RequestError, "that cannot be printed make a value", engine.generate, PROMPT,
            stars.SamplingParams(max_tokens=10**5000))
    for value in (True, 10**5000):
        refused(stars.RequestError, f"request_id is {type(value).__name__}, it must be a string", engine.add_request,
                PROMPT, stars.SamplingParams(max_tokens=4), request_id=value)
    refused(stars.RequestError, "must be a list of integers", engine.add_request, {"prompt_token_ids": [1, True]})
    assert not engine.has_unfinished_requests()


def test_a_policy_that_cannot_be_asked_for_its_plan():
    class Lazy:
        @property
        def plan(self):
            raise RuntimeError("not yet")

    refused(stars.RequestError, "Lazy.plan() raised RuntimeError: not yet", plan_of, Lazy())
    refused(stars.RequestError, "policy is the class STARS: give an object such as stars.STARS(", plan_of, stars.STARS)
    refused(stars.RequestError, "policy is int, it must be an object", plan_of, 5)


@pytest.mark.parametrize("build, message", [
    (lambda: stars.EncoderReward("rm", label="a"), "EncoderReward.label is 'a', it must be an integer of at least 0"),
    (lambda: stars.EncoderReward("rm", label=[]), "EncoderReward.label is []"),
    (lambda: stars.EncoderReward("rm", label=True), "EncoderReward.label is True"),
    (lambda: stars.EncoderReward("rm", inputs=[]), "EncoderReward.inputs is []"),
    (lambda: stars.EncoderReward(5), "EncoderReward.model is 5, it must be a model directory"),
    (lambda: stars.EncoderReward(None), "EncoderReward.model is None"),
    (lambda: stars.CausalReward(5), "CausalReward.model is 5, it must be a model directory"),
    (lambda: stars.CausalReward("rm", tokenizer=5), "CausalReward.tokenizer is 5"),
    (lambda: stars.FunctionReward(stars.CausalReward), "not the class CausalReward"),
    (lambda: toy_engine(LM, stars.FunctionReward), "reward is the class FunctionReward: give an object of it"),
])
def test_rewards_are_refused_when_they_are_made(build, message):
    refused(stars.RewardError, message, build)


def test_async_rewards_are_refused():
    async def reward(prompt, responses):
        return [0.0] * len(responses)

    class Own:
        async def __call__(self, prompt, responses):
            return [0.0] * len(responses)

    for fn in (reward, Own(), functools.partial(reward, 1)):
        refused(stars.RewardError, "this one is async", stars.FunctionReward, fn)


@pytest.mark.parametrize("given", [None, 0.5, "0.5", np.float64(0.5), np.array(0.5)])
def test_what_a_reward_function_returns_in_place_of_a_list(given):
    engine = toy_engine(LM, stars.FunctionReward(lambda prompt, responses: given, inputs="ids"))
    [output] = engine.generate(PROMPT, stars.SamplingParams(max_tokens=2, seed=1), stars.Sample(score=True),
                               use_tqdm=False)
    said = f"the reward function returned {'None' if given is None else shown(bare(given))} where a list of 1 float is "
    assert output.outputs[0].error == said + "expected"


def test_a_reward_functions_exception_is_logged_with_its_place(caplog):
    def broken(prompt, responses):
        return responses[99]

    engine = toy_engine(LM, stars.FunctionReward(broken, inputs="ids"))
    engine.generate(PROMPT, stars.SamplingParams(max_tokens=2, seed=1), stars.Sample(score=True), use_tqdm=False)
    assert "the reward function raised IndexError" in caplog.text and "in broken" in caplog.text


def test_numbers_of_no_dimension():
    assert stars.SamplingParams(
        temperature=torch.tensor(0.5), top_k=torch.tensor(3), n=np.array(2), max_tokens=torch.tensor(9),
        ignore_eos=torch.tensor(True), seed=np.array(4)) == stars.SamplingParams(
        temperature=0.5, top_k=3, n=2, max_tokens=9, ignore_eos=True, seed=4)
    assert stars.SamplingParams(seed=-1).seed is None and stars.SamplingParams(seed=-2).seed == -2


@pytest.mark.parametrize("given", [{"seed": 0}, {"max_logprobs": 20}, {"swap_space": 4}, {"swap_space": 4.0},
                                   {"enable_sleep_mode": False}, {"disable_log_requests": True},
                                   {"logprobs_mode": None}, {"worker_cls": "auto"},
                                   {"enforce_eager": np.bool_(False)}, {"tensor_parallel_size": np.int64(1)}])
def test_defaults_of_others_ask_for_nothing(given):
    assert toy_engine(LM, **given).config == toy_engine(LM).config


def test_log_probabilities_are_not_vllms_raw_ones():
    for mode in ("raw_logprobs", "processed_logprobs"):
        refused(stars.RequestError, "Engine.logprobs_mode is not implemented: log-probabilities are of what a token is "
                "drawn from", toy_engine, LM, logprobs_mode=mode)


def test_keywords_that_belong_elsewhere():
    engine = toy_engine(LM)
    for name in (field.name for field in dataclasses.fields(stars.SamplingParams)):
        for call in (engine.generate, engine.stream, engine.add_request):
            refused(stars.RequestError, f"{call.__name__} has no parameter '{name}': give SamplingParams({name}=...)",
                    call, PROMPT, **{name: 1})
    refused(stars.RequestError, 'give {"prompt_token_ids": [...]} as the prompt', engine.generate,
            prompt_token_ids=[[1, 2]])
    refused(stars.RequestError, "did you mean sampling_params?", engine.generate, PROMPT, sampling_param=None)
    refused(stars.RequestError, "give its directory as the model, as one of models={NAME: DIR} or as the "
            "reward", engine.generate, PROMPT,
            lora_request=object())
    for name in ("guided_json", "response_format"):
        refused(stars.RequestError, f"generate has no parameter '{name}': give SamplingParams(structured_outputs=...)",
                engine.generate, PROMPT, **{name: {}})
    params = stars.SamplingParams(max_tokens=2, seed=1)
    assert len(engine.generate(PROMPT, params, use_tqdm=False, lora_request=None)) == 1
    refused(stars.RequestError, "stream takes one prompt", engine.stream, ["x", "y"])
    assert not engine.has_unfinished_requests()


# -- what is shown and logged ---------------------------------------------------------------------------------------

def test_short_representations():
    reward = stars.FunctionReward(lambda prompt, responses: [float(len(r)) for r in responses], inputs="ids")
    engine = toy_engine(LM, reward)
    params = stars.SamplingParams(max_tokens=48, n=3, seed=1, ignore_eos=True)
    policy = stars.STARS(segment_size=16, reward_threshold=60.0, max_attempts=5)
    assert "0 running, 0 waiting" in repr(engine)
    engine.add_request(PROMPT, params, policy)
    assert "requests: 0 running, 1 waiting" in repr(engine)
    engine.step()
    assert "requests: 1 running, 0 waiting" in repr(engine)
    output = None
    while engine.has_unfinished_requests():
        for output in engine.step():
            pass
    completion = output.outputs[0]
    assert len(completion.segments) == 3
    for value, facts in ((engine, ("llama: 2 layers, hidden 16, vocabulary 5", "reward FunctionReward", "cpu, float32",
                                   "max_model_len 64")),
                         (completion, ("index=0", "48 tokens", "finish_reason='length'", "reward=48", "3 segments")),
                         (completion.segments[1], ("Segment(16 tokens, reward=32, threshold=", "attempts)")),
                         (completion.segments[0].attempts[0], ("Attempt(16 tokens, reward=16, ", "accepted="))):
        assert all(fact in repr(value) for fact in facts), repr(value)
        assert len(repr(value)) < 500
    assert len(repr(output)) < 1000 and "2 prompt tokens, finished=True, seed=1, policy=STARS" in repr(output)
    many = stars.RequestOutput("x" * 999, "y" * 999, [1] * 999, [completion] * 99, False, 1, policy)
    assert len(repr(many)) < 1500 and "… 96 more" in repr(many) and repr(stars.Engine.__new__(stars.Engine))
    failed = stars.CompletionOutput(0, text=None, finish_reason="error", error="z" * 9999)
    assert "error='zzz" in repr(failed) and len(repr(failed)) < 500


def test_one_warning_of_failed_requests(caplog):
    def reward(prompt, responses):
        if prompt == [2, 2]:
            raise ZeroDivisionError("no opinion")
        return [0.0] * len(responses)

    engine = toy_engine(LM, stars.FunctionReward(reward, inputs="ids"))
    params, policy = stars.SamplingParams(max_tokens=4, n=2, seed=1), stars.STARS(4, 2, reward_threshold=0.0)
    prompts = [{"prompt_token_ids": ids} for ids in ([1, 2], [2, 2], [3], [2, 2])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = engine.generate(prompts, params, policy, use_tqdm=False)
        engine.generate(prompts[0], params, policy, use_tqdm=False)
    [warning] = caught
    assert str(warning.message) == ("2 of 4 requests ended with an error, the first: the reward function raised "
                                    "ZeroDivisionError: no opinion")
    assert warning.filename == __file__ and [o.outputs[0].error is None for o in outputs] == [True, False, True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # which must not cost the outputs of the others: it is logged then
        again = engine.generate(prompts, params, policy, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in outputs]
    assert "2 of 4 requests ended with an error" in caplog.text
    assert not engine.has_unfinished_requests()
    engine.check_integrity()


def test_log_lines(caplog):
    assert [type(handler) for handler in logging.getLogger("stars").handlers] == [logging.NullHandler]
    with caplog.at_level(logging.INFO, "stars"):
        stars.Engine(PAIR / "lm", cache_tokens=64)
    [record] = [record for record in caplog.records if record.name == "stars.engine"]
    assert record.levelno == logging.INFO and "cache_tokens 64" in record.message and str(PAIR / "lm") in record.message


def test_only_the_command_line_prints():
    """The library says nothing by itself: errors are raised, warnings warned, lines logged."""
    printing = set()
    for path in [*PACKAGE.rglob("*.py"), *Path(stars.kernels.__file__).parent.rglob("*.py"),
                 *Path(stars.bindings.__file__).parent.rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf8"))
        if any(isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
               for node in ast.walk(tree)):
            printing.add(path.name if path.parent.name != "cli" else "cli")
    assert printing == {"cli", "demo.py", "compile_check.py", "wheels.py"}


def test_a_plan_is_no_policy():
    """A plan is a tuple, and is not taken for a list of policies."""
    engine = toy_engine(LM)
    for prompts in (PROMPT, [PROMPT] * 6):
        with pytest.raises(stars.RequestError, match="policy is Plan, it must be an object such as"):
            engine.generate(prompts, policy=stars.Sample().plan(), use_tqdm=False)
