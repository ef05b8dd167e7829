"""A server of OpenAI's completions API as the proposer: our own over HTTP, and one that answers as others do."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter

import pytest

import stars
from law import MAX_TOKENS, MODEL, PROMPT, REWARD, candidates
from reward_server import Handler, hangs_up, says, serving
from serving_http import running_server, service_of_pair
from stars import STARS, BestOfN, BlockwiseBestOfK, RequestError, RewardError, Sample, SamplingParams
from stars.adapters import openai, openai_client, vllm_client
from stars.errors import ServerError
from stars.reward import CausalReward, FunctionReward
from test_law import Case, follows_the_law, p_values
from toy import EOS, Digits, ToyModel, toy_pair

pytestmark = pytest.mark.usefixtures("one_torch_thread")

DRAWS = 160
SOFT = STARS(2, 4, 0.2, 0.5, 3.5, 3)
IDS = FunctionReward(lambda prompt, responses: [REWARD(ids) for ids in responses], inputs="ids")


def by_text(prompt, responses):
    """REWARD of texts in which every token is a digit."""
    return [REWARD([int(letter) for letter in text]) for text in responses]


@pytest.fixture(scope="module")
def ours():
    """The toy behind our own server."""
    with service_of_pair(model=MODEL.decoder(), reward=None, tokenizer=Digits(), max_num_seqs=64, max_num_lanes=256,
                         cache_tokens=1 << 14, max_segment_size=16) as service, running_server(service) as server:
        yield server


# -- a server like others' --------------------------------------------------------------------------------------------


def drawn(prefix: list[int], count: int, source: random.Random) -> list[int]:
    """Up to `count` tokens that the toy draws after a text; an EOS ends them."""
    found: list[int] = []
    while len(found) < count and EOS not in found:
        ones = [(segment[0], probability) for segment, probability in candidates(
            tuple(prefix[len(PROMPT) :] + found), 1, SamplingParams())]
        found += source.choices([token for token, _ in ones], [probability for _, probability in ones])
    return found


class Others:
    """Completions of the toy, as a server that knows texts alone tells them. Every token is a digit."""

    def __init__(self, n: bool = False, logprobs: bool = True, usage: bool = True, refuses: tuple[str, ...] = ()):
        self.n, self.logprobs, self.usage, self.refuses = n, logprobs, usage, refuses

    def __call__(self, handler: Handler, body: dict) -> None:
        refused = [name for name in self.refuses if name in body]
        if refused:
            return handler.reply({"error": {"message": f"unexpected {refused}"}}, 422)
        choices, count = [], 0
        for index in range(body.get("n", 1) if self.n else 1):
            source = random.Random(body["seed"] * 1000 + index)
            ids = drawn([int(letter) for letter in body["prompt"]], body["max_tokens"], source)
            count = len(ids)
            choice = {"index": index, "text": "".join(str(token) for token in ids if token != EOS),
                      "finish_reason": "stop" if EOS in ids else "length", "logprobs": None}
            if self.logprobs and "logprobs" in body:
                choice["logprobs"] = {"tokens": [str(token) for token in ids], "token_logprobs": [-1.0] * len(ids)}
            choices.append(choice)
        answer = {"choices": choices[::-1]}
        if self.usage:
            answer["usage"] = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
        handler.reply(answer)


# -- the law ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [openai, vllm_client])
def test_segments_of_our_own_server_follow_the_law(ours, adapter):
    """As tests/test_law.py: a correct adapter fails once in 1e6 choices of the seed. Decisions are the rule's own."""
    params = SamplingParams(max_tokens=MAX_TOKENS, n=DRAWS, seed=11)
    proposer = adapter(ours.url, policy=SOFT, reward=IDS, max_num_seqs=64)
    [output] = proposer.generate({"prompt_token_ids": PROMPT}, params)
    assert [one.error for one in output.outputs] == [None] * DRAWS
    case = Case(SOFT, params)
    assert follows_the_law(case, output.outputs), p_values(case, output.outputs)
    attempts = [one for completion in output.outputs for segment in completion.segments for one in segment.attempts]
    assert output.metrics.attempts == len(attempts) and 0.2 < output.metrics.accept_rate < 0.7
    assert proposer.traffic.completion_tokens - 2 == output.metrics.lm_tokens_drawn == sum(
        len(one.token_ids) for one in attempts)  # two were the first request's, which finds out how the server is asked
    assert ours.held == 0


