"""Sessions of every kind of reward: forks, several winners of one, histories that nobody scored, room to grow.

Expected values come from a session of its own that is asked for the whole response at once.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import stars
from building import config_of
from process_models import source_of, write_process_model
from stars.errors import RewardError
from stars.kernels.types import Draft
from stars.model.tokenizer import Tokenizer, load_tokenizer
from stars.prompt import Prompt, parse_prompt
from stars.reward.base import Candidate, Reward, TrailingCandidate, with_parts
from stars.reward.session import SessionReward
from stars.target import CPU, CUDA
from test_encoder_rewards import write_encoder
from tiny_heads import write_head
from tiny_models import BOS

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TOLERANCE = 1e-4  # rewards of order 1 to 10, float32
CONFIG = config_of(cache_tokens=1024, page_size=4, max_num_seqs=4, max_num_lanes=8, max_segment_size=4)
LONGER = dataclasses.replace(CONFIG, max_segment_size=24)  # whose slabs hold tokens besides that nobody scored
PROMPT = "The quick brown fox"
WORDS = (" jumps", " over", " the lazy", " dog", ", and", " sleeps on", "!")
LONG = " zq" * 18  # more tokens than a slab of 40 holds

CAUSAL = {
    "same": dict(), "same, eos": dict(close="eos"), "same, chat": dict(template="chat", close="template"),
    "other": dict(), "other, eos": dict(close="eos"), "same, mlp": dict(), "same, gated": dict(),
}
PROCESS = {"process, tags": "mlp", "process, separators": "token"}
PAGED = [*CAUSAL, *PROCESS]  # of which a session has pages
COMPOSITE = ["sum of two models", "sum with a callable", "sum of sums", "cached", "implicit"]
KINDS = [*PAGED, "encoder", "function of ids", "function of text", *COMPOSITE]


class Bench:
    """A reward bound to the tokenizer of a language model, and what it says of whole responses."""

    def __init__(self, reward: Reward, tokenizer: Tokenizer, config=CONFIG):
        reward.bind(tokenizer, tokenizer.vocab_size, config)
        self.reward, self.tokenizer = reward, tokenizer
        self.prompt: Prompt = parse_prompt(PROMPT, tokenizer, 10**6)

    def open(self):
        self.reward.check(self.prompt, 30)
        session = self.reward.open(self.prompt, 30)
        self.reward.start([session])
        return session

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def score(self, *asked: tuple[object, list[int]]) -> list:
        return self.reward.score([Candidate(session, ids, self.tokenizer.decode(ids)) for session, ids in asked])

    def whole(self, ids: list[int]) -> float:
        session = self.open()
        [one] = self.score((session, ids))
        self.reward.discard(one.handle)
        self.reward.close(session)
        return one.reward

    def check(self, scored, ids: list[int]) -> None:
        assert scored.reward == pytest.approx(self.whole(ids), abs=TOLERANCE), self.tokenizer.decode(ids)

    def all_free(self) -> None:
        self.reward.check_integrity()
        for cache in [part.cache for part in with_parts(self.reward) if isinstance(part, SessionReward)]:
            assert (cache.num_free_pages, cache.num_free_slabs) == (cache.num_pages, cache.num_slabs)


@pytest.fixture(scope="module")
def lm(tiny_model) -> Tokenizer:
    return load_tokenizer(tiny_model(family="llama", tokenizer=True, chat_template=True))


@pytest.fixture(scope="module", params=[CPU.reward_lag, CUDA.reward_lag], ids=["lagging", "whole"])
def lag(request) -> int:
    """Last tokens that pages lack: as on the CPU, as on a GPU."""
    return request.param


@pytest.fixture(scope="module")
def process_models(tiny_model, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("process")
    return {kind: write_process_model(root / kind, source_of(tiny_model, kind), kind) for kind in PROCESS.values()}


@pytest.fixture(scope="module")
def bench(tiny_model, tmp_path_factory, lm, lag, process_models):
    """bench(kind): a reward of that kind, of its own."""
    same = tiny_model(family="qwen2", head="reward", tokenizer=True, chat_template=True)
    other = tiny_model(family="llama", head="reward", tokenizer=True, chat_template=True, tokenizer_seed=2, seed=7)
    language_models = [tiny_model(family=family, tokenizer=True, chat_template=True, seed=5)
                       for family in ("llama", "qwen2")]
    encoder: Path = write_encoder(tmp_path_factory.mktemp("encoder"), "Bert", max_position_embeddings=150)

    heads = {}
    for kind in ("mlp", "gated"):
        heads[kind] = tmp_path_factory.mktemp(kind)
        write_head(heads[kind], kind, tokenizer=True, chat_template=True)

    def get(kind: str, config=CONFIG) -> Bench:
        return Bench(made(kind), lm, dataclasses.replace(config, target=config.target._replace(reward_lag=lag)))

    def made(kind: str) -> Reward:
        if kind in CAUSAL:
            choice = {"prompt_pattern": [BOS]} if kind == "same, gated" else "auto"
            directory = heads.get(kind.split(", ")[-1], same if kind.startswith("same") else other)
            reward = stars.CausalReward(directory, head=choice, **CAUSAL[kind])
        elif kind in PROCESS:  # every word a step, or two, as segments end where they like
            reward = stars.ProcessReward(process_models[PROCESS[kind]], step_separator="e", aggregate="prod",
                                         template="raw")
        elif kind == "sum of two models":
            reward = stars.WeightedReward([(made("same, eos"), 0.75), (made("other"), -2.0)])
        elif kind == "sum with a callable":
            reward = stars.WeightedReward([(made("function of text"), 0.125), (made("same"), 1.0)])
        elif kind == "sum of sums":
            reward = stars.WeightedReward([(made("sum with a callable"), 1.0), (made("other, eos"), 0.5),
                                           (made("cached"), 0.25), (made("implicit"), 0.5)])
        elif kind == "implicit":
            reward = stars.ImplicitReward(*language_models, beta=0.5)
        elif kind == "cached":
            reward = stars.CachedReward(made("function of ids"), maxsize=3)
        elif kind == "encoder":
            reward = stars.EncoderReward(encoder, batch_size=1)
        elif kind == "function of ids":
            reward = stars.FunctionReward(lambda _, all_ids: [sum(ids) % 31 - 0.1 * len(ids) for ids in all_ids],
                                          inputs="ids")
        else:
            reward = stars.FunctionReward(lambda prompt, texts: [hash_of(prompt + text) for text in texts])
        return reward

    return get


def hash_of(text: str) -> float:
    return float(sum(place * ord(letter) for place, letter in enumerate(text, 1)) % 97)


@pytest.mark.parametrize("kind, pieces", [(kind, (" jumps over", " sleeps")) for kind in KINDS] + [
    ("same", (LONG, LONG + " fox")), ("same, eos", (" dog", LONG)), ("same, chat", (LONG, "!")),
    ("other", (" dog", LONG)), ("other, eos", (LONG, LONG + "!")), ("process, tags", (LONG, LONG + " fox")),
    ("process, separators", (" dog", LONG)), ("implicit", (LONG, LONG + " fox"))])
def test_two_winners_of_one_session(bench, kind, pieces):
    """One goes to the session, the other to its fork: from there each has a history of its own, and its own end."""
    made = bench(kind)
    reward, session = made.reward, made.open()
    start = made.ids(" the little girl")
    [first] = made.score((session, start))
    reward.commit([(session, first.handle)])
    texts = [start + made.ids(piece) for piece in (*pieces, " on")]
    scored = made.score(*((session, ids) for ids in texts))
    for one, ids in zip(scored, texts, strict=True):
        made.check(one, ids)
    if kind in CAUSAL:
        assert [one.handle.slab is None for one in scored] == [piece.startswith(LONG) for piece in pieces] + [False]
    fork = reward.fork(session)
    assert fork is not session and reward.reserve(fork, 30)
    reward.discard(scored[2].handle)
    reward.commit([(fork, scored[0].handle), (session, scored[1].handle)])
    held = {id(fork): (fork, texts[0]), id(session): (session, texts[1])}
    for word in WORDS[:3]:
        asked = [(holder, ids + made.ids(word)) for holder, ids in held.values()]
        scored = made.score(*asked)
        for one, (_, ids) in zip(scored, asked, strict=True):
            made.check(one, ids)
        reward.commit([(holder, one.handle) for (holder, _), one in zip(asked, scored, strict=True)])
        held = {id(holder): (holder, ids) for holder, ids in asked}
        reward.check_integrity()
    reward.close(session)
    ids = held[id(fork)][1] + made.ids(" dog")
    [last] = made.score((fork, ids))
    made.check(last, ids)
    reward.discard(last.handle)
    reward.close(fork)
    made.all_free()


@pytest.mark.parametrize("kind", KINDS)
def test_forks_of_forks_before_anything_was_committed(bench, kind):
    """Three of one session, whose prompt's last page they share until each writes."""
    made = bench(kind)
    reward, session = made.reward, made.open()
    texts = [made.ids(word) for word in WORDS[:3]]
    scored = made.score(*((session, ids) for ids in texts))
    fork = reward.fork(session)
    holders = [session, fork, reward.fork(fork)]
    reward.commit([(holder, one.handle) for holder, one in zip(holders, scored, strict=True)])
    asked = [(holder, ids + made.ids(" the forest")) for holder, ids in zip(holders, texts, strict=True)]
    scored = made.score(*asked)
    for one, (holder, ids) in zip(scored, asked, strict=True):
        made.check(one, ids)
        reward.discard(one.handle)
        reward.close(holder)
    made.all_free()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropped, told", [(1, False), (4, False), (4, True)])
