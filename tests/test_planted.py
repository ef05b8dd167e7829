"""Errors that were planted and passed every other test: what each would have changed, in values."""

from __future__ import annotations

import math

import pytest
import torch

import stars
from building import cache_of, config_of, shape_of
from stars import rules as law
from stars.bindings import libstars
from stars.cache import CommitMove, PagedCache
from stars.cli.rows import rows_of_file
from stars.errors import IntegrityError
from stars.kernels.graph import Graphs, Part
from stars.kernels.rms_norm import rms_norm
from stars.model.config import parse_config
from stars.model.rope import inverse_frequencies, parse_rope
from stars.passes import Passes, Span
from stars.sizes import ModelSizes
from stars.stops import find_stop
from stars.width import WidthChooser
from toy import ToyModel, ids, toy_engine


def test_lanes_beyond_the_measured_counts_cost_in_proportion():
    """Of 12 lanes at most, 8 are the most that was measured: 12 and 24 lanes take 1.5 and 3 times as long."""
    chooser = WidthChooser(lambda lanes: 1.0 * lanes, 12)
    # Every lane costs the same, so a second one never pays at an accept rate of a quarter.
    assert [chooser.choose(0, 0, responses, 12) for responses in (1, 3, 12, 24)] == [1, 1, 1, 1]
    # A step that mostly reads weights: 4 lanes of 3 responses take 1 + 0.02 * 8 seconds, times 1.5.
    nearly_free = WidthChooser(lambda lanes: 1.0 + 0.02 * lanes, 12)
    costs = {width: (1.0 + 0.02 * min(3 * width, 8)) * max(1.0, 3 * width / 8) / (1.0 - 0.75**width)
             for width in (1, 2, 3, 4)}
    assert min(costs, key=costs.get) == 3 and nearly_free.choose(0, 0, 3, 4) == 3


def test_a_commit_leaves_no_gap_behind_a_rewind_of_its_own():
    """6 positions, rewound to 3 by the first move: the second may begin at 3 and not at 5."""
    cache = cache_of(shape_of(1, 1, 2), page_size=4, num_pages=4, num_slabs=1, slab_len=4)
    table = cache.open([])
    cache.reserve(table, 8)
    cache.commit([CommitMove(table, 0, 4, 0), CommitMove(table, 0, 2, 4)])
    assert table.length == 6
    with pytest.raises(IntegrityError, match="a commit at 5 leaves a gap after 3 positions"):
        cache.commit([CommitMove(table, 0, 1, 2), CommitMove(table, 0, 1, 5)])
    assert table.length == 6
    cache.commit([CommitMove(table, 0, 1, 2), CommitMove(table, 0, 1, 3)])
    assert table.length == 4


@pytest.mark.parametrize("threshold", [-math.inf, math.inf])
def test_an_infinite_threshold_does_not_ask_for_the_prompts_reward(threshold):
    """r(prompt) cannot change such a threshold: it is neither computed nor reported, and need not be finite."""
    asked = []

    def reward(prompt, responses):
        asked.extend(responses)
        return [math.nan if not response else 1.0 for response in responses]

    engine = toy_engine(ToyModel(seed=3), stars.FunctionReward(reward, inputs="ids"))
    policy = stars.STARS(segment_size=2, max_attempts=2, alpha=0.5, beta=0.5, reward_threshold=threshold, width=1)
    params = stars.SamplingParams(max_tokens=4, seed=1, ignore_eos=True)
    [output] = engine.generate({"prompt_token_ids": [1, 2]}, params, policy, use_tqdm=False)
    assert output.outputs[0].error is None and output.prompt_reward is None
    assert asked and all(asked)
    assert [segment.accepted for segment in output.outputs[0].segments] == [threshold < 0] * 2


@pytest.mark.skipif(not libstars.available(), reason="libstars was not built")
@pytest.mark.parametrize("dtype, arithmetic", [(torch.float32, "float32"), (torch.bfloat16, "float32"),
                                               (torch.bfloat16, "bfloat16")])