def test_the_law_test_sees_candidates_that_are_drawn_again(ours, monkeypatch):
    """Every round of a segment asks with the seed of its first."""
    monkeypatch.setattr(openai_client, "_seed", lambda attempt, seed=openai_client._seed: seed(
        attempt._replace(attempt=1)))
    params = SamplingParams(max_tokens=MAX_TOKENS, n=DRAWS, seed=11)
    policy = STARS(2, 4, 0.2, 0.5, 3.5, 1)
    [output] = openai(ours.url, policy=policy, reward=IDS, max_num_seqs=64).generate(
        {"prompt_token_ids": PROMPT}, params)
    assert not follows_the_law(Case(policy, params), output.outputs)


@pytest.mark.parametrize("parallel", [False, True], ids=["n", "parallel"])
def test_segments_of_a_server_of_texts_follow_the_law(parallel):
    params = SamplingParams(max_tokens=MAX_TOKENS, n=200, seed=21)
    with serving(Others(n=not parallel)) as server:
        proposer = openai(server.url, policy=SOFT, reward=by_text, parallel=parallel, max_num_seqs=32)
        [output] = proposer.generate("".join(map(str, PROMPT)), params)
        assert not [one.error for one in output.outputs if one.error]
        assert server.busiest > 1  # several responses at once; how many is the machine's affair
        assert all(("n" in body) is not parallel for body in server.bodies[1:])
    for completion in output.outputs:  # what is known of the ids is in the text
        assert set(completion.token_ids) == {-1}
        shown = [int(letter) for letter in completion.text]
        completion.token_ids[:] = shown + [EOS] * (len(completion.token_ids) - len(shown))
        place = 0
        for segment in completion.segments:
            count = len(segment.token_ids)
            segment.token_ids[:] = completion.token_ids[place : place + count]
            place += count
    case = Case(SOFT, params)
    assert follows_the_law(case, output.outputs), p_values(case, output.outputs)


def test_runs_repeat_and_retries_draw_anew(ours):
    params = [SamplingParams(max_tokens=12, seed=seed) for seed in (1, 2, 3)]
    policy = STARS(4, 9, 0.2, 0.5, 9.0, 3)
    runs = [openai(ours.url, policy=policy, reward=IDS).generate([{"prompt_token_ids": PROMPT}] * 3, params)
            for _ in range(2)]
    assert [one.outputs[0].token_ids for one in runs[0]] == [one.outputs[0].token_ids for one in runs[1]]
    many = [segment for one in runs[0] for segment in one.outputs[0].segments if len(segment.attempts) == 9]
    assert many and all(len({tuple(one.token_ids) for one in segment.attempts}) > 3 for segment in many)
    seeds = {tuple(tuple(one.token_ids) for one in segment.attempts[:3]) for segment in many}
    assert len(seeds) == len(many)  # of one response and of all


def test_a_server_that_aligns_by_itself_is_refused():
    """As `stars serve` says of what it makes by the name of its own policy."""
    class Aligning(Others):
        policy = "stars"

        def __call__(self, handler: Handler, body: dict) -> None:
            reply, said = type(handler).reply.__get__(handler), {"stars": {"policy": {"name": self.policy}}}
            handler.reply = lambda answer, *more: reply(answer | said, *more)  # type: ignore[method-assign]
            super().__call__(handler, body)

    kind = Aligning(n=True)
    with serving(kind) as server:
        proposer = openai(server.url, policy=SOFT, reward=by_text)
        with pytest.raises(ServerError, match="aligns by itself .its policy is .stars.*NAME:plain"):
            proposer.generate("012")
        kind.policy = "sample"
        assert proposer.generate("012")[0].outputs[0].error is None


@pytest.mark.parametrize("policy", [Sample(), BlockwiseBestOfK(4, 3)], ids=["sample", "best of 4"])
def test_edges_of_the_law(ours, policy):
    proposer = openai(ours.url, policy=policy, reward=None if isinstance(policy, Sample) else IDS)
    [output] = proposer.generate({"prompt_token_ids": PROMPT}, SamplingParams(max_tokens=9, n=6, seed=2))
    for completion in output.outputs:
        for segment in completion.segments:
            if isinstance(policy, Sample):
                assert segment.reward is None and len(segment.attempts) == 1
            else:
                assert len(segment.attempts) == 4 and segment.reward == max(one.reward for one in segment.attempts)


