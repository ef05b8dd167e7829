"""The guidance of requests and what answers say of it: names of models, policies and their parameters, segments with
all their candidates, as the trace has them."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest

import stars
from in_process import Server
from stars.cli.options import shipped_pair
from stars.model.tokenizer import load_tokenizer
from stars.outputs import Attempt, CompletionOutput, RequestOutput, Segment
from stars.policies import POLICIES
from stars.serve.http.guidance import guided
from stars.serve.http.protocol import Guidance
from stars.serve.http.stars_field import SegmentRecords, policy_record
from stars.trace.reader import read_trace
from stars.trace.writer import request_trace
from test_conservation import nothing_is_held
from test_serve_completions import GUIDED, PATH, POLICY, expected, refused, texts_of
from test_text import byte_level_tokenizer, save

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def engine():
    lm, rm = shipped_pair()
    return stars.Engine(lm, rm, deterministic=True, max_num_seqs=16, max_num_lanes=64)


@pytest.fixture(scope="module")
def calibration(engine):
    return engine.calibrate(["This film was"], stars.SamplingParams(max_tokens=12, seed=1), num_samples=8)


@pytest.fixture(scope="module")
def server(engine, calibration):
    made = Server(engine, calibration=calibration)
    yield made
    made.close()
    nothing_is_held(engine)


# -- what is asked for ------------------------------------------------------------------------------------------------


def policy_of(server: Server, model: str | None = None, **given: Any) -> Any:
    return guided(server.service, model, Guidance.model_validate(given) if given else None).policy


def test_names_and_parameters_become_policies(server, calibration):
    assert policy_of(server) == stars.STARS(reward_threshold=calibration), "the calibration's"
    assert policy_of(server, beta="auto").beta == calibration.beta
    assert policy_of(server, beta="auto", reward_threshold=2.0) == stars.STARS(reward_threshold=2.0,
                                                                               beta=calibration.beta)
    assert policy_of(server, reward_threshold="auto", width=3) == stars.STARS(reward_threshold=calibration, width=3)
    hard = policy_of(server, reward_threshold=1, beta=0, segment_size=None)
    assert hard == stars.STARS(reward_threshold=1.0, beta=0.0)
    assert policy_of(server, "toy") == policy_of(server, "toy:stars") == policy_of(server, policy="stars")
    assert policy_of(server, "toy:cards") == stars.CARDS(reward_threshold=calibration)
    for plain in (("toy:plain", {}), ("toy:sample", {}), (None, {"policy": "plain"}), (None, {"policy": "sample"})):
        assert policy_of(server, plain[0], **plain[1]) == stars.Sample()
    assert policy_of(server, "toy:plain", score=True) == stars.Sample(score=True)
    assert policy_of(server, policy="blockwise", k=[4, 2]) == stars.BlockwiseBestOfK((4, 2))
    assert policy_of(server, policy="best-of-n", n=4, temperature=0.5) == stars.BestOfN(4, 0.5)


def test_the_server_has_defaults(engine):
    """Of its own policy, where a request does not say otherwise."""
    made = Server(engine, policy="cards", policy_parameters={"reward_threshold": 3.0, "alpha": 0.25})
    try:
        assert policy_of(made) == stars.CARDS(reward_threshold=3.0, alpha=0.25)
        assert policy_of(made, alpha=0.75) == stars.CARDS(reward_threshold=3.0, alpha=0.75)
        assert policy_of(made, "toy:cards", beta=2) == stars.CARDS(reward_threshold=3.0, alpha=0.25, beta=2.0)
        assert policy_of(made, "toy:stars", reward_threshold=1) == stars.STARS(reward_threshold=1.0)
        message = refused(made, {"prompt": "x", "model": "toy:stars"}, "stars.reward_threshold")["message"]
        assert "/v1/calibrate" in message
        refused(made, {"prompt": "x", "stars": {"beta": "auto"}}, "stars.beta")
    finally:
        made.close()


def test_a_server_without_a_reward_samples():
    made = Server(stars.Engine(shipped_pair()[0]))
    try:
        assert policy_of(made) == stars.Sample()
        assert made.post(PATH, {"prompt": "x", "max_tokens": 2}).json["choices"][0]["stars"]["reward"] is None
        for name in ("stars", "best-of-n"):
            message = refused(made, {"prompt": "x", "model": f"toy:{name}", "stars": {
                "reward_threshold": 1.0} if name == "stars" else {}}, "stars.policy")["message"]
            assert "toy:plain" in message
    finally:
        made.close()


GIVEN: dict[str, dict[str, Any]] = {
    "stars": {"segment_size": 4}, "cards": {"max_segment": 8}, "sample": {}, "best-of-n": {"n": 3},
    "blockwise": {"k": 3, "segment_size": 4}, "rejection-sampling": {"max_attempts": 3},
    "speculative-rejection": {"n": 3, "segment_size": 4}, "segment-beam": {"beams": 2, "candidates": 2,
                                                                           "segment_size": 4},
    "particle-filter": {}, "args": {}, "rad": {},
}
OTHER_MODELS = ("mara", "persona-judge", "token-guidance", "rsd")
"""Methods that need models or heads beside."""


@pytest.mark.parametrize("name", GIVEN)
def test_every_method_is_served(server, name):
    """Streamed as whole, with the policy's own parameters in the answer."""
    assert {*GIVEN, *OTHER_MODELS} == {*POLICIES}
    body = {"prompt": "This film was", "model": f"toy:{name}", "max_tokens": 10, "seed": 3, "n": 2,
            "stars": {**GIVEN[name], "return_segments": True, "return_trace": True}}
    whole = server.post(PATH, body).json
    policy = policy_of(server, f"toy:{name}", **GIVEN[name])
    [output] = expected(server, "This film was", policy, max_tokens=10, seed=3, n=2)
    assert [choice["text"] for choice in whole["choices"]] == [completion.text for completion in output.outputs]
    assert whole["stars"]["policy"] == policy_record(policy) and whole["stars"]["policy"]["name"] == name
    events = server.post(PATH, {**body, "stream": True}).events
    assert texts_of(events, 2) == [choice["text"] for choice in whole["choices"]]
    for index, choice in enumerate(whole["choices"]):
        told = [segment for event in events for one in event["choices"] if one["index"] == index
                for segment in one["stars"]["segments"]]
        assert [segment["text"] for segment in told] == [segment["text"] for segment in choice["stars"]["segments"]]
        assert [len(segment["attempts"]) for segment in told] == [
            len(segment["attempts"]) for segment in choice["stars"]["segments"]]
        assert "".join(segment["text"] for segment in told) == choice["text"]
    [request] = read_trace(io.StringIO(whole["stars"]["trace"]))
    assert [len(completion.segments) for completion in request.completions] == [
        len(choice["stars"]["segments"]) for choice in whole["choices"]]


