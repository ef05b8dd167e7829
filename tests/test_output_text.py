"""What a user is shown of a response: stop strings and special tokens in its text or not, none at all, in pieces."""

from __future__ import annotations

import itertools
from itertools import pairwise

import pytest

import stars
from stars import RequestOutputKind
from stars.errors import RequestError
from stars.trace import request_trace
from test_bad_input import one_sentence
from test_text import PIECES as PLAIN
from test_text import TOY, byte_ids, fallback_tokenizer, save, scripted
from toy import ToyModel, toy_engine

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY
PROMPT = {"prompt_token_ids": [1, 4, 2]}
PIECES = [*PLAIN[:9], "<|x|>", *PLAIN[10:]]
SPECIAL = (0, 1, 9)
STOPS = [(), ("bca",), ("ab", "abc"), ("c", "bca"), (" c", "b"), ("aba", "cab"), ("é",)]


class Shown:
    """A tokenizer of PIECES, each put right behind the other; the special ones where they are asked for."""

    has_chat_template, eos_token_id = False, 0
    special_tokens = {PIECES[token]: token for token in SPECIAL}

    def encode(self, text, add_special_tokens=True):
        raise AssertionError("prompts are given as ids")

    def decode(self, ids, skip_special_tokens=True):
        return "".join(PIECES[token] for token in ids if not (skip_special_tokens and token in SPECIAL))


def by_hand(free: list[int], params: stars.SamplingParams) -> tuple[list[int], str]:
    """(token ids, text) of a response that would be `free` if nothing stopped it, written piece by piece."""
    ids, plain, content, limit, ending = [], "", [], None, ""
    for token in free:
        ids.append(token)
        if token in (0, *params.stop_token_ids):
            shown = token not in SPECIAL or not params.skip_special_tokens
            ending = PIECES[token] if params.include_stop_str_in_output and shown else ""
            break
        content.append(token)
        plain += "" if token in SPECIAL else PIECES[token]
        found = [(plain.index(stop), stop) for stop in params.stop if stop in plain]
        if found:
            limit = min(found)[0] + len(min(found)[1]) * params.include_stop_str_in_output
            break
    left, text = len(plain) if limit is None else limit, ""
    for token in content:
        if token in SPECIAL:
            text += "" if params.skip_special_tokens else PIECES[token]
            continue
        text += PIECES[token][:left]
        if len(PIECES[token]) > left:
            break
        left -= len(PIECES[token])
    return ids, text + ending


@pytest.fixture(scope="module")
def engine() -> stars.Engine:
    rewarding = stars.FunctionReward(lambda prompt, responses: [float(len(r)) for r in responses])
    return toy_engine(TOY, rewarding, tokenizer=Shown())


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_texts_with_stops_and_special_tokens(engine, include, skip, size):
    """Against a text put together piece by piece; each streamed text begins with the one before."""
    policy = stars.STARS(segment_size=size, alpha=1.0, reward_threshold=-5.0, width=1)
    stopped = shown = 0
    for number, (stops, stop_ids) in enumerate(itertools.product(STOPS, ((), (5,), (9, 7)))):
        params = stars.SamplingParams(max_tokens=13, n=3, seed=number, stop=stops, stop_token_ids=stop_ids,
                                      include_stop_str_in_output=include, skip_special_tokens=skip)
        free = stars.SamplingParams(max_tokens=13, n=3, seed=number, ignore_eos=True)
        [unstopped] = engine.generate(PROMPT, free, policy, use_tqdm=False)
        outputs = list(engine.stream(PROMPT, params, policy))
        for completion, other in zip(outputs[-1].outputs, unstopped.outputs, strict=True):
            ids, text = by_hand(other.token_ids, params)
            assert completion.token_ids == ids
            if not (isinstance(completion.stop_reason, str) and completion.stop_reason in Shown.special_tokens):
                assert completion.text == text, (stops, stop_ids, ids)
            stopped += isinstance(completion.stop_reason, str)
            shown += any(PIECES[token] in completion.text for token in (0, 1))
        for index in range(3):
            texts = [output.outputs[index].text for output in outputs]
            assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert stopped > 10 and (shown == 0) == skip