def test_a_part_of_a_candidate_and_tokens_that_nobody_scored(bench, lag, kind, dropped, told):
    """The handle is discarded, and the next score runs what the session has not seen; also twice in a row, and less
    where the session is told of the response meanwhile."""
    made = bench(kind, LONGER)
    reward, session = made.reward, made.open()
    response = made.ids(" dogs")
    [first] = made.score((session, response))
    reward.commit([(session, first.handle)])
    known = len(response) - lag  # what lies in no page is run again
    for word in WORDS[:2]:
        [one] = made.score((session, response + made.ids(word + " lived near")))
        reward.discard(one.handle)
        response = response + made.ids(word + " lived near")[:-dropped] + made.ids(" 3")
        if told:
            reward.resume(session, response, made.tokenizer.decode(response))
            known = len(response) - lag
    scored = made.score(*((session, response + made.ids(word)) for word in WORDS))
    for word, one in zip(WORDS, scored, strict=True):
        made.check(one, response + made.ids(word))
        if kind.startswith("same"):
            assert one.tokens_run == len(response + made.ids(word)) - known + len(session.frame.closing)
    reward.commit([(session, scored[2].handle)])
    for one in scored[:2] + scored[3:]:
        reward.discard(one.handle)
    [last] = made.score((session, response + made.ids(WORDS[2] + " on")))
    made.check(last, response + made.ids(WORDS[2] + " on"))
    if kind.startswith("same"):
        assert last.tokens_run == len(made.ids(" on")) + lag + len(session.frame.closing)
    reward.discard(last.handle)
    reward.close(session)
    made.all_free()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_segment_that_is_taken_back(bench, lag, kind, deterministic):
    """The session goes back to the response before it, and to the prompt alone; nothing of either is run again."""
    made = bench(kind, dataclasses.replace(CONFIG, deterministic=deterministic))
    reward, session = made.reward, made.open()
    responses = [made.ids(text) for text in ("", " dogs", " dogs sleep on", " dogs sleep on the lazy")]
    for response in responses[1:]:
        [one] = made.score((session, response))
        reward.commit([(session, one.handle)])
    for before in (responses[2], responses[0]):
        reward.resume(session, before, made.tokenizer.decode(before))
        reward.check_integrity()
        scored = made.score(*((session, before + made.ids(word)) for word in WORDS[:3]))
        for word, one in zip(WORDS, scored, strict=False):
            made.check(one, before + made.ids(word))
            if kind.startswith("same"):
                assert one.tokens_run == len(made.ids(word)) + lag + len(session.frame.closing)
            reward.discard(one.handle)
    [first] = made.score((session, made.ids(WORDS[0])))
    reward.commit([(session, first.handle)])
    [last] = made.score((session, made.ids(WORDS[0] + WORDS[1])))
    made.check(last, made.ids(WORDS[0] + WORDS[1]))
    reward.discard(last.handle)
    reward.close(session)
    made.all_free()