def test_greedy_requests_draw_one_attempt_a_segment(ours):
    engine = ours.engine
    params = SamplingParams(max_tokens=9, temperature=0.0)
    wanted = engine.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)[0].outputs[0].token_ids
    [greedy, sampled] = openai(ours.url, policy=SOFT, reward=IDS).generate(
        [{"prompt_token_ids": PROMPT}] * 2, [params, SamplingParams(max_tokens=9, seed=1)])
    assert greedy.outputs[0].token_ids == wanted
    assert greedy.metrics.attempts == greedy.metrics.segments and sampled.metrics.width == 3


# -- token ids, texts, rewards ----------------------------------------------------------------------------------------


def test_no_token_that_the_server_holds_is_run_again(ours):
    """The server says how much of each prompt it found in its cache: all but what is left of a page of 16 tokens, and
    the last one. A round asks for n candidates of one prompt, which it reads once."""
    prompt = [1 + place % 4 for place in range(200)]
    proposer = openai(ours.url, policy=STARS(8, 4, 0.2, 0.5, 60.0, 2), reward=IDS)
    [output] = proposer.generate({"prompt_token_ids": prompt}, SamplingParams(max_tokens=40, seed=8, ignore_eos=True))
    traffic = proposer.traffic
    asked = traffic.requests - 1
    assert len(output.outputs[0].token_ids) == 40 and asked >= 5
    page = ours.engine.config.page_size
    # The prompt once, and of every later round's at most a page and the segment that was drafted elsewhere.
    run_again = traffic.prompt_tokens - traffic.cached_tokens - len(prompt)
    assert 0 <= run_again <= asked * (page + 8)
    assert traffic.forward_tokens == traffic.prompt_tokens - traffic.cached_tokens + traffic.completion_tokens


def test_prompts_become_token_ids_where_the_server_tells_them(ours):
    with_tokenizer = openai(ours.url, policy=SOFT, reward=IDS, tokenizer=Digits())
    params = SamplingParams(max_tokens=9, seed=4)
    given = [with_tokenizer, openai(ours.url, policy=SOFT, reward=IDS), openai(ours.url, policy=SOFT, reward=by_text)]
    outputs = [one.generate("123", params)[0] for one in given]
    assert [one.prompt_token_ids for one in outputs] == [[1, 2, 3]] * 3
    assert len({tuple(one.outputs[0].token_ids) for one in outputs}) == 1
    text = outputs[0].outputs[0].text
    assert text == Digits().decode(outputs[0].outputs[0].token_ids) and [one.outputs[0].text for one in outputs] == [
        text] * 3
    assert outputs[0].outputs[0].cumulative_logprob < 0.0


def test_a_reward_model_reads_token_ids_or_text(ours):
    """Of the tokenizer's vocabulary it reads ids; where no tokenizer is given its own makes ids of the text."""
    class Same(Digits):
        eos_token_id = None

        def same_vocabulary(self, other):
            return True

    _, judge = toy_pair(5, (4, 6))
    policy = STARS(3, 4, 1.0, 0.5, 0.5, 2)
    params = SamplingParams(max_tokens=9, seed=4)
    found = []
    for tokenizer in (Same(), None):
        reward = CausalReward(judge.decoder(), tokenizer=Same(), template="raw")
        proposer = openai(ours.url, policy=policy, reward=reward, tokenizer=tokenizer)
        [output] = proposer.generate("123", params)
        assert output.outputs[0].error is None and proposer._scoring.needs_text is (tokenizer is None)
        found.append(output.outputs[0])
        assert found[-1].reward == pytest.approx(judge.reward([1, 2, 3, *(
            token for token in found[-1].token_ids if token != EOS)]), abs=1e-4)
    assert found[0].token_ids == found[1].token_ids