def test_a_stop_string_that_is_a_special_token_is_included(engine):
    """Its id ends the response; vLLM finds no such string, and here it is what the response ended with."""
    scripting = scripted_pieces([3, 4, 9, 2])

    def text(**options) -> tuple:
        params = stars.SamplingParams(max_tokens=9, stop="abcab" if "stop" not in options else options.pop("stop"),
                                      **options)
        [output] = scripting.generate(PROMPT, params, use_tqdm=False)
        return output.outputs[0].text, output.outputs[0].stop_reason

    name = "<|x|>"
    assert text(stop=name) == ("ab", name)
    assert text(stop=name, include_stop_str_in_output=True) == ("ab<|x|>", name)
    assert text(stop=name, skip_special_tokens=False) == ("ab", name)
    assert text(stop=name, include_stop_str_in_output=True, skip_special_tokens=False) == ("ab<|x|>", name)
    assert text(stop_token_ids=[4]) == ("a", 4)
    assert text(stop_token_ids=[4], include_stop_str_in_output=True) == ("ab", 4)
    assert text(stop_token_ids=[9], include_stop_str_in_output=True) == ("ab", 9)  # special, and not shown
    assert text() == ("abab", None)
    assert text(include_stop_str_in_output=True, skip_special_tokens=False) == ("ab<|x|>ab</s>", None)


def scripted_pieces(script: list[int], reward=None) -> stars.Engine:
    from toy import scripted_engine

    return scripted_engine(Shown(), len(PIECES), script, len(PROMPT["prompt_token_ids"]), reward)


def test_special_tokens_beside_unfinished_characters(tmp_path):
    """A real tokenizer: characters of several tokens, with special ones before, between and after."""
    from stars.model.tokenizer import load_tokenizer

    ours = load_tokenizer(save(fallback_tokenizer(), tmp_path))
    east = byte_ids(ours, "東".encode())
    film = ours.encode("film", False)
    engine = scripted(ours, [*film, 3, *east, 4, *film, *film], [1])
    for size in (1, 2, 16):
        policy = stars.STARS(segment_size=size, alpha=1.0, reward_threshold=-5.0, width=1)
        rewarded = scripted(ours, [*film, 3, *east, 4, *film, *film], [1], stars.FunctionReward(
            lambda prompt, responses: [0.0] * len(responses)))
        for stop, expected in ((None, "film<|user|>東<|end|> film film"), ("東 f", "film<|user|>"),
                               (" fi", "film<|user|>東<|end|>")):
            params = stars.SamplingParams(max_tokens=20, stop=stop, skip_special_tokens=False)
            outputs = list(rewarded.stream({"prompt_token_ids": [1]}, params, policy))
            texts = [output.outputs[0].text for output in outputs]
            assert texts[-1] == " " + expected  # behind the text of <s>, which a decoder takes no space from
            assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    [output] = engine.generate({"prompt_token_ids": [1]}, stars.SamplingParams(max_tokens=20), use_tqdm=False)
    assert output.outputs[0].text == "film東 film film"


class Counting(Shown):
    """Notes what it decodes."""

    def __init__(self) -> None:
        self.decoded: list[list[int]] = []

    def decode(self, ids, skip_special_tokens=True):
        self.decoded.append(list(ids))
        return super().decode(ids, skip_special_tokens)


@pytest.mark.parametrize("policy", [stars.Sample(), stars.BestOfN(n=2), stars.SegmentBeam(beams=2, segment_size=2)])
def test_without_text(policy):
    """detokenize=False: an empty text, and nothing of a response is decoded; stop strings would need it."""
    tokenizer = Counting()
    reward = stars.FunctionReward(lambda prompt, responses: list(map(float, map(len, responses))), inputs="ids")
    engine = toy_engine(TOY, reward, tokenizer=tokenizer)
    options = dict(max_tokens=13, seed=3, n=2, stop_token_ids=[5])
    [expected] = engine.generate(PROMPT, stars.SamplingParams(**options), policy, use_tqdm=False)
    assert all(one.text for one in expected.outputs) and len(tokenizer.decoded) > 2
    tokenizer.decoded.clear()
    outputs = list(engine.stream(PROMPT, stars.SamplingParams(**options, detokenize=False), policy))
    assert [one.token_ids for one in outputs[-1].outputs] == [one.token_ids for one in expected.outputs]
    assert all(one.text == "" and one.error is None for output in outputs for one in output.outputs)
    assert tokenizer.decoded == [PROMPT["prompt_token_ids"]]  # as a reward might want it
    with pytest.raises(RequestError, match="stop is found in the text, and detokenize is False") as caught:
        stars.SamplingParams(stop="a", detokenize=False)
    one_sentence(str(caught.value))