def test_what_pads_a_packed_matrix_is_zero(monkeypatch, dtype, arithmetic):
    """33 columns are one panel and one column, 3 inputs a pair and a half: whatever lay in the memory is gone."""
    empty = torch.empty
    matrix = torch.ones(33, 3, dtype=dtype)
    packed = []
    for filling in (0, 255):
        monkeypatch.setattr(torch, "empty", lambda *shape, value=filling, **kind: empty(*shape, **kind).fill_(value))
        packed.append(libstars.pack(matrix, arithmetic).view(dtype))
    assert packed[0].equal(packed[1])
    assert packed[1].count_nonzero() == matrix.numel() < packed[1].numel()


OWN = [
    dict(temperature=0.3), dict(temperature=0.0), dict(top_k=3), dict(top_p=0.4), dict(min_p=0.3), dict(seed=99),
    dict(max_tokens=5), dict(stop_token_ids=[7, 3]), dict(presence_penalty=1.9), dict(frequency_penalty=1.5),
    dict(repetition_penalty=3.0), dict(n=2),
]


def test_every_request_of_a_batch_has_parameters_of_its_own():
    """Beside requests that differ in one parameter each, a request draws what it draws alone; 40 words, 2 prompts."""
    model = ToyModel(vocab=40, seed=8, sharpness=2.0)
    common = dict(seed=5, max_tokens=12, ignore_eos=True)
    params = [stars.SamplingParams(**(common | own)) for own in [{}, *OWN]]
    prompts = [{"prompt_token_ids": [1 + place % 2, 3, 9]} for place in range(len(params))]

    def drawn(prompts, params):
        outputs = toy_engine(model).generate(prompts, params, use_tqdm=False)
        return [[completion.token_ids for completion in output.outputs] for output in outputs]

    alone = [drawn([prompt], [own])[0] for prompt, own in zip(prompts, params, strict=True)]
    for order in (slice(None), slice(None, None, -1)):  # each is behind and before each other
        assert drawn(prompts[order], params[order]) == alone[order]
    # The parameters matter here: all but the second completion of n = 2 differ from the plain request of their prompt.
    plain = [drawn([{"prompt_token_ids": [1 + place, 3, 9]}], [params[0]])[0][0] for place in (0, 1)]
    assert [own[0] == plain[place % 2] for place, own in enumerate(alone)] == [
        place in (0, len(OWN)) for place in range(len(alone))]


def test_the_earliest_stop_string_counts_and_of_two_at_one_place_the_shorter():
    assert find_stop("abcdef", ["ef", "bc"]) == (1, "bc") == find_stop("abcdef", ["bc", "ef"])
    assert find_stop("abcdef", ["bcd", "bc"]) == (1, "bc") == find_stop("abcdef", ["bc", "bcd"])
    assert find_stop("abcabc", ["b"], 2) == (4, "b") == find_stop("abcabc", ["b"], 4)
    assert find_stop("abc", ["x"]) is None


def test_one_engine_in_turn_with_and_without_penalties():
    """What was recorded for the requests before serves none that it was not recorded for."""
    model = ToyModel(vocab=40, seed=8, sharpness=2.0)
    kinds = [{}, dict(presence_penalty=1.9), dict(top_k=3), dict(frequency_penalty=1.5, top_k=3), {}, dict(min_p=0.3)]

    def drawn(engine, own):
        params = stars.SamplingParams(seed=5, max_tokens=12, ignore_eos=True, n=2, **own)
        [output] = engine.generate({"prompt_token_ids": [1, 3, 9]}, params, use_tqdm=False)
        return [completion.token_ids for completion in output.outputs]

    used = toy_engine(model)
    for own in kinds + kinds[::-1]:
        assert drawn(used, own) == drawn(toy_engine(model), own)
    assert len({str(drawn(used, own)) for own in kinds}) == 5  # all but the two plain ones differ


@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_recorded_step_runs_as_often_as_asked(operations, times):
    """Recorded in its first run, replayed in the others, ended early where all is done; a residual stream counts."""
    graphs, done = Graphs(), torch.zeros(3, dtype=torch.int32)
    ones, out, residual = torch.ones(1, 8), torch.zeros(1, 8), torch.zeros(1, 8)

    def step() -> None:
        rms_norm(ones, torch.ones(8), 1e-6, out, residual)

    for run in (1, 2, 3):
        assert graphs.run([Part("shape", step)], done, times) == times
        assert residual.tolist() == [[float(run * times)] * 8]
    done[:] = 1
    assert graphs.run([Part("shape", step)], done, times) == 1 and residual[0, 0] == 3 * times + 1


