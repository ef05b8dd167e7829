"""A reward behind HTTP: what is sent, what is read, and all that a server may do wrong."""

from __future__ import annotations

import gc
import logging
import math
import socket
import subprocess
import sys
import threading
import time
import weakref

import pytest

import stars
from building import config_of
from reward_server import (
    breaks_off,
    by_token,
    classify,
    drips,
    hangs_up,
    items,
    late,
    pooling,
    reward_of,
    says,
    serving,
    text_of,
)
from stars.model.tokenizer import load_tokenizer
from stars.prompt import parse_prompt
from stars.reward import http_calls
from stars.reward.base import Candidate, ContextFull
from toy import facts

pytestmark = pytest.mark.usefixtures("one_torch_thread")

CONFIG = config_of()
POLICY = stars.STARS(segment_size=4, max_attempts=5, alpha=0.3, beta=0.5, reward_threshold=2.0, width=3)
PARAMS = stars.SamplingParams(max_tokens=12, n=2, seed=3)
MESSAGES = [{"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "what is "}, {"type": "text", "text": "a dog?"}]}]
HUGE = 5000
"""Bytes of an answer at most, in these tests."""


@pytest.fixture(autouse=True)
def small_bounds(monkeypatch):
    monkeypatch.setattr(http_calls, "MAX_ANSWER", HUGE)
    monkeypatch.setattr(http_calls, "FIRST_PAUSE", 0.01)


@pytest.fixture(scope="module")
def tokenizer(lm):
    return load_tokenizer(lm)


def said(text: str) -> float:
    """What is sent lacks half a character at its end."""
    return reward_of(text.rstrip("\ufffd"))


def remote(server, **options) -> stars.RemoteReward:
    return stars.RemoteReward(server.url, **({"timeout": 5.0, "retries": 1} | options))


def scores(reward, prompt, texts: list[str]) -> list:
    """What it says of responses to a prompt, once it is there."""
    session = reward.open(prompt, 30)
    return [scored.reward.result(timeout=20) for scored in reward.score([Candidate(session, [], text)
                                                                       for text in texts])]


@pytest.fixture
def ask(tokenizer):
    """ask(server, *texts, **options): scores of responses to "A dog"."""
    def call(server, *texts: str, prompt="A dog", **options):
        reward = remote(server, **options)
        reward.bind(tokenizer, tokenizer.vocab_size, CONFIG)
        return scores(reward, parse_prompt(prompt, tokenizer, 10**6), list(texts))
    return call


# -- what is sent and read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("api, usual", [("classify", classify), ("pooling", pooling), ("pooling", by_token)])
def test_an_engine_decodes_as_with_a_callable_that_says_the_same(lm, api, usual):
    """The same rewards, so the same text: with a server that answers in another order, and candidates in batches."""
    callable_ = stars.FunctionReward(lambda prompt, texts: [said(prompt + text) for text in texts], batch_size=2)
    prompts = ["The dog sleeps", "A girl"]
    wanted = stars.Engine(lm, callable_, cache_tokens=1024).generate(prompts, PARAMS, POLICY, use_tqdm=False)
    with serving(usual) as server:
        reward = remote(server, model="rm", api=api, batch_size=2)
        found = stars.Engine(lm, reward, cache_tokens=1024).generate(prompts, PARAMS, POLICY, use_tqdm=False)
        assert [facts(one) for one in found] == [facts(one) for one in wanted]
        assert [one.prompt_reward for one in found] == [one.prompt_reward for one in wanted]
        assert set(server.paths) == {f"/{api}"} and max(len(body["input"]) for body in server.bodies) == 2
        assert all(body.items() >= {"model": "rm", "use_activation": False}.items() for body in server.bodies)
        assert all(text.startswith(tuple(prompts)) for body in server.bodies for text in body["input"])
        assert server.connections <= 8 < len(server.bodies)  # they stay open


@pytest.mark.parametrize("given, template, expected", [
    ("A dog", "auto", {"input": ["A dog runs"]}),
    ("A dog", "chat", {"messages": [{"role": "user", "content": "A dog"}, {"role": "assistant", "content": " runs"}]}),
    ({"messages": MESSAGES}, "auto", {"messages": [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "what is a dog?"},
        {"role": "assistant", "content": " runs"}]}),
])
def test_bodies(ask, given, template, expected):
    with serving() as server:
        [reward] = ask(server, " runs\ufffd", prompt=given, template=template, extra_body={"priority": 3})
        assert server.bodies == [expected | {"use_activation": False, "priority": 3}]
        assert reward == reward_of(text_of(expected)[0])


def test_a_rendered_template_gets_no_special_tokens_twice(ask, tokenizer):
    with serving() as server:
        ask(server, " runs", prompt={"messages": MESSAGES}, template="raw", use_activation=True)
        rendered = parse_prompt({"messages": MESSAGES}, tokenizer, 10**6).text
        assert server.bodies == [{"input": [rendered + " runs"], "add_special_tokens": False, "use_activation": True}]


def test_messages_go_side_by_side(ask):
    """A call each, at most so many at once."""
    def slow(handler, body):
        time.sleep(0.05)
        classify(handler, body)
    with serving(slow) as server:
        texts = [f" runs {number}" for number in range(7)]
        found = ask(server, *texts, template="chat", max_concurrency=3)
        assert found == [reward_of(f"<user>A dog<assistant>{text}") for text in texts]
        assert len(server.bodies) == 7 and server.busiest == 3


@pytest.mark.parametrize("label, reward", [(0, 0.25), (2, -1.5)])
def test_the_label_is_chosen(ask, label, reward):
    with serving(says(items([0.25, 0.5, -1.5]))) as server:
        assert ask(server, " runs", label=label) == [reward]


def test_addresses():
    """The API's name is put behind what is given, once."""
    def address(url: str) -> str:
        return str(stars.RemoteReward(url, api="pooling").address)
    assert address("http://rm") == "http://rm:80/pooling"
    assert address("https://rm.example/a/") == "https://rm.example:443/a/pooling"
    assert address("http://[::1]:81/pooling") == "http://[::1]:81/pooling"


# -- what goes wrong ----------------------------------------------------------------------------------------------


WRONG = {
    "500": (says({"error": {"message": "no GPU left\n"}}, 500), "answered with status 500: no GPU left$"),
    "429": (says(b"slow down", 429), "answered with status 429$"),
    "a long pause": (says({}, 429, Retry_After="1000"),
                     "answered with status 429, and total_timeout=20 seconds end before "),
    "401": (says({"error": "who are you?"}, 401), "answered with status 401: who are you[?]$"),
    "404": (says({"detail": "Not Found"}, 404), "answered with status 404: Not Found$"),
    "a redirect": (says(b"", 307, Location="/elsewhere"),
                   "answered with status 307: redirects are not followed, give the address"),
    "late": (late(0.8), "did not answer within 0.3 seconds, 2 times$"),
    "a drip": (drips, "did not answer within 0.3 seconds, 2 times$"),
    "no answer": (hangs_up, r"could not be reached, or broke off \(RemoteDisconnected: .*\), 2 times$"),
    "half an answer": (breaks_off, r"could not be reached, or broke off \(ConnectionResetError: .*\), 2 times$"),
    "no JSON": (says(b"<html>"), r"answered without data\[\].probs: is it a server of the classify API[?]$"),
    "deep JSON": (says(b"[" * 4000), r"answered without data\[\].probs"),
    "other JSON": (says({"data": [{"index": 0, "embedding": [1.0]}]}), r"answered without data\[\].probs"),
    "a list": (says([0.5]), r"answered without data\[\].probs"),
    "too few": (says(items(0.5)), r"answered with 1 rewards of indices \[0\] for 2 texts$"),
    "too many": (says(items(0.5, 1.0, 2.0)), r"answered with 3 rewards of indices \[0, 1, 2\] for 2 texts$"),
    "twice the same": (says({"data": items(0.5)["data"] * 2}),
                       r"answered with 2 rewards of indices \[0\] for 2 texts$"),
    "other indices": (says(items(0.5, 1.0, first=1)), r"answered with 2 rewards of indices \[1, 2\] for 2 texts$"),
    "NaN": (says(items(math.nan, math.nan)), "answered with nan where a finite number is expected$"),
    "infinity": (says(items(-math.inf, math.inf)), "answered with -inf where a finite number is expected$"),
    "a word": (says(items("good", "bad")), "answered with 'good' where a finite number is expected$"),
    "true": (says(items(True, True)), "answered with True where a finite number is expected$"),
    "a number too large": (says(b'{"data": [{"index": 0, "probs": [1' + b"0" * 400 + b"]}, "
                                b'{"index": 1, "probs": [1]}]}'),
                           "answered with 1000.*… where a finite number is expected$"),
    "no number": (says(items([], [])), "answered with list where the numbers of a text are expected$"),
    "hidden states": (says(items([0.5] * 30, [0.5] * 30)), "answered with 30 numbers for a text: choose the one"),
    "a flood": (says(b" " * (HUGE + 1)), "answered with more than 0 MiB$"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_server_that_does_wrong(ask, case):
    """One sentence, which names the address; tried again only where that may help."""
    behave, message = WRONG[case]
    begin = time.monotonic()
    with serving(behave) as server:
        first, second = ask(server, " runs", " sleeps", timeout=0.3, total_timeout=20.0)
        assert isinstance(first, stars.RewardError) and type(second) in (stars.RewardError, float)
        with pytest.raises(stars.RewardError, match=f"^the reward server at {server.url}/classify " + message):
            raise first
        again = case in ("500", "429", "late", "a drip", "no answer", "half an answer")
        assert len(server.bodies) == 1 + again
    assert time.monotonic() - begin < 15.0


@pytest.mark.parametrize("trouble", [says({}, 500), says({}, 503, Retry_After="0.05"), says({}, 429), late(0.6),
                                     hangs_up, breaks_off])
def test_the_next_try_may_succeed(ask, trouble):
    with serving(classify, trouble, trouble) as server:
        assert ask(server, " runs", timeout=0.3, retries=2) == [reward_of("A dog runs")]
        assert len(server.bodies) == 3


def test_nobody_listens(ask):
    """As long as it takes to be tried so many times; and no longer than is said in all."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        reward = stars.RemoteReward(f"http://127.0.0.1:{taken.getsockname()[1]}", retries=2)
        server = type("Server", (), {"url": f"http://127.0.0.1:{taken.getsockname()[1]}"})
        assert "ConnectionRefusedError" in str(ask(server, " runs", retries=2)[0])
        begin = time.monotonic()
        [error] = ask(server, " runs", retries=10**6, total_timeout=0.3)
        assert "and total_timeout=0.3 seconds end before another try" in str(error)
        assert time.monotonic() - begin < 20.0
    assert repr(reward).startswith('RemoteReward("http://127.0.0.1:')


def test_what_was_kept_open_and_closed_by_the_server_is_no_try(tokenizer):
    """A server may close a connection at any time between calls: the next call finds out, and costs no try."""
    def once(handler, body):
        classify(handler, body)
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True
    with serving(once) as server:
        reward = remote(server, retries=0, max_concurrency=1)
        reward.bind(tokenizer, tokenizer.vocab_size, CONFIG)
        for number in range(3):
            [found] = scores(reward, parse_prompt("A dog", tokenizer, 10**6), [f" runs {number}"])
            assert found == reward_of(f"A dog runs {number}")
            time.sleep(0.05)
        assert server.connections == 3


def test_a_batch_with_a_text_that_is_refused(ask):
    """It is asked text by text, and the others get their rewards."""
    def strict(handler, body):
        if any("long" in text for text in text_of(body)):
            return says({"error": {"message": "This model's maximum context length is 9 tokens"}}, 400)(handler, body)
        return classify(handler, body)
    with serving(strict) as server:
        found = ask(server, " runs", " is long", " sleeps")
        assert [found[0], found[2]] == [reward_of("A dog runs"), reward_of("A dog sleeps")]
        assert type(found[1]) is ContextFull and "context length is 9 tokens: lower max_tokens" in str(found[1])
        assert [len(body["input"]) for body in server.bodies][0] == 3 and len(server.bodies) == 4


def test_a_text_that_is_too_long_ends_its_response(lm):
    """As with other rewards: what was committed before stays, and the response has its full length."""
    def strict(handler, body):
        if max(map(len, text_of(body))) > 40:
            return says({"message": "the prompt is longer than max_model_len"}, 400)(handler, body)
        return classify(handler, body)
    with serving(strict) as server:
        engine = stars.Engine(lm, remote(server), cache_tokens=1024)
        params = stars.SamplingParams(max_tokens=60, seed=1, ignore_eos=True)
        [output] = engine.generate("The dog sleeps", params, POLICY, use_tqdm=False)
    [completion] = output.outputs
    assert completion.error is None and completion.finish_reason == "length" and 0 < len(completion.token_ids) < 60
    assert completion.reward == said("The dog sleeps" + completion.text)


@pytest.mark.parametrize(("wrong", "message"), [
    (says({"error": {"message": "no girls"}}, 403), "answered with status 403: no girls"),
    (late(2.0), "did not answer within 1 seconds"), (hangs_up, "could not be reached, or broke off (Remote"),
    (says(b"<html>"), "answered without data[].probs")], ids=["refused", "late", "down", "nonsense"])
def test_who_is_refused_ends_alone(lm, wrong, message):
    """One prompt's texts are refused, answered too late, not at all or wrongly from its second segment on: it keeps
    what was committed, and the other goes on as if it were alone."""
    def moody(handler, body):
        if any(text.startswith("A girl") and len(text) > 30 for text in text_of(body)):
            return wrong(handler, body)
        return classify(handler, body)
    params = stars.SamplingParams(max_tokens=40, seed=3, ignore_eos=True)
    with serving(moody) as server, pytest.warns(UserWarning, match="1 of 2"):
        engine = stars.Engine(lm, remote(server, timeout=1.0, retries=0), cache_tokens=1024)
        [alone] = engine.generate("The dog sleeps", params, POLICY, use_tqdm=False)
        refused, other = engine.generate(["A girl", "The dog sleeps"], params, POLICY, use_tqdm=False)
        engine.check_integrity()
    [completion] = refused.outputs
    assert completion.finish_reason == "error" and 0 < len(completion.token_ids) < 40 and completion.text
    assert completion.error.startswith(f"the reward server at {server.url}/classify {message}")
    assert facts(other) == facts(alone) and other.outputs[0].finish_reason == "length"


def test_a_slow_server_stalls_only_who_waits_for_it(lm):
    """One prompt's answers are held back: the other ends meanwhile, to the text that it has alone."""
    held = threading.Event()

    def slow(handler, body):
        if any(text.startswith("A girl") for text in text_of(body)):
            held.wait(20)
        classify(handler, body)
    with serving(slow) as server:
        engine = stars.Engine(lm, remote(server, timeout=30.0), cache_tokens=1024)
        [alone] = engine.generate("The dog sleeps", PARAMS, POLICY, use_tqdm=False)
        first, second = (engine.add_request(prompt, PARAMS, POLICY) for prompt in ("A girl", "The dog sleeps"))
        outputs: dict = {}
        while not (second in outputs and outputs[second].finished):
            outputs |= {output.request_id: output for output in engine.step()}
        assert facts(outputs[second]) == facts(alone) and first not in outputs
        held.set()
        while engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in engine.step()}
        assert all(one.error is None and one.token_ids for one in outputs[first].outputs)
        engine.check_integrity()


def test_a_server_that_goes_down_and_comes_back(lm):
    with serving() as server, pytest.warns(UserWarning, match="1 of 1"):
        engine = stars.Engine(lm, remote(server, retries=0), cache_tokens=1024)
        [before] = engine.generate("The dog sleeps", PARAMS, POLICY, use_tqdm=False)
        server.usual = hangs_up
        [down] = engine.generate("The dog sleeps", PARAMS, POLICY, use_tqdm=False)
        assert {one.finish_reason for one in down.outputs} == {"error"}
        server.usual = classify
        [after] = engine.generate("The dog sleeps", PARAMS, POLICY, use_tqdm=False)
        assert facts(after) == facts(before)
        engine.check_integrity()


# -- what must not happen -----------------------------------------------------------------------------------------


def test_nobody_is_sent_elsewhere(ask, monkeypatch):
    """No redirect, and no proxy of the environment, whatever it says."""
    with serving() as elsewhere:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, elsewhere.url)
        monkeypatch.delenv("no_proxy", raising=False)
        with serving(says(b"", 308, Location=f"{elsewhere.url}/classify")) as server:
            assert "status 308" in str(ask(server, " runs")[0])
            server.usual = classify
            assert ask(server, " runs") == [reward_of("A dog runs")]
        assert not elsewhere.bodies


@pytest.mark.parametrize("message, problem", [
    ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://inside/secret"}}]}, "image_url"),
    ({"role": "user", "content": "hello", "tool_calls": [{"id": "1"}]}, "tool_calls"),
    ({"role": 3, "content": "hello"}, "role is 3"),
])
def test_only_texts_of_a_request_are_sent(lm, message, problem):
    """What could make a server fetch an address, or what a chat template would read besides texts, is refused."""
    with serving() as server:
        reward = remote(server, template="chat")
        prompt = parse_prompt("hello", load_tokenizer(lm), 10**6)._replace(given=[message])
        with pytest.raises(stars.RequestError, match=problem):
            reward.check(prompt, 8)
        assert not server.bodies


def test_a_key_is_sent_and_never_told(ask, monkeypatch, caplog):
    """Not in errors, though the server repeats it, nor by repr or in a log."""
    key, other = "sk-0123456789abcdef", "another-secret"
    monkeypatch.setenv("RM_KEY", f" {key}\n")
    caplog.set_level(logging.DEBUG)
    echo = says({"error": {"message": f"{key} is no key, nor is {other}"}}, 401)
    with serving(echo, hangs_up) as server:
        options = dict(api_key_env="RM_KEY", headers={"X-Team": other})
        [error] = ask(server, " runs", **options)
        assert server.headers[0]["Authorization"] == f"Bearer {key}" and server.headers[0]["X-Team"] == other
        assert str(error).endswith("answered with status 401: *** is no key, nor is ***")
        shown = repr(remote(server, **options)) + str(error) + caplog.text
    assert "is asked again" in caplog.text and key not in shown and other not in shown


@pytest.mark.parametrize("given, problem", [
    (dict(url="ftp://host"), "url is 'ftp://host', it must be an address"), (dict(url="host:80"), "must be an address"),
    (dict(url=3), "url is 3"), (dict(url="http://"), "must be an address"), (dict(url="http://a b"), "must be an addr"),
    (dict(url="http://a..b"), "is not an address"), (dict(url="http://host:99999"), "is not an address"),
    (dict(url="http://host?key=1"), "must be an address"),
    (dict(url="http://me:hush@host"), "url has a user name: give the key by api_key_env"),
    (dict(api="score"), 'api is \'score\', it must be "classify" or "pooling"'), (dict(template="jinja"), "template"),
    (dict(model=3), "model is 3"), (dict(label=-1), "label is -1"), (dict(batch_size=0), "batch_size is 0"),
    (dict(timeout=0), "timeout is 0, it must be seconds"), (dict(timeout=math.nan), "timeout is nan"),
    (dict(total_timeout=math.inf), "total_timeout is inf"), (dict(retries=-1), "retries is -1"),
    (dict(max_concurrency=0), "max_concurrency is 0"), (dict(use_activation="no"), "use_activation is 'no'"),
    (dict(api_key_env="NO_SUCH_KEY"), "and there is none of that name"), (dict(api_key_env=3), "api_key_env is int"),
    (dict(api_key_env="BAD_KEY"), "what it names cannot be sent"), (dict(headers={"a b": "c"}), "a name that is none"),
    (dict(headers={"X-Key": "hush\r\nX-Other: 1"}), "a value of X-Key that cannot be sent"),
    (dict(headers=["X-Key"]), "headers is list"), (dict(extra_body={"input": "x"}), "extra_body must be a dict"),
    (dict(extra_body={"a": {1, 2}}), "extra_body is no JSON"),
])
def test_settings_are_checked_at_once(monkeypatch, given, problem):
    monkeypatch.setenv("BAD_KEY", "hush hush")
    with pytest.raises(stars.RewardError, match=problem) as caught:
        stars.RemoteReward(**({"url": "http://host"} | given))
    assert "hush" not in str(caught.value)


def test_a_model_without_a_tokenizer_is_refused(tiny_model):
    with pytest.raises(stars.RewardError, match="no tokenizer.json, so the remote reward cannot be given text"):
        stars.Engine(tiny_model(family="llama"), stars.RemoteReward("http://host"))


# -- threads ------------------------------------------------------------------------------------------------------


def reward_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "stars-reward"]


