"""Bad input: a named exception, one sentence, the culprit in it, and what to do. Nothing is begun, nothing leaks."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import stars
from stars.errors import RequestError
from stars.model.checkpoint import Checkpoint
from stars.proposer import NAN_LOGITS
from toy import ToyModel, ids, table_reward, toy_engine

LM = ToyModel(vocab=5, seed=1, layers=1, positions=64)
REWARD = table_reward(seed=3)
PROMPT = {"prompt_token_ids": ids(7, seed=1)}
KINDS = {torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.uint8: "U8"}
POLICY = stars.STARS(segment_size=3, max_attempts=3, reward_threshold=1.5)


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture()
def engine():
    made = toy_engine(LM, stars.FunctionReward(lambda prompt, responses: [REWARD(r) for r in responses], inputs="ids"),
                      cache_tokens=128, max_num_seqs=3)
    yield made
    made.check_integrity()
    assert made._cache.num_free_pages == made._cache.num_pages and not made.has_unfinished_requests()


def one_sentence(text: str) -> None:
    """No line breaks, no full stop inside or at the end, and a culprit or a remedy behind a comma or a colon."""
    assert text and "\n" not in text and not re.search(r"\. [A-Z]", text) and not text.endswith("."), text


def refused(error: type, message: str, call, *args, **kwargs) -> None:
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert message in str(caught.value)
    one_sentence(str(caught.value))
    assert isinstance(caught.value, stars.StarsError)


@pytest.mark.parametrize("options, message", [
    (dict(temperature=-0.1), "SamplingParams.temperature is -0.1"),
    (dict(temperature=math.nan), "SamplingParams.temperature is nan"),
    (dict(temperature=math.inf), "SamplingParams.temperature is inf"),
    (dict(top_k=-2), "SamplingParams.top_k is -2"),
    (dict(top_k=1.5), "SamplingParams.top_k is 1.5"),
    (dict(top_p=0.0), "SamplingParams.top_p is 0.0"),
    (dict(top_p=1.1), "SamplingParams.top_p is 1.1"),
    (dict(min_p=-0.1), "SamplingParams.min_p is -0.1"),
    (dict(presence_penalty=2.1), "SamplingParams.presence_penalty is 2.1, it must be between -2 and 2"),
    (dict(frequency_penalty=math.nan), "SamplingParams.frequency_penalty is nan"),
    (dict(frequency_penalty="1"), "SamplingParams.frequency_penalty is '1'"),
    (dict(repetition_penalty=0.0), "SamplingParams.repetition_penalty is 0.0, it must be between 0.01 and 100; 1.0"),
    (dict(repetition_penalty=math.inf), "SamplingParams.repetition_penalty is inf"),
    (dict(max_tokens=0), "SamplingParams.max_tokens is 0"),
    (dict(max_tokens="9"), "SamplingParams.max_tokens is '9'"),
    (dict(n=0), "SamplingParams.n is 0"),
    (dict(n=5000), "SamplingParams.n is 5000, the most is 4096"),
    (dict(seed=1 << 64), "SamplingParams.seed is"),
    (dict(seed="x"), "SamplingParams.seed is 'x'"),
    (dict(stop=[""]), "SamplingParams.stop must be"),
    (dict(stop=["a", 3]), "SamplingParams.stop must be"),
    (dict(stop_token_ids=[-1]), "SamplingParams.stop_token_ids must be"),
    (dict(logprobs=-1), "SamplingParams.logprobs is -1, it must be an integer from 0 to 20, the most that is returned"),
    (dict(prompt_logprobs=-1), "SamplingParams.prompt_logprobs is -1, it must be an integer from 0 to 20"),
    (dict(logprobs=21), "SamplingParams.logprobs is 21, it must be an integer from 0 to 20"),
    (dict(logprobs=True), "SamplingParams.logprobs is True"),
    (dict(prompt_logprobs=1.5), "SamplingParams.prompt_logprobs is 1.5"),
    (dict(attempt_logprobs=True), "logprobs is None: give logprobs too"),
    (dict(logit_bias=[1]), "SamplingParams.logit_bias is [1], it must be a dictionary"),
    (dict(logit_bias={-1: 0.0}), "a token id of SamplingParams.logit_bias is -1"),
    (dict(logit_bias={"x": 0.0}), "a token id of SamplingParams.logit_bias is 'x'"),
    (dict(logit_bias={1: 101.0}), "SamplingParams.logit_bias[1] is 101.0, it must be between -100 and 100"),
    (dict(logit_bias={1: math.nan}), "SamplingParams.logit_bias[1] is nan"),
    (dict(min_tokens=-1), "SamplingParams.min_tokens is -1"),
    (dict(min_tokens=9, max_tokens=8), "SamplingParams.min_tokens is 9 and max_tokens 8"),
    (dict(bad_words=[""]), "SamplingParams.bad_words must be a list of strings, none of them empty"),
    (dict(bad_words=[1]), "SamplingParams.bad_words must be a list of strings"),
    (dict(allowed_token_ids=[]), "SamplingParams.allowed_token_ids is empty"),
    (dict(allowed_token_ids=[-3]), "SamplingParams.allowed_token_ids must be a list of token ids"),
    (dict(detokenize="no"), "SamplingParams.detokenize is 'no', it must be True or False"),
    (dict(truncate_prompt_tokens=0), "SamplingParams.truncate_prompt_tokens is 0"),
    (dict(truncate_prompt_tokens=-2), "SamplingParams.truncate_prompt_tokens is -2"),
    (dict(output_kind="all"), "SamplingParams.output_kind is 'all', it must be one of RequestOutputKind.CUMULATIVE"),
    (dict(structured_outputs={}), "StructuredOutputsParams needs exactly one of json, regex, choice"),
    (dict(structured_outputs=3), "SamplingParams.structured_outputs is 3"),
    (dict(structured_outputs={"regex": "a", "choice": ["b"]}), "needs exactly one of json, regex, choice, grammar, "
                                                               "json_object and has regex, choice"),
    (dict(structured_outputs={"choice": []}), "StructuredOutputsParams.choice is []"),
    (dict(structured_outputs={"regexp": "a"}), "did you mean regex?"),
])
def test_sampling_parameters(options, message):
    refused(stars.RequestError, message, stars.SamplingParams, **options)


@pytest.mark.parametrize("name, value", [
    ("logits_processors", [len]), ("guided_decoding", {}), ("flat_logprobs", True), ("stream_interval", 5),
    ("spaces_between_special_tokens", False), ("thinking_token_budget", 5),
])
def test_parameters_of_vllm_that_are_not_here(name, value):
    """Refused by name, never ignored."""
    refused(stars.RequestError, f"SamplingParams.{name} is not implemented", stars.SamplingParams, **{name: value})


@pytest.mark.parametrize("build, message", [
    (lambda: stars.STARS(), "STARS needs a reward_threshold"),
    (lambda: stars.STARS(reward_threshold=math.nan), "STARS needs a reward_threshold"),
    (lambda: stars.STARS(segment_size=0, reward_threshold=1.0), "STARS.segment_size is 0"),
    (lambda: stars.STARS(segment_size=2.0, reward_threshold=1.0), "STARS.segment_size is 2.0"),
    (lambda: stars.STARS(max_attempts=0, reward_threshold=1.0), "STARS.max_attempts is 0"),
    (lambda: stars.STARS(width=0, reward_threshold=1.0), "STARS.width is 0"),
    (lambda: stars.STARS(alpha=1.5, reward_threshold=1.0), "STARS.alpha is 1.5"),
    (lambda: stars.STARS(alpha=math.nan, reward_threshold=1.0), "STARS.alpha is nan"),
    (lambda: stars.STARS(beta=-0.1, reward_threshold=1.0), "STARS.beta is -0.1"),
    (lambda: stars.STARS(beta=math.inf, reward_threshold=1.0), "STARS.beta is inf"),
    (lambda: stars.STARS(beta=math.nan, reward_threshold=1.0), "STARS.beta is nan"),
    (lambda: stars.CARDS(), "CARDS needs a reward_threshold"),
    (lambda: stars.CARDS(option="medium", reward_threshold=1.0),
     "CARDS.option is 'medium', it must be one of soft, hard"),
    (lambda: stars.CARDS(entropy_threshold=-0.1, reward_threshold=1.0), "CARDS.entropy_threshold is -0.1"),
    (lambda: stars.CARDS(min_segment=9, max_segment=8, reward_threshold=1.0),
     "CARDS.min_segment is 9, it must be an integer from 1 to 8"),
    (lambda: stars.BestOfN(0), "BestOfN.n is 0"),
    (lambda: stars.BlockwiseBestOfK(k=0), "BlockwiseBestOfK.k is 0"),
    (lambda: stars.BlockwiseBestOfK(k=()), "BlockwiseBestOfK.k is empty, it must have the candidates of one"),
    (lambda: stars.BlockwiseBestOfK(k=(4, 0)), "BlockwiseBestOfK.k[1] is 0"),
    (lambda: stars.BestOfN(temperature=-1.0), "BestOfN.temperature is -1.0, it must be a finite number, 0 (the best)"),
    (lambda: stars.RejectionSampling(), "RejectionSampling needs a reward_threshold, which depends on the reward"),
    (lambda: stars.RejectionSampling(1.0, exhaust="worst"), "RejectionSampling.exhaust is 'worst', it must be one of"),
    (lambda: stars.SpeculativeRejection(alpha=1.0), "SpeculativeRejection.alpha is 1.0, it must be at least 0"),
    (lambda: stars.ParticleFilter(beta=0), "ParticleFilter.beta is 0, it must be a finite number above 0"),
    (lambda: stars.ParticleFilter(particles=1025), "ParticleFilter.particles is 1025, it must be an integer from 1"),
    (lambda: stars.ParticleFilter(resampling="residual"),
     "ParticleFilter.resampling is 'residual', it must be one of multinomial, systematic"),
    (lambda: stars.ParticleFilter(final="last"), "ParticleFilter.final is 'last', it must be one of best, sample"),
    (lambda: stars.STARS(reward_threshold=1.0, width=2, barrier=True),
     "STARS.width is 2 and barrier=True draws one candidate a round: leave the width out"),
    (lambda: stars.STARS(reward_threshold=1.0, barrier=1), "STARS.barrier is 1, it must be True or False"),
    (lambda: stars.BlockwiseBestOfK(segment_size=True), "BlockwiseBestOfK.segment_size is True"),
])
def test_policies(build, message):
    refused(stars.RequestError, message, build)


PROMPTS = [
    ("text", "the model has no tokenizer.json"),
    ("", "the prompt is empty"),
    (5, "a prompt is a string or a dictionary, not int"),
    (None, "a prompt is a string or a dictionary, not NoneType"),
    ({"prompt_token_ids": []}, "the prompt is empty"),
    ({"prompt_token_ids": [1, 5]}, "prompt token id 5 is outside the model's vocabulary of 5"),
    ({"prompt_token_ids": [-1]}, "prompt token id -1 is outside the model's vocabulary of 5"),
    ({"prompt_token_ids": [10**20]}, "outside the model's vocabulary of 5"),
    ({"prompt_token_ids": ["a"]}, "prompt_token_ids must be a list of integers"),
    ({"prompt_token_ids": [1.5]}, "prompt_token_ids must be a list of integers"),
    ({"prompt_token_ids": 7}, "prompt_token_ids must be a list of integers"),
    ({"messages": []}, "messages must be a non-empty list"),
    ({"messages": [{"role": "user", "content": "x"}]}, "the model has no chat template"),
    ({"messages": "x"}, "messages must be a non-empty list"),
    ({}, "needs exactly one of"),
    ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "needs exactly one of"),
    ({"prompt": None, "messages": None}, "needs exactly one of"),
    ({"prompt_token_ids": [True]}, "must be a list of integers"),
    ({"prompt_token_ids": [1], "image": 3}, 'does not take "image"'),
    ({"prompt_token_ids": [1] * 50}, "the prompt of 50 tokens and max_tokens=20 make 70, the limit is 64 (the model's "
                                     "context)"),
]


@pytest.mark.parametrize("prompt, message", PROMPTS)
def test_prompts(engine, prompt, message):
    """add_request and stream raise at the call; generate names the index and begins nothing."""
    params = stars.SamplingParams(max_tokens=20)
    refused(stars.RequestError, message, engine.add_request, prompt, params)
    refused(stars.RequestError, message, engine.stream, prompt, params)
    calls = []
    engine.reward.fn = lambda prompt, responses: calls.append(1) or [0.0] * len(responses)
    with pytest.raises(stars.RequestError, match=r"^prompts\[2\]: ") as caught:
        engine.generate([PROMPT, PROMPT, prompt], params, POLICY, use_tqdm=False)
    assert message in str(caught.value) and not calls
    assert not engine.has_unfinished_requests()


def test_requests_as_a_whole(engine):
    """What fits by itself and not together."""
    refused(stars.RequestError, "sampling_params has 1 entries for 2 prompts", engine.generate, [PROMPT] * 2,
            [stars.SamplingParams()])
    refused(stars.RequestError, "policy has 3 entries for 2 prompts", engine.generate, [PROMPT] * 2, None, [POLICY] * 3)
    refused(stars.RequestError, "sampling_params is dict", engine.generate, PROMPT, {"max_tokens": 3})
    refused(stars.RequestError, "policy is str", engine.generate, PROMPT, None, "STARS")
    refused(stars.RequestError, "policy is the class Sample: give an object", engine.add_request, PROMPT, None,
            stars.Sample)
    for policy in (stars.STARS(segment_size=17, reward_threshold=1.0),
                   stars.CARDS(max_segment=17, reward_threshold=1.0)):
        refused(stars.RequestError, "a segment may have 17 tokens and the engine's slabs hold 16", engine.add_request,
                PROMPT, None, policy)
    refused(stars.RequestError, "n times the policy's candidates is 8000", engine.add_request, PROMPT,
            stars.SamplingParams(n=1000, max_tokens=4), stars.BestOfN(8))
    refused(stars.RequestError, "stop strings need a tokenizer", engine.add_request, PROMPT,
            stars.SamplingParams(stop="x"))
    refused(stars.RequestError, "there are 18 EOS and stop token ids, the most is 16", engine.add_request, PROMPT,
            stars.SamplingParams(stop_token_ids=range(1, 18)))
    refused(stars.RequestError, "quantile is 2", engine.calibrate, PROMPT, quantile=2)


def test_without_a_reward():
    engine = toy_engine(LM)
    for policy in (POLICY, stars.Sample(score=True), stars.BestOfN(2), stars.BlockwiseBestOfK(2)):
        refused(stars.RequestError, f"{type(policy).__name__} needs a reward", engine.add_request, PROMPT, None, policy)
    refused(stars.RequestError, "calibrate needs a reward", engine.calibrate, PROMPT)


def test_limits_of_the_cache():
    """Beyond the budget for ever is refused; beyond what is free now waits."""
    engine = toy_engine(LM, stars.CausalReward(ToyModel(vocab=5, head="reward", positions=32).decoder()),
                        cache_tokens=40)
    refused(stars.RequestError, "the limit is 40 (cache_tokens)", engine.add_request, PROMPT,
            stars.SamplingParams(max_tokens=34))
    refused(stars.RequestError, "make 33 tokens for the reward model, whose context is 32", engine.add_request, PROMPT,
            stars.SamplingParams(max_tokens=26), POLICY)
    outputs = engine.generate([PROMPT] * 3, stars.SamplingParams(max_tokens=25), POLICY, use_tqdm=False)
    assert all(output.outputs[0].error is None for output in outputs)


@pytest.mark.parametrize("options, message", [
    (dict(device="cuda:7"), "device is 'cuda:7'"),
    (dict(prefill_backend="sdpa"), "on the CPU there is no choice"), (dict(dtype="int8"), "dtype is 'int8'"),
    (dict(cache_tokens=0), "cache_tokens is 0"), (dict(page_size=-4), "page_size is -4"),
    (dict(gpu_memory_utilization=0.0), "gpu_memory_utilization is 0.0, it must be above 0 and at most 1"),
    (dict(gpu_memory_utilization=1.01), "gpu_memory_utilization is 1.01, it must be above 0 and at most 1"),
    (dict(max_num_lanes=1.5), "max_num_lanes is 1.5"), (dict(max_num_seqs=True), "max_num_seqs is True"),
    (dict(max_model_len=65), "max_model_len is 65, the model's context is 64"),
    (dict(scheduling_policy="random"), "scheduling_policy is not implemented: requests come by priority"),
])
def test_engine_settings(options, message):
    refused(stars.RequestError, message, toy_engine, LM, **options)


def test_models_and_rewards_that_are_none(tmp_path):
    refused(stars.ModelError, "is not a directory", stars.Engine, tmp_path / "nothing")
    refused(stars.ModelError, "has no config.json", stars.Engine, tmp_path)
    refused(stars.ModelError, "model is int", stars.Engine, 3)
    refused(stars.RewardError, "reward is float", toy_engine, LM, 3.0)
    refused(stars.RewardError, "needs a callable", stars.FunctionReward, 3)
    refused(stars.RewardError, "FunctionReward.inputs is 'words'", stars.FunctionReward, len, inputs="words")
    refused(stars.RewardError, "FunctionReward.batch_size is 0", stars.FunctionReward, len, batch_size=0)
    refused(stars.RewardError, 'use FunctionReward(fn, inputs="ids")', toy_engine, LM, lambda prompt, responses: [])
    refused(stars.RewardError, "EncoderReward.inputs is 'both'", stars.EncoderReward, tmp_path, inputs="both")


QUANTISED = [
    ({"quant_method": "awq", "bits": 3, "group_size": 128}, "awq of bits = 3"),
    ({"quant_method": "bitsandbytes"}, "bitsandbytes"), ({"quant_method": "mxfp4"}, "mxfp4"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8 in blocks of [128, 128]"),
    ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
     "compressed-tensors in the format 'nvfp4-pack-quantized'"),
    ({"bits": 3}, "an unnamed method"), ("4 bits", "an unnamed method"),
    ({"quant_method": "a\nb"}, "an unnamed method"),
]


@pytest.mark.parametrize("quantization, method", QUANTISED, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("head", ["lm", "reward"])
def test_a_checkpoint_that_is_quantised_otherwise(tiny_model, copied, monkeypatch, quantization, method, head):
    """In one sentence that names the method, before a weight of either model is read."""
    copy = copied(tiny_model(family="llama", head=head))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    monkeypatch.setattr(Checkpoint, "read", lambda *given: pytest.fail("a tensor was read"))
    models = (copy,) if head == "lm" else (LM.decoder(), copy)
    refused(stars.ModelError, f"is quantised with {method}, which is not supported: use its float32, bfloat16 or "
            "float16 model", stars.Engine, *models, cache_tokens=512)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_a_checkpoint_that_is_quantised_and_does_not_say_so(tiny_model, copied, kind):
    """The type of its tensors is what is refused, or the scales beside them."""
    copy = copied(tiny_model(family="llama"))
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(kind)
    save_file(tensors, copy / "model.safetensors")
    refused(stars.ModelError, f"{name} of {copy} is stored as {KINDS[kind]}, which is not supported: use the float32",
            stars.Engine, copy, cache_tokens=512)
    save_file(tensors | {f"{name}_scale": torch.ones(1)}, copy / "model.safetensors")
    refused(stars.ModelError, f"has 1 tensor ({name}_scale) that a llama model with this config.json does not have",
            stars.Engine, copy, cache_tokens=512)


def test_reward_of_the_prompt_that_is_not_finite(engine):
    """The threshold would start nowhere: an error of that request, which alpha = 1 avoids."""
    for value, message in ((-math.inf, "the reward of the prompt alone is -inf"), (math.nan, "the reward is NaN")):
        engine.reward.fn = lambda prompt, responses: [value if not r else 1.0 for r in responses]  # noqa: B023
        outputs = engine.generate([PROMPT] * 2, stars.SamplingParams(max_tokens=9, seed=1),
                                  [POLICY, stars.STARS(3, 3, 1.0, reward_threshold=0.5)], use_tqdm=False)
        assert outputs[0].outputs[0].finish_reason == "error" and message in outputs[0].outputs[0].error
        one_sentence(outputs[0].outputs[0].error)
        assert outputs[0].outputs[0].token_ids == [] and outputs[1].outputs[0].error is None


def test_logits_that_are_not_numbers():
    """A broken language model ends its requests, with the advice, and leaves the engine's books in order."""
    model = ToyModel(vocab=5, seed=1)
    model.final_norm[3] = math.nan
    engine = toy_engine(model)
    [output] = engine.generate(PROMPT, stars.SamplingParams(max_tokens=9, n=2), use_tqdm=False)
    assert {o.error for o in output.outputs} == {NAN_LOGITS}
    assert {tuple(o.token_ids) for o in output.outputs} == {()}
    engine.check_integrity()
    assert engine._cache.num_free_slabs == engine._cache.num_slabs