def test_streams_are_cumulative(ours):
    proposer = openai(ours.url, policy=SOFT, reward=IDS)
    params = SamplingParams(max_tokens=9, seed=4)
    [whole] = proposer.generate("123", params)
    seen = list(proposer.stream("123", params))
    assert [len(one.outputs[0].segments) for one in seen] == list(range(1, len(whole.outputs[0].segments) + 1))
    assert all(whole.outputs[0].text.startswith(one.outputs[0].text) for one in seen)
    assert seen[-1].finished and seen[-1].outputs[0].token_ids == whole.outputs[0].token_ids
    early = proposer.stream("123", params)
    next(early)
    with pytest.raises(RequestError, match="is at work with another call"):
        proposer.generate("123", params)
    early.close()
    assert proposer.generate("123", params)[0].outputs[0].text == whole.outputs[0].text


def test_messages_are_rendered_by_the_given_tokenizer(lm):
    with service_of_pair(model=lm, reward=None) as service, running_server(service) as server:
        engine = server.engine
        messages = [{"role": "user", "content": "Hello there"}]
        ids = engine.generate({"messages": messages}, SamplingParams(max_tokens=1), use_tqdm=False)[0].prompt_token_ids
        proposer = openai(server.url, policy=STARS(4, 2, 1.0, 0.5, 1.0, 2), tokenizer=lm,
                          reward=lambda prompt, responses: [0.0] * len(responses))
        output = proposer.chat(messages, SamplingParams(max_tokens=6, seed=1, stop_token_ids=[7]))
        assert output.prompt_token_ids == ids and output.outputs[0].error is None
        assert output.outputs[0].text == engine.tokenizer.decode(output.outputs[0].token_ids)
        with pytest.raises(RequestError, match="give the tokenizer of the served model"):
            openai(server.url, policy=Sample()).chat(messages)
    with serving(Others()) as other, pytest.raises(ServerError, match="tokenizer of the model that is served"):
        openai(other.url, policy=Sample(), tokenizer=lm).generate("11111", SamplingParams(max_tokens=2))


def test_llama_cpps_choices_are_read():
    """Its logprobs have ids; a character of several tokens is one of them there. Prompts may mix text and ids."""
    def entries(*ids):
        return {"content": [{"id": token, "token": str(token), "logprob": -0.5} for token in ids]}

    answers = iter([
        {"text": "4", "logprobs": entries(4)},  # the probe
        {"text": "42", "logprobs": entries(4, 2)}, {"text": "é", "logprobs": entries(9)},
        {"text": "7", "finish_reason": "stop", "logprobs": entries(7, 0)}])

    def behave(handler, body):
        handler.reply({"choices": [{"index": 0, "finish_reason": "length"} | next(answers)]})

    with serving(behave) as server:
        [output] = openai(server.url, policy=STARS(2, 1, 1.0, 0.0, 0.0, 1), reward=lambda prompt, responses: [
            1.0] * len(responses)).generate("12", SamplingParams(max_tokens=8))
        assert [body["prompt"] for body in server.bodies] == ["12", "12", ["12", 4, 2], ["12", 4, 2, "é"]]
    completion = output.outputs[0]
    assert (completion.text, completion.finish_reason) == ("42é7", "stop")
    assert completion.token_ids == [4, 2, -1, -1, -1, -1]


def test_a_character_that_a_seam_cuts_needs_a_tokenizer_where_ids_are_sent():
    """vLLM shows the whole text again after a prompt that ends so. Of texts alone the character's bytes are dropped."""
    def behave(handler, body):
        handler.reply({"choices": [{"index": 0, "finish_reason": "length", "text": "4\ufffd", "prompt_token_ids": [1],
                                    "token_ids": [4, 9][: body["max_tokens"]] if ids else None}]})

    for ids in (True, False):
        with serving(behave) as server:
            proposer = openai(server.url, policy=STARS(2, 1, 1.0, 0.0, 0.0, 1), reward=by_text)
            [completion] = next(iter(proposer.stream("1", SamplingParams(max_tokens=6)))).outputs
            assert completion.text == "4" and completion.reward == REWARD([4])
            *_, last = proposer.stream("1", SamplingParams(max_tokens=6))
            assert ("give the tokenizer of the served model" in (last.outputs[0].error or "")) is ids
            assert last.outputs[0].text == ("4" if ids else "444")


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_fields_that_a_server_does_not_know_are_left_out():
    with serving(Others(n=True, refuses=("top_k", "logprobs"))) as server:
        [output] = openai(server.url, policy=SOFT, reward=by_text).generate("123", SamplingParams(max_tokens=4, seed=1))
        assert output.outputs[0].error is None or "not known" in output.outputs[0].error
        assert "top_k" not in server.bodies[-1] and "logprobs" not in server.bodies[-1]
    with serving(Others(n=True, refuses=("top_k",))) as server, pytest.raises(ServerError, match="unexpected .'top_k"):
        openai(server.url, policy=SOFT, reward=by_text).generate("123", SamplingParams(max_tokens=4, top_k=3))