OPTIONS = [dict(include_stop_str_in_output=True), dict(skip_special_tokens=False), dict(detokenize=False),
           dict(output_kind=DELTA), dict(output_kind=FINAL_ONLY),
           dict(include_stop_str_in_output=True, skip_special_tokens=False, output_kind=DELTA)]


@pytest.mark.parametrize("options", OPTIONS)
def test_what_rewards_read_is_not_changed(options):
    """The same texts, in the same order, the same rewards and the same trace."""
    found = []
    stops = {} if "detokenize" in options else {"stop": ["bca", "é"]}
    for more in ({}, options):
        seen: list[str] = []
        engine = toy_engine(TOY, stars.FunctionReward(
            lambda prompt, responses, seen=seen: seen.extend(responses) or [float(len(r)) for r in responses]),
            tokenizer=Shown())
        params = stars.SamplingParams(max_tokens=12, n=6, seed=5, **stops, **more)
        policies = [stars.STARS(segment_size=3, alpha=1.0, reward_threshold=4.0, width=1), stars.BestOfN(n=3)]
        outputs = engine.generate([PROMPT] * 2, params, policies, use_tqdm=False)
        traces = [request_trace(output, engine.tokenizer) for output in outputs]
        found.append((seen, [(one.token_ids, one.reward, one.stop_reason) for output in outputs
                             for one in output.outputs],
                      [[segment.attempts for segment in completion.segments] for trace in traces
                       for completion in trace.completions]))
    assert found[0] == found[1] and len(found[0][0]) > 20


# -- in pieces --------------------------------------------------------------------------------------------------------

POLICIES = {
    "sample": stars.Sample(), "stars": stars.STARS(segment_size=3, alpha=1.0, reward_threshold=3.0, width=2),
    "back up": stars.STARS(segment_size=3, max_attempts=3, alpha=1.0, reward_threshold=5.0, beta=0.0, width=1,
                           exhaust="back_up"),
    "best of n": stars.BestOfN(n=3), "beam": stars.SegmentBeam(beams=2, candidates=2, segment_size=2),
    "particles": stars.ParticleFilter(particles=3, segment_size=2, beta=2.0),
    "rejection": stars.RejectionSampling(reward_threshold=99.0, max_attempts=3, exhaust="refuse"),
}
TEXTS = [dict(), dict(stop=["bca", "é"]), dict(stop=["ab"], include_stop_str_in_output=True),
         dict(skip_special_tokens=False, stop=["cab"]), dict(detokenize=False)]


def put_together(outputs: list[stars.RequestOutput]) -> list[tuple]:
    """The sums of deltas, by completion."""
    sums = []
    for index in range(len(outputs[0].outputs)):
        parts = [output.outputs[index] for output in outputs]
        sums.append(("".join(part.text for part in parts), [token for part in parts for token in part.token_ids],
                     [segment for part in parts for segment in part.segments], parts[-1].finish_reason,
                     parts[-1].stop_reason, parts[-1].reward, parts[-1].cumulative_logprob))
    return sums


def whole(output: stars.RequestOutput) -> list[tuple]:
    return [(one.text, one.token_ids, one.segments, one.finish_reason, one.stop_reason, one.reward,
             one.cumulative_logprob) for one in output.outputs]