# -- segments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("params", [
    {}, {"stop": [" the", " a"]}, {"include_stop_str_in_output": True, "stop": [" the"]}, {"ignore_eos": True},
    {"skip_special_tokens": False}])
def test_segments_say_what_the_engine_says(server, stream, params):
    for seed in range(4):
        body = {"prompt": "This film was", "max_tokens": 24, "seed": seed, "stream": stream, **params,
                "return_token_ids": True, "stars": {**GUIDED, "return_segments": True}}
        [output] = expected(server, "This film was", POLICY, max_tokens=24, seed=seed, **params)
        [completion] = output.outputs
        answer = server.post(PATH, body)
        parts = [event["choices"][0] for event in answer.events] if stream else answer.json["choices"]
        segments = [segment for part in parts for segment in part["stars"]["segments"]]
        assert len(segments) == len(completion.segments)
        traced = request_trace(output, server.engine.engine.tokenizer).completions[0].segments
        for found, segment, trace in zip(segments, completion.segments, traced, strict=True):
            assert (found["reward"], found["threshold"], found["accepted"], found["winner"], found["token_ids"]) == (
                segment.reward, segment.threshold, segment.accepted, segment.winner, segment.token_ids)
            assert [(one["reward"], one["threshold"], one["accept_probability"], one["accepted"], one["logprob"],
                     one["token_ids"]) for one in found["attempts"]] == [
                (one.reward, one.threshold, one.accept_probability, one.accepted, one.logprob, one.token_ids)
                for one in segment.attempts]
            assert found["attempts"][found["winner"]]["text"] == found["text"]
            if not params.get("include_stop_str_in_output"):
                assert [one["text"] for one in found["attempts"]] == [one.text for one in trace.attempts]
        assert "".join(segment["text"] for segment in segments) == completion.text
        assert parts[-1]["stars"]["reward"] == completion.reward