@pytest.mark.parametrize("kind", ["same", "same, eos", "same, chat", "same, gated"])
@pytest.mark.parametrize("unseen, lanes", [(0, (2, 0, 1)), (0, (3, 2, 0, 3, 1)), (1, (2, 3, 0, 1)), (5, (2, 0, 1))])
def test_scores_that_trail_a_draft_are_those_of_the_host(bench, kind, unseen, lanes, operations):
    """The same spans, their tokens filled in on the device: so also where the response has tokens nobody scored, and
    where a lane drew nothing but the end, so that a pass may have no row to read its reward at."""
    made = bench(kind, LONGER)
    reward, session = made.reward, made.open()
    response = made.ids(" dogs sleep")
    [first] = made.score((session, response))
    reward.commit([(session, first.handle)])
    response = response + made.ids(" lived near the forest, and on")[:unseen]
    drawn = [made.ids(text)[:4] for text in (" the lazy fox", " jumps", " girl on 3", "")]
    draft = Draft(torch.tensor([(ids + [9] * 4)[:4] for ids in drawn], dtype=torch.int32),
                  torch.tensor([len(ids) or 1 for ids in drawn], dtype=torch.int32),
                  torch.tensor([[-1, -1]] * 3 + [[8, 9]], dtype=torch.int32))
    asked = [TrailingCandidate(session, response, lane, 4) for lane in lanes]
    trailing = reward.score_trailing(draft, asked)
    trailing.launch()
    whole = [response + drawn[candidate.lane] for candidate in asked]
    trailed = trailing.results(whole)
    scored = made.score(*((session, ids) for ids in whole))
    for mine, wanted in zip(trailed, scored, strict=True):
        assert mine.reward == (wanted.reward if operations == "libstars" else pytest.approx(wanted.reward, abs=1e-5))
        assert mine[1:3] == wanted[1:3] and mine.handle._replace(slab=0) == wanted.handle._replace(slab=0)
        reward.discard(wanted.handle)
    fork = reward.fork(session)
    first, second = lanes.index(2), lanes.index(1)
    reward.commit([(session, trailed[first].handle), (fork, trailed[second].handle)])
    for index, one in enumerate(trailed):
        if index not in (first, second):
            reward.discard(one.handle)
    for holder, ids in ((session, whole[first]), (fork, whole[second])):
        [one] = made.score((holder, ids + made.ids(" dog")))
        made.check(one, ids + made.ids(" dog"))
        reward.discard(one.handle)
        reward.close(holder)
    made.all_free()