@pytest.mark.parametrize("name", POLICIES)
def test_the_sum_of_deltas_is_the_cumulative_output(engine, name):
    """By stream, by step, and where others' rounds pass between two outputs: nothing is lost, nothing comes twice."""
    policy = POLICIES[name]
    several = 0
    for number, options in enumerate(TEXTS):
        def params(kind, options=options, number=number):
            return stars.SamplingParams(max_tokens=14, n=2, seed=40 + number, output_kind=kind, **options)

        [expected] = engine.generate(PROMPT, params(CUMULATIVE), policy, use_tqdm=False)
        for kind in (DELTA, FINAL_ONLY):  # generate returns all of it whatever is asked
            assert whole(engine.generate(PROMPT, params(kind), policy, use_tqdm=False)[0]) == whole(expected)
        cumulative = list(engine.stream(PROMPT, params(CUMULATIVE), policy))
        deltas = list(engine.stream(PROMPT, params(DELTA), policy))
        assert put_together(deltas) == whole(expected) == whole(cumulative[-1])
        assert len(deltas) == len(cumulative)
        for count in range(len(deltas)):
            assert put_together(deltas[: count + 1]) == whole(cumulative[count])
        several += len(deltas) > 2
        assert [whole(one) for one in engine.stream(PROMPT, params(FINAL_ONLY), policy)] == [whole(expected)]
        # By step, beside the others.
        ids = {kind: engine.add_request(PROMPT, params(kind), policy) for kind in RequestOutputKind}
        stepped: dict[str, list] = {request_id: [] for request_id in ids.values()}
        while engine.has_unfinished_requests():
            for output in engine.step():
                stepped[output.request_id].append(output)
        assert put_together(stepped[ids[DELTA]]) == whole(expected) == whole(stepped[ids[CUMULATIVE]][-1])
        assert [whole(one) for one in stepped[ids[FINAL_ONLY]]] == [whole(expected)]
        # Others' rounds pass between.
        stream = engine.stream(PROMPT, params(DELTA), policy)
        begun = [next(stream)]
        engine.generate(PROMPT, stars.SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=False)
        assert put_together(begun + list(stream)) == whole(expected)
    assert several or name in ("best of n", "rejection", "sample")


def test_what_a_stopped_call_did_not_hand_out_comes_with_the_next(engine, monkeypatch):
    """An interrupt while outputs are made: the next step has them, whole."""
    policy = POLICIES["stars"]
    params = stars.SamplingParams(max_tokens=14, seed=9, output_kind=DELTA)
    [expected] = engine.generate(PROMPT, params, policy, use_tqdm=False)
    engine.add_request(PROMPT, params, policy)
    outputs = engine.step()
    for name in ("news", "output"):
        method = getattr(stars.request.Request, name)

        def interrupted(self, *given, method=method):
            method(self, *given)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(stars.request.Request, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert put_together(outputs) == whole(expected)
    engine.check_integrity()


def test_an_aborted_request_has_its_last_output_in_any_kind(engine):
    policy = POLICIES["stars"]
    for kind in RequestOutputKind:
        request_id = engine.add_request(PROMPT, stars.SamplingParams(max_tokens=40, ignore_eos=True, output_kind=kind),
                                        policy)
        first = engine.step()
        engine.abort(request_id)
        last = engine.step()
        assert [one.outputs[0].finish_reason for one in last] == ["abort"]
        tokens = [token for one in [*(first if kind is DELTA else []), *last] for token in one.outputs[0].token_ids]
        assert len(tokens) == 3 and len(first) == (kind is not FINAL_ONLY)
    assert not engine.has_unfinished_requests()


def test_without_a_tokenizer():
    engine = toy_engine(ToyModel(vocab=7, seed=2))
    params = stars.SamplingParams(max_tokens=9, seed=1, output_kind=DELTA, skip_special_tokens=False)
    outputs = list(engine.stream({"prompt_token_ids": [1, 2]}, params))
    [expected] = engine.generate({"prompt_token_ids": [1, 2]}, params, use_tqdm=False)
    assert [token for one in outputs for token in one.outputs[0].token_ids] == expected.outputs[0].token_ids
    assert {one.outputs[0].text for one in outputs} == {None}
    [silent] = engine.generate({"prompt_token_ids": [1, 2]}, stars.SamplingParams(detokenize=False), use_tqdm=False)
    assert silent.outputs[0].text is None