def test_a_prompt_that_just_fits_and_what_of_it_was_cached():
    """Of 11 prompt tokens 10 are history, two pages of 4 of them full: those the second request finds."""
    engine = toy_engine(ToyModel(seed=3, positions=32))
    assert engine.config.max_model_len == 32
    prompt = {"prompt_token_ids": [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3]}
    fits = stars.SamplingParams(max_tokens=21, n=2, ignore_eos=True, seed=1)
    for cached in (0, 8):
        [output] = engine.generate(prompt, fits, use_tqdm=False)
        assert [len(completion.token_ids) for completion in output.outputs] == [21, 21]
        assert [completion.metrics.prompt_tokens_cached for completion in output.outputs] == [cached, 8]
    with pytest.raises(stars.RequestError, match="make 33, the limit is 32"):
        engine.generate(prompt, stars.SamplingParams(max_tokens=22), use_tqdm=False)


def test_more_spans_than_a_pass_holds_are_scored_in_several():
    """Two sequences and so many rows a pass: five spans of one table, each with the reward it has alone."""
    model = ToyModel(seed=4, head="reward")
    decoder, prompt = model.decoder(), [1, 2, 3, 4, 2]
    config = config_of(cache_tokens=32, page_size=4)
    sizes = ModelSizes(num_slabs=5, slab_len=8, max_sequences=2, max_positions=32, max_lanes=0)
    cache = PagedCache(decoder.config, config, sizes, decoder.dtype)
    passes = Passes(decoder, cache, config, sizes)
    table = cache.open(prompt)
    passes.prefill([(table, prompt, len(prompt))])
    responses = [[1], [2, 3], [4, 4, 1], [3], [2, 1, 1, 4]]
    spans = [Span(table, response, len(prompt), range(8 * slab, 8 * slab + len(response)))
             for slab, response in enumerate(responses)]
    for reward, response in zip(passes.score(spans), responses, strict=True):
        assert reward == pytest.approx(model.reward(prompt + response), abs=1e-4)
    most = passes.max_rows
    assert passes.fits([most]) and passes.fits([most - 1, 1])
    assert not passes.fits([most + 1]) and not passes.fits([most, 1]) and not passes.fits([1, 1, 1])


LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=4096)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("parameters", [
    dict(rope_type="linear", rope_theta=10000.0, factor=2.5), LLAMA3, LLAMA3 | dict(low_freq_factor=0.5, factor=32.0),
    YARN, YARN | dict(truncate=False), YARN | dict(attention_factor=0.7), YARN | dict(beta_fast=20.0, beta_slow=3.0),
    YARN | dict(mscale=0.8, mscale_all_dim=0.4), YARN | dict(mscale=1.0, mscale_all_dim=1.0, truncate=False),
])
def test_scaled_rotations_have_the_bits_of_transformers(parameters, head_dim):
    """At the sizes of real models, where wavelengths lie on both sides of every limit and between."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_parameters=parameters,
                         max_position_embeddings=int(parameters["factor"] * 8192))
    expected, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    rope = parse_rope({"rope_parameters": parameters}, config.max_position_embeddings, "here")
    ours, our_scale = inverse_frequencies(rope, head_dim)
    assert torch.equal(ours, expected) and our_scale == scale


def test_what_a_configuration_says_of_ends_and_labels():
    """EOS ids of both files count, each once, in the order of the files; labels are 2 where nothing is said."""
    config = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 1, "intermediate_size": 8, "max_position_embeddings": 16}

    def parsed(generation, **more):
        return parse_config(config | more, generation, "here")

    assert parsed({"eos_token_id": [5, 2]}, eos_token_id=2).eos_token_ids == (2, 5)
    assert parsed({"eos_token_id": 5}).eos_token_ids == (5,) and parsed({}, eos_token_id=[3, 2]).eos_token_ids == (3, 2)
    said = ({}, {"num_labels": 1}, {"id2label": {"0": "reward"}}, {"id2label": {"0": "a", "1": "b", "2": "c"}})
    assert [parsed({}, **more).num_labels for more in said] == [2, 1, 1, 3]


def test_a_row_at_fault_is_named_by_its_line_in_the_file(tmp_path):
    """Blank lines are lines, and not rows."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('\n"one"\n\n{"prompt": 5}\n  \n\n"two"\nno JSON\n')
    rows = rows_of_file(str(path), False)
    assert [(row.index, row.prompt) for row in rows if row.error is None] == [(0, "one"), (2, "two")]
    failed = [row for row in rows if row.error is not None]
    assert [row.index for row in failed] == [1, 3]
    assert failed[0].error.startswith(f"{path}: line 4") and failed[1].error.startswith(f"{path}: line 8")