@pytest.mark.parametrize("server, options, message", [
    (Others(), {}, "takes no n: asked for 2 choices it answered with 1; give parallel=True"),
    (Others(refuses=("n",)), {}, "takes no n"),
    (Others(), dict(parallel=True, reward=IDS), "tells no token ids, and the reward reads those"),
    (says({"error": {"message": "no model named 'wrong', key abc-1"}}, 404), dict(model="wrong", api_key="abc-1"),
     r"status 404: no model named 'wrong', key \*\*\*"),
    (says({"data": []}), {}, "is it a server of OpenAI's completions API"),
    (says(b"<html>"), {}, "is it a server of OpenAI's completions API"),
], ids=["one choice", "n refused", "no ids", "wrong model", "no choices", "no json"])
def test_servers_that_cannot_serve_are_refused_by_name(server, options, message):
    options = dict(reward=by_text, policy=SOFT) | options
    with serving(server) as running, pytest.raises(ServerError, match=message) as error:
        openai(running.url, **options).generate("123", SamplingParams(max_tokens=4))
    assert running.url in str(error.value)


def answer_of(body, **changes):
    """Choices of text that end by their length, and what is wrong with them: by name of the answer's or a choice's."""
    answer = {"usage": {"prompt_tokens": 3}} | {name: changes.pop(name) for name in ("usage",) if name in changes}
    choice = {"text": "1" * body["max_tokens"], "finish_reason": "length",
              "logprobs": {"token_logprobs": [-1.0] * body["max_tokens"]}} | changes
    return answer | {"choices": [choice | {"index": index} for index in range(body.get("n", 1))]}


@pytest.mark.parametrize("parallel", [False, True], ids=["n", "parallel"])
@pytest.mark.parametrize("wrong, message", [
    ({"usage": [3]}, "cannot be read"),
    ({"usage": {"prompt_tokens": math.inf}}, "cannot be read"),
    ({"usage": {"prompt_tokens_details": {"cached_tokens": "all"}}}, "cannot be read"),
    ({"logprobs": {"token_logprobs": [10**400]}}, "cannot be read"),
    ({"token_ids": "12"}, "token_ids='12', where a list of token ids is expected"),
    ({"token_ids": {"1": 2}}, "a list of token ids is expected"),
    ({"token_ids": [[1], [2]]}, "a list of token ids is expected"),
    ({"token_ids": [-7, 1]}, "a list of token ids is expected"),
    ({"token_ids": [1] * 9}, "answered with 9 tokens where max_tokens is"),
    ({"token_ids": [1], "prompt_token_ids": 5}, "prompt_token_ids=5, where a list"),
], ids=lambda value: None if isinstance(value, str) else json.dumps(value)[:40])
def test_what_cannot_be_read_of_an_answer_ends_its_own_response(wrong, message, parallel):
    """First by the first answer, where it is raised; then by one of three responses, which the others outlive."""
    def behave(handler, body):
        handler.reply(answer_of(body, **(wrong if body["prompt"].startswith("3") else {})))

    with serving(behave) as server:
        proposer = openai(server.url, policy=SOFT, reward=by_text, parallel=parallel)
        if "tokens where" not in message:
            with pytest.raises(ServerError, match=message):
                proposer.generate("321", SamplingParams(max_tokens=4))
        with pytest.warns(UserWarning, match="1 of 3 requests ended with an error"):
            outputs = proposer.generate(["123", "321", "213"], SamplingParams(max_tokens=4, seed=1))
        assert [one.outputs[0].finish_reason for one in outputs] == ["length", "error", "length"]
        assert re.search(message, outputs[1].outputs[0].error)


def test_a_first_answer_of_no_choices_is_refused():
    with serving(says({"choices": []})) as server, pytest.raises(ServerError, match="cannot be read"):
        openai(server.url, policy=SOFT, reward=by_text, parallel=True).generate("123", SamplingParams(max_tokens=4))