def test_threads_and_connections_end_with_the_reward(tokenizer):
    """Those that wait for work, and one that waits for a server: as soon as it has what it asked for."""
    before = set(reward_threads())

    def ours() -> set[threading.Thread]:
        return set(reward_threads()) - before

    with serving(classify, classify, classify, late(0.3)) as server:
        reward = remote(server, max_concurrency=2)
        reward.bind(tokenizer, tokenizer.vocab_size, CONFIG)
        prompt = parse_prompt("A dog", tokenizer, 10**6)
        for _ in range(2):
            scores(reward, prompt, [" runs"])
        assert 1 <= len(ours()) <= 2 and 1 <= len(reward._poster._idle) <= 2
        asked = reward.score([Candidate(reward.open(prompt, 8), [], " sleeps")])
        gone, lines = weakref.ref(reward._poster), reward._poster._idle
        del reward
        assert asked[0].reward.result(timeout=5) == reward_of("A dog sleeps")
        end = time.monotonic() + 5.0
        while time.monotonic() < end and (gone() is not None or ours()):
            gc.collect()
            time.sleep(0.01)
        assert gone() is None and not ours()
        assert [line._connection.sock for line in lines] == [None] * len(lines)


def test_an_interrupt_while_a_server_is_asked(lm):
    """What was asked is dropped, and the next call draws the same again."""
    with serving() as server:
        engine = stars.Engine(lm, remote(server), cache_tokens=1024)
        [wanted] = engine.generate("The dog sleeps", PARAMS, POLICY, use_tqdm=False)
        score = engine.reward.score

        def interrupted(candidates):
            score(candidates)
            raise KeyboardInterrupt
        request = engine.add_request("The dog sleeps", PARAMS, POLICY)
        engine.reward.score = interrupted
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        engine.reward.score = score
        outputs = []
        while engine.has_unfinished_requests():
            outputs = engine.step()
        [output] = [one for one in outputs if one.request_id == request]
        assert facts(output) == facts(wanted)
        engine.check_integrity()


def test_forks_and_the_end_of_a_process(tmp_path):
    """After a fork the child has neither the parent's threads nor its connections; and a process does not wait for a
    server that is silent."""
    program = tmp_path / "forks.py"
    program.write_text("""
import os, sys
import stars
from stars.prompt import Prompt
from stars.reward.base import Candidate

def ask(reward):
    session = reward.open(Prompt('a', [1], 'a'), 8)
    return reward.score([Candidate(session, [], 'b')])[0].reward

reward = stars.RemoteReward(sys.argv[1], max_concurrency=1)
first = ask(reward).result(timeout=20)
child = os.fork()
if child == 0:
    os._exit(0 if ask(reward).result(timeout=20) == first else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), first == ask(reward).result(timeout=20))
silent = stars.RemoteReward(sys.argv[2], timeout=600)
held = ask(silent)
print('asked', held.done())
""")
    with serving() as server, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        done = subprocess.run([sys.executable, "-W", "ignore", str(program), server.url,
                               f"http://127.0.0.1:{silent.getsockname()[1]}"], capture_output=True, text=True,
                              timeout=60, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "0 True\nasked False\n", "")
        assert server.connections == 2  # one of each process