def test_an_id_in_use(engine):
    params = stars.SamplingParams(max_tokens=3)
    engine.add_request(PROMPT, params, request_id="a")
    refused(stars.RequestError, "request id 'a' is in use", engine.add_request, PROMPT, params, request_id="a")
    while engine.has_unfinished_requests():
        engine.step()


def test_texts_that_cannot_be_read(tiny_model):
    """Half a surrogate pair is no text."""
    engine = stars.Engine(tiny_model(family="llama", tokenizer=True), cache_tokens=512)
    refused(stars.TokenizerError, "cannot be encoded", engine.add_request, "a\ud800b",
            stars.SamplingParams(max_tokens=3))
    with pytest.raises(stars.RequestError, match=r"^prompts\[0\]: this text cannot be encoded"):
        engine.generate("a\ud800b", stars.SamplingParams(max_tokens=3), use_tqdm=False)


def test_a_tokenizer_of_another_model(tiny_model, copied):
    """Ids beyond the embedding are refused and never read."""
    copy = copied(tiny_model(family="llama"))  # 97 tokens
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model(family="llama", tokenizer=True) / name, copy)
    engine = stars.Engine(copy, cache_tokens=512)
    refused(stars.RequestError, "outside the model's vocabulary of 97: use the tokenizer that belongs to the model",
            engine.add_request, "The quick brown fox", stars.SamplingParams(max_tokens=3))


@pytest.mark.parametrize("name, value", [("stop", 5), ("stop", [""]), ("stop_token_ids", 5), ("stop_token_ids", ["a"]),
                                         ("top_p", "x"), ("min_p", None), ("temperature", "hot"), ("top_k", 1.5),
                                         ("stop_token_ids", [True]), ("temperature", True)])
def test_sampling_values_of_the_wrong_type_are_request_errors(name, value):
    """A wrong type is refused by name like a wrong value, never a bare TypeError from somewhere inside."""
    with pytest.raises(RequestError, match=f"SamplingParams.{name}"):
        stars.SamplingParams(**{name: value})


@pytest.mark.parametrize("name, value", [("reward_threshold", "x"), ("alpha", "x"), ("beta", None), ("alpha", None),
                                         ("width", 1.5), ("segment_size", "8"), ("max_attempts", True)])
def test_policy_values_of_the_wrong_type_are_request_errors(name, value):
    """The same for the parameters of a policy."""
    with pytest.raises(RequestError, match=f"STARS.{name}"):
        stars.STARS(**{"reward_threshold": 1.0, name: value})