def test_a_server_that_tells_no_ids_is_none_for_the_vllm_client():
    with serving(Others(n=True)) as server, pytest.raises(ServerError, match="tells no token ids, which .*vllm_client"):
        vllm_client(server.url, policy=SOFT, reward=by_text).generate("123", SamplingParams(max_tokens=4))


def test_tokens_that_nobody_counts_end_their_response():
    """n, and neither token ids nor logprobs: a choice that has ended may have any number of tokens."""
    with serving(Others(n=True, logprobs=False)) as server:
        proposer = openai(server.url, policy=SOFT, reward=by_text)
        with pytest.warns(UserWarning, match="ended with an error"):
            [output] = proposer.generate("123", SamplingParams(max_tokens=40, seed=1, n=8))
        assert Counter(one.finish_reason for one in output.outputs)["error"] > 4
        assert "give parallel=True, where it counts" in next(one.error for one in output.outputs if one.error)
        alone = openai(server.url, policy=SOFT, reward=by_text, parallel=True)
        [output] = alone.generate("123", SamplingParams(max_tokens=40, seed=1, n=8))
        assert not [one.error for one in output.outputs if one.error]


def test_a_server_that_is_busy_is_asked_again():
    with serving(Others(n=True), Others(n=True), says({}, 429), says({}, 503), hangs_up) as server:
        [output] = openai(server.url, policy=SOFT, reward=by_text).generate("123", SamplingParams(max_tokens=2, seed=1))
        assert output.outputs[0].error is None
        assert len({json.dumps(body) for body in server.bodies[1:5]}) == 1


def test_a_server_that_goes_away_ends_its_responses_and_nothing_else():
    def leaves(handler, body):
        if "3" in body["prompt"][:1]:
            return handler.reply({"error": {"message": "this prompt is too long"}}, 400)
        return Others(n=True)(handler, body)

    with serving(leaves, Others(n=True)) as server:
        proposer = openai(server.url, policy=SOFT, reward=by_text, retries=0)
        with pytest.warns(UserWarning, match="1 of 3 requests ended with an error"):
            outputs = proposer.generate(["123", "321", "213"], SamplingParams(max_tokens=4, seed=1))
        assert [one.outputs[0].finish_reason == "error" for one in outputs] == [False, True, False]
        assert "status 400: this prompt is too long" in outputs[1].outputs[0].error
        stream = proposer.stream("123", SamplingParams(max_tokens=40, seed=3))
        first = next(stream)
        server.usual = hangs_up
        *_, last = stream
        assert last.finished and "could not be reached, or broke off" in last.outputs[0].error
        assert last.outputs[0].token_ids[: len(first.outputs[0].token_ids)] == first.outputs[0].token_ids
        server.usual = Others(n=True)
        assert proposer.generate("123", SamplingParams(max_tokens=4, seed=1))[0].outputs[0].error is None


def test_a_reward_that_fails_ends_its_own_response():
    def fails(prompt, responses):
        if prompt == "321":
            raise RuntimeError("no reward today")
        return by_text(prompt, responses)

    with serving(Others(n=True)) as server, pytest.warns(UserWarning, match="1 of 2 requests"):
        outputs = openai(server.url, policy=SOFT, reward=fails).generate(["123", "321"], SamplingParams(max_tokens=4))
    assert [one.outputs[0].finish_reason == "error" for one in outputs] == [False, True]


def test_what_a_server_does_not_heed_is_said():
    with serving(Others(n=True)) as server:
        proposer = openai(server.url, policy=SOFT, reward=by_text)
        with pytest.warns(UserWarning, match="does not heed ignore_eos: leave it out"):
            proposer.generate("123", SamplingParams(max_tokens=40, seed=1, ignore_eos=True))
        with pytest.raises(RequestError, match="stop_token_ids need token ids"):
            proposer.generate("123", SamplingParams(max_tokens=4, stop_token_ids=[2]))


def test_a_server_that_does_not_sample_is_warned_of():
    def greedy(handler, body):
        handler.reply({"choices": [{"index": index, "text": "1" * body["max_tokens"], "finish_reason": "length"}
                                   for index in range(body["n"])]})

    with serving(greedy) as server, pytest.warns(UserWarning, match="did not sample: give what it needs .*extra_body"):
        openai(server.url, policy=STARS(4, 3, 1.0, 0.0, 99.0, 3), reward=by_text).generate(
            "123", SamplingParams(max_tokens=12))