@pytest.mark.parametrize("reward, tau, beta, probability", [
    (1.5, 1.5, 0.0, 1.0), (math.nextafter(1.5, 0.0), 1.5, 0.0, 0.0), (2.0, 1.5, 0.0, 1.0),  # the hard rule, at its edge
    (1.5, 1.5, 0.7, 1.0), (9.0, 1.5, 0.7, 1.0), (0.8, 1.5, 0.7, math.exp(-1.0)),
    (-math.inf, -math.inf, 0.7, 0.0), (-math.inf, -math.inf, 0.0, 0.0), (-9.0, -math.inf, 0.0, 1.0),
    (9.0, math.inf, 0.0, 0.0), (9.0, math.inf, 0.7, 0.0),
])
def test_the_reported_probability_is_that_of_the_test(reward, tau, beta, probability):
    assert law.accept_probability(reward, tau, beta) == pytest.approx(probability, rel=1e-12)
    uniforms = [2.0**-25, 0.3, 0.4, 1.0 - 2.0**-25]
    assert [law.accepts(uniform, reward, tau, beta) for uniform in uniforms] == [u < probability for u in uniforms]


def most_probable(model: ToyModel, prompt: list[int], count: int, repetition=1.0, frequency=0.0, presence=0.0) -> list:
    """The most probable tokens one after the other, penalties as vLLM defines them, in float64 by hand."""
    drawn: list[int] = []
    for _ in range(count):
        logits = model.logits([*prompt, *drawn]).copy()
        for token in {*prompt, *drawn}:
            logits[token] *= repetition if logits[token] < 0 else 1 / repetition
            logits[token] -= frequency * drawn.count(token) + presence * (token in drawn)
        drawn.append(int(logits.argmax()))
    return drawn


PENALTIES = ({"presence_penalty": 1.5}, {}, {"frequency_penalty": 0.6}, {"repetition_penalty": 1.8})


def test_each_penalty_alone_and_all_of_them_in_one_batch():
    """Every request has the penalty, the prompt and the words of its own."""
    model, engine = ToyModel(vocab=19, seed=5), toy_engine(ToyModel(vocab=19, seed=5))
    prompts = [ids(3 + number, 19, number) for number in range(len(PENALTIES))]
    wanted = [most_probable(model, prompt, 40, *(named.get(name, off) for name, off in (
        ("repetition_penalty", 1.0), ("frequency_penalty", 0.0), ("presence_penalty", 0.0))))
        for prompt, named in zip(prompts, PENALTIES, strict=True)]
    params = [stars.SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, **named) for named in PENALTIES]
    assert all(one.penalties == bool(named) for one, named in zip(params, PENALTIES, strict=True))
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    together = engine.generate(given, params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in together] == wanted
    for prompt, one, expected in zip(given, params, wanted, strict=True):
        [output] = engine.generate(prompt, one, use_tqdm=False)
        assert output.outputs[0].token_ids == expected
    # Without its penalty each of them would have been another text.
    assert [most_probable(model, prompt, 40) != expected for prompt, expected in zip(prompts, wanted, strict=True)] == [
        True, False, True, True]


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_each_filter_alone_leaves_the_most_probable_token(filters):
    model, engine = ToyModel(vocab=19, seed=5), toy_engine(ToyModel(vocab=19, seed=5))
    params = stars.SamplingParams(max_tokens=24, seed=3, ignore_eos=True)
    prompt = ids(4, 19, 2)
    wanted = most_probable(model, prompt, 24)
    [plain] = engine.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    assert plain.outputs[0].token_ids != wanted
    filtered = stars.SamplingParams(max_tokens=24, seed=3, ignore_eos=True, **filters)
    assert filtered.filters and not params.filters  # which is all that a GPU's sampler goes by
    [output] = engine.generate({"prompt_token_ids": prompt}, filtered, use_tqdm=False)
    assert output.outputs[0].token_ids == wanted