def test_a_response_far_behind_is_not_scored_after_its_draft(bench):
    """More unscored tokens than a slab holds besides a segment: the host's way, which knows longer texts."""
    made = bench("same")
    session = made.open()
    response = made.ids(LONG)
    draft = Draft(*(torch.zeros(shape, dtype=torch.int32) for shape in ((1, 4), (1,), (1, 2))))
    assert made.reward.score_trailing(draft, [TrailingCandidate(session, response, 0, 4)]) is None
    assert made.reward.cache.num_free_slabs == made.reward.cache.num_slabs
    [one] = made.score((session, response + made.ids(" fox")))
    made.check(one, response + made.ids(" fox"))


@pytest.mark.parametrize("kind, slack, tokens", [("same", 0, 100), ("other", 64, 160)])
def test_room_is_taken_as_it_is_reserved(bench, kind, slack, tokens):
    """A prompt's pages at first; a segment's, and what a re-encoding may add, when asked; none for a fork by itself."""
    made = bench(kind, config_of(cache_tokens=tokens, page_size=4, max_num_seqs=4, max_num_lanes=8, max_segment_size=4))
    reward, cache = made.reward, made.reward.cache
    session = made.open()
    history = len(session.committed)

    def pages(tokens: int) -> int:
        return -(-tokens // 4)

    assert cache.num_pages - cache.num_free_pages == pages(history)
    assert reward.reserve(session, 8)
    taken = pages(history + 8 + slack)
    assert cache.num_pages - cache.num_free_pages == taken
    assert reward.reserve(session, 5) and cache.num_pages - cache.num_free_pages == taken  # not twice
    fork = reward.fork(session)
    assert cache.num_pages - cache.num_free_pages == taken
    assert reward.reserve(fork, 8)  # the page they share is copied
    own = taken + pages(history + 8 + slack) - history // 4
    assert cache.num_pages - cache.num_free_pages == own
    if kind == "same":
        response = made.ids(" on on on on on on on on")[:8]
        scored = made.score((session, response), (session, response[:7]))
        reward.commit([(session, scored[0].handle), (fork, scored[1].handle)])
        assert cache.num_pages - cache.num_free_pages == own
    free = cache.num_free_pages
    assert not reward.reserve(fork, 150) and cache.num_free_pages == free  # nothing is changed
    reward.close(session)
    reward.close(fork)
    alone = made.open()
    assert reward.reserve(alone, 150)  # as much as there is
    reward.close(alone)
    made.all_free()


def test_a_reward_without_a_fork_says_so(lm):
    class Plain(Reward):
        def open(self, prompt, max_tokens):
            return prompt

        def score(self, candidates):
            return []

    assert Plain().reserve(None, 4)
    with pytest.raises(RewardError, match="Plain cannot keep a response twice: give it a method fork"):
        Plain().fork(None)


def test_an_encoder_reads_a_prompt_once(bench, monkeypatch):
    """However often it is checked and opened: a sample costs no reading of the prompt. Another prompt is read anew."""
    made = bench("encoder")
    reward, calls = made.reward, []
    encode = reward._encode
    monkeypatch.setattr(reward, "_encode", lambda pairs, *given: calls.append(pairs) or encode(pairs, *given))
    for _ in range(3):
        made.open()
    assert calls == [[(PROMPT, "")]]
    other = parse_prompt("A girl", made.tokenizer, 10**6)
    assert reward.open(other, 30).text == "A girl" and len(calls) == 2


# -- prompts in chunks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sessions_that_start_in_chunks(bench, kind):
    """Three prompts, five rows of the model a call: those that have started score as they would have at once, between
    the calls too, and one that is closed before it has started leaves nothing behind."""
    made = bench(kind, config_of(cache_tokens=1024, page_size=4, max_num_seqs=4, max_num_lanes=8, max_segment_size=4,
                                 max_num_batched_tokens=5))
    reward, ids = made.reward, made.ids(" jumps over")
    prompts = [parse_prompt(text, made.tokenizer, 10**6) for text in (PROMPT, "Quite another one, and longer", "A dog")]
    sessions = [reward.open(prompt, 20) for prompt in prompts]
    left, calls = list(sessions), []
    while left:
        progress = reward.start_in_chunks(left, 5)
        calls.append(progress)
        assert 0 <= progress.rows <= 5 and 0 <= progress.done <= len(left)
        assert progress.rows or progress.done, "nothing was done"
        for session in left[: progress.done]:
            [one] = made.score((session, ids))
            reward.discard(one.handle)
            made.prompt = prompts[sessions.index(session)]
            made.check(one, ids)
        left = left[progress.done :]
        reward.check_integrity()
    if kind in PAGED:
        # All but the last token of each, but for pages that the first of them has offered to the others.
        rows = sum(one.rows for one in calls)
        assert rows <= sum(len(session.committed) for session in sessions) and len(calls) >= rows / 5 > 1
        late = reward.open(parse_prompt("Nobody waits for it, as it is closed early", made.tokenizer, 10**6), 20)
        assert reward.start_in_chunks([late], 5) == (0, 5)
        reward.close(late)
    elif any(isinstance(part, SessionReward) for part in with_parts(reward)):
        assert len(calls) >= sum(one.rows for one in calls) / 5 > 1
    else:
        assert calls == [(3, 0)]
    for session in sessions:
        reward.close(session)
    made.all_free()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_response_that_is_taken_up_in_chunks(bench, kind, deterministic):
    """What was committed before, again: some rows a call, and what comes after it is scored as if nothing had been."""
    made = bench(kind, config_of(cache_tokens=1024, page_size=4, max_num_seqs=4, max_num_lanes=8, max_segment_size=4,
                                 max_num_batched_tokens=7, deterministic=deterministic))
    reward, session = made.reward, made.open()
    ids, more = made.ids(" jumps over the lazy dog, and sleeps on"), made.ids(" all day")
    calls = []
    while not calls or not calls[-1].done:
        calls.append(reward.resume_in_chunks(session, ids, made.tokenizer.decode(ids), None if deterministic else 7))
    assert calls[-1].done == 1 and [one.done for one in calls[:-1]] == [0] * (len(calls) - 1)
    if kind in PAGED and not deterministic:
        assert len(calls) > 1 and all(0 < one.rows <= 7 for one in calls)
    elif kind in PAGED:
        longer = ids + more
        assert len(calls) == 1 and reward.resume_in_chunks(session, longer, made.tokenizer.decode(longer), 1) == (0, 0)
    [one] = made.score((session, ids + more))
    made.check(one, ids + more)
    reward.discard(one.handle)
    reward.close(session)
    made.all_free()