@pytest.mark.parametrize("params, message", [
    (dict(stop=["x"]), "SamplingParams.stop is .*, and stars.adapters.openai has not got it"),
    (dict(logprobs=2), "SamplingParams.logprobs"), (dict(presence_penalty=1.0), "SamplingParams.presence_penalty"),
    (dict(max_tokens=None), "max_tokens is None"), (dict(max_tokens=5000), "more than max_model_len=4096"),
    (dict(output_kind="DELTA"), "cumulative outputs alone"),
], ids=str)
def test_parameters_that_it_has_not_are_refused_by_name(params, message):
    proposer = openai("http://127.0.0.1:9", policy=SOFT, reward=by_text)
    with pytest.raises(RequestError, match=message):
        proposer.generate("123", SamplingParams(**params))


@pytest.mark.parametrize("given, error, message", [
    (dict(base_url="nowhere"), RequestError, "base_url is 'nowhere', it must be an address"),
    (dict(base_url="http://me:secret@host"), RequestError, "give the key by api_key"),
    (dict(model=3), RequestError, "model is 3, it must be the name"),
    (dict(policy=BestOfN(4)), RequestError, "stars.adapters.openai cannot run BestOfN"),
    (dict(reward=None), RequestError, "reward is None, and STARS asks for rewards"),
    (dict(reward="/nowhere/at/all"), stars.ModelError, "is not a directory"),
    (dict(extra_body={"n": 3}), RequestError, "extra_body must be a dict of fields by name, other than"),
    (dict(headers={"X": "a\nb"}), RequestError, "headers has a value of X that cannot be sent"),
    (dict(api_key=""), RequestError, "api_key must be a text"), (dict(timeout=0), RequestError, "timeout is 0"),
    (dict(max_num_seqs=0), RequestError, "max_num_seqs is 0"),
], ids=str)
def test_what_cannot_be_is_said_at_once(given, error, message):
    given = dict(base_url="http://127.0.0.1:9", policy=SOFT, reward=by_text) | given
    with pytest.raises(error, match=message):
        openai(given.pop("base_url"), given.pop("model", None), **given)


@pytest.mark.parametrize("prompt, message", [
    ([1, 2], "token ids"), ({"prompt": ""}, "at least one character"), (3, "it must be a text or a dictionary"),
    ({"prompt": "1", "special_tokens": "text"}, "give that of the served model"), ({}, "exactly one of"),
], ids=str)
def test_prompts_that_cannot_be_are_refused(prompt, message):
    with pytest.raises(RequestError, match=message):
        openai("http://127.0.0.1:9", policy=Sample()).generate(prompt)


def test_addresses_are_openais():
    for given, path in (("http://h:1", "/v1/completions"), ("http://h:1/", "/v1/completions"),
                        ("http://h:1/v1", "/v1/completions"), ("http://h:1/api/v2/", "/api/v2/completions"),
                        ("http://h:1/v1/completions", "/v1/completions")):
        assert re.fullmatch(rf"http://h:1{path}", openai(given, policy=Sample()).server.address)


def test_keys_and_headers_are_sent():
    with serving(Others()) as server:
        openai(server.url, "toy", policy=Sample(), api_key="abc-1", headers={"X-Team": "blue"}, extra_body={
            "user": "me"}).generate("123", SamplingParams(max_tokens=2))
        sent, body = server.headers[-1], server.bodies[-1]
    assert sent["Authorization"] == "Bearer abc-1" and sent["X-Team"] == "blue"
    assert body["user"] == "me" and body["model"] == "toy"


def test_a_server_that_is_not_there():
    with pytest.raises(ServerError, match="could not be reached"):
        openai("http://127.0.0.1:9", policy=Sample(), retries=0).generate("123")


def test_a_server_of_another_vocabulary_needs_a_reward_with_a_tokenizer(ours):
    reward = CausalReward(ToyModel(5, seed=2, head="reward").decoder())
    with pytest.raises(RewardError, match="has no tokenizer.json"):
        openai(ours.url, policy=SOFT, reward=reward).generate("123", SamplingParams(max_tokens=4))