def test_segments_are_not_there_unasked(server):
    body = {"prompt": "This film was", "max_tokens": 12, "stars": GUIDED}
    assert "segments" not in server.post(PATH, body).json["choices"][0]["stars"]
    assert "trace" not in server.post(PATH, body).json["stars"]
    events = server.post(PATH, {**body, "stream": True}).events
    assert ["stars" in event["choices"][0] for event in events] == [False] * (len(events) - 1) + [True]
    segments = server.post(PATH, {**body, "stars": {**GUIDED, "return_segments": True}}).json["choices"][0]["stars"][
        "segments"]
    assert all("token_ids" not in record for segment in segments for record in (segment, *segment["attempts"]))


class Counting:
    """A tokenizer that counts the ids that it decodes."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.decoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: list[int], **options: Any) -> str:
        self.decoded += len(ids)
        return self._tokenizer.decode(ids, **options)


def response_of(drawn: list[list[list[int]]], text: str, ended: str | None) -> CompletionOutput:
    """A response whose segments are the first of each list of attempts."""
    segments = [Segment(attempts[0], 0.0, 0.0, True, [Attempt(one, 0.0, 0.0, 1.0, one is attempts[0], 0.0)
                                                       for one in attempts]) for attempts in drawn]
    return CompletionOutput(0, text, [token for segment in segments for token in segment.token_ids],
                            finish_reason=ended, segments=segments)


def test_characters_of_several_tokens(tmp_path):
    """Segments that end anywhere in a character, attempts too: as the trace, which decodes all of it each time."""
    tokenizer = load_tokenizer(save(byte_level_tokenizer(), tmp_path))
    draw = random.Random(5)
    text = "naïve 東京 🙂 Größe é e\u0301 x " * 3
    ids = tokenizer.encode(text, add_special_tokens=False)
    prompt = tokenizer.encode("東", add_special_tokens=False)
    broken = 0
    for _ in range(40):
        drawn, place = [], 0
        while place < len(ids):
            size = draw.randint(1, 5)
            others = [draw.sample(ids, draw.randint(1, 5)) for _ in range(2)]
            drawn.append([ids[place : place + size], *others])
            broken += "\ufffd" in tokenizer.decode(ids[:place + size])
            place += size
        whole = response_of(drawn, text, "length")
        traced = request_trace(RequestOutput("a", None, prompt, [whole], True, 0, stars.Sample()),
                               tokenizer).completions[0].segments
        records = SegmentRecords(tokenizer, prompt, stars.SamplingParams(), False)
        found = [record for index, attempts in enumerate(drawn) for record in records.new(response_of(
            [attempts], text if index == len(drawn) - 1 else "", "length" if index == len(drawn) - 1 else None))]
        assert [[one["text"] for one in record["attempts"]] for record in found] == [
            [one.text for one in segment.attempts] for segment in traced]
        assert "".join(record["text"] for record in found) == text
    assert broken > 100, "hardly any segment ended within a character"


def test_a_segment_costs_the_same_wherever_it_stands(engine):
    tokenizer = Counting(engine.tokenizer)
    records = SegmentRecords(tokenizer, [5, 6, 7], stars.SamplingParams(), False)
    costs = []
    for index in range(300):
        before = tokenizer.decoded
        records.new(response_of([[[10 + (index + place) % 90 for place in range(8)]] * 3], "", None))
        costs.append(tokenizer.decoded - before)
    assert max(costs[10:]) <= 5 * (8 + 64) and max(costs[200:]) <= max(costs[:100])
