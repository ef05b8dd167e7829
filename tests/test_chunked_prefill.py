"""Long prompts beside responses that decode: bounded rows a round, and nothing but the time shows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import stars
from stars.errors import RequestError
from stars.passes import Passes
from test_conservation import nothing_is_held
from test_scheduler import (
    IGNORED,
    JOBS,
    LARGE,
    Population,
    causal_reward,
    counts,
    function_reward,
    interrupt_everywhere,
    preemptions,
    pressed,
    run,
    text,
)
from test_scheduler import engine as made_engine
from test_waiting import LateFunction
from toy import ToyModel, facts, ids, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

STARS = stars.STARS(4, 6, 0.5, 0.4, 1.5, 2)
SMALL, SMALL_RM = ToyModel(vocab=11, seed=1, layers=1), ToyModel(vocab=11, seed=3, layers=1, head="reward")
# Whatever is drawn is accepted: a segment of 3 tokens a round.
DECODING = [({"prompt_token_ids": ids(7, 11, seed)}, stars.SamplingParams(max_tokens=147, seed=seed, ignore_eos=True),
             stars.STARS(3, 1, 1.0, 0.0, -1e9)) for seed in range(2)]
LONG = [({"prompt_token_ids": ids(length, 11, 20 + length)}, stars.SamplingParams(
    max_tokens=9, n=n, seed=length, ignore_eos=True), STARS)
        for length, n in ((97, 1), (53, 3), (90, 1), (31, 2))]


def engine(reward, rows: int | None, cache_tokens: int = LARGE, **options) -> stars.Engine:
    return made_engine(reward, cache_tokens, max_num_batched_tokens=rows, **options)


class Rows:
    """Rows of prompts, or of what was committed before, that each model has run: by the passes of its."""

    def __init__(self) -> None:
        self.run: dict[Passes, list[int]] = {}

    def of(self, made: stars.Engine) -> tuple[int, int]:
        """So far: the language model's and the reward model's."""
        reward = getattr(made.reward, "_passes", None)
        return sum(self.run.get(made._models.own.passes, [])), sum(self.run.get(reward, []))


@contextmanager
def counted(monkeypatch) -> Iterator[Rows]:
    rows = Rows()
    with monkeypatch.context() as patched:
        for name in ("prefill", "recompute"):
            whole = getattr(Passes, name)

            def noting(self, given, *others, name=name, whole=whole):
                ran = whole(self, given, *others)
                rows.run.setdefault(self, []).append(
                    ran if name == "prefill" else sum(len(span.token_ids) for span in given))
                return ran

            patched.setattr(Passes, name, noting)
        yield rows


def newcomers(made: stars.Engine, rows: Rows) -> tuple[list[stars.RequestOutput], list[tuple[int, int]]]:
    """Two requests that decode, then LONG beside them: all outputs, and the rows of each step that both decoded in."""
    names = [made.add_request(*job) for job in DECODING]
    done = {output.request_id: output for output in made.step()}
    names += [made.add_request(*job) for job in LONG]
    steps = []
    while made.has_unfinished_requests():
        held = [made._requests.get(name) for name in names[:2]]
        before, tokens = rows.of(made), [len(one.hypotheses[0].token_ids) if one else 0 for one in held]
        done |= {output.request_id: output for output in made.step()}
        made.check_integrity()
        if all(held):
            assert [len(one.hypotheses[0].token_ids) for one in held] == [count + 3 for count in tokens]
            steps.append(tuple(after - first for after, first in zip(rows.of(made), before, strict=True)))
    nothing_is_held(made)
    return [done[name] for name in names], steps


@pytest.mark.parametrize("rows", [16, 40])
@pytest.mark.parametrize("reward", [function_reward, causal_reward])
def test_a_round_runs_no_more_rows_of_prompts_than_it_may(monkeypatch, reward, rows):
    with counted(monkeypatch) as seen:
        whole, at_once = newcomers(engine(reward(), None), seen)
        chunked, steps = newcomers(engine(reward(), rows), seen)
    causal = reward is causal_reward
    # Without a bound all is read in the step that admits it: 97, 53, 90, 31 less a token each, and what the second and
    # third samples of a prompt do not share: 52 % 5 = 2 of the second prompt, 30 % 5 = 0 of the fourth.
    total = 96 + (52 + 2 * 2) + 89 + 30
    assert [one for one in at_once if any(one)] == [(total, total * causal)]
    assert max(one for both in steps for one in both) <= rows
    assert [sum(column) for column in zip(*steps, strict=True)] == [total, total * causal]
    # Chunks are whole ones, in order: at most a chunk's rows are left over in a round that leaves something to read.
    read = [one for one, _ in steps if one]
    assert -(-total // rows) <= len(read) <= 2 * -(-total // rows)
    assert [text(one) for one in chunked] == [text(one) for one in whole]
    for one, other in zip(chunked, whole, strict=True):
        assert one.metrics.num_preemptions == 0
        if not causal:  # how many lanes a pass scores depends on who is scored beside them
            assert counts(one) == counts(other)
        assert one.metrics.prompt_tokens_cached == other.metrics.prompt_tokens_cached


def test_the_first_to_come_is_the_first_to_be_read(monkeypatch):
    """Short prompts behind a long one wait for it, and a long one behind short ones does not wait for all of them."""
    made = engine(causal_reward(), 16)
    made.add_request(*DECODING[1])
    made.step()
    names = [made.add_request({"prompt_token_ids": ids(length, 11, length)}, stars.SamplingParams(
        max_tokens=30, seed=1, ignore_eos=True), STARS) for length in (9, 60, 12, 10, 14)]
    joined = []
    for _ in range(12):
        made.step()
        ready = [unit.request.request_id for unit in made._scheduler.running if unit.ready]
        joined.append(len([name for name in names if name in ready]))
        assert ready[1:] == names[: joined[-1]], "in their order"
    # Rows to read: 8, 59, 11, 9, 13. Rounds: 8 (the chunk of 16 does not fit beside it), 16, 16, 16, 11 (and not 11
    # more), 11, 9 (13 do not fit), 13.
    assert joined == [1, 1, 1, 1, 2, 3, 4, 5, 5, 5, 5, 5]


def test_where_nothing_decodes_all_prompts_are_read_first(monkeypatch):
    made = engine(causal_reward(), 8)
    with counted(monkeypatch) as rows:
        names = [made.add_request(*job) for job in LONG]
        total = 96 + 52 + 4 + 89 + 30  # the further samples of a prompt, which share its pages, come with the first
        while rows.of(made) != (total, total):
            assert not any(one.metrics.attempts for name in names for one in made._requests[name].hypotheses)
            before = rows.of(made)
            made.step()
            assert 0 < rows.of(made)[0] - before[0] <= 8
        assert all(one.metrics.attempts for name in names for one in made._requests[name].hypotheses)
        while made.has_unfinished_requests():
            made.step()
        nothing_is_held(made)


def test_who_was_being_read_goes_on_where_the_others_have_ended(monkeypatch):
    made = engine(causal_reward(), 8)
    name = made.add_request(*DECODING[1])
    made.step()
    other = made.add_request(*LONG[0])
    made.step()
    [unit] = [unit for unit in made._scheduler.running if unit.request.request_id == other]
    assert not unit.ready and unit.group.active == []
    made.abort(name)
    with counted(monkeypatch) as rows:
        steps = 0
        while not unit.ready:
            made.step()
            steps += 1
        assert rows.of(made) == (88, 88) and steps == 11  # all that 8 of the 96 rows have left


def test_a_common_beginning_is_read_once(monkeypatch):
    """Four prompts of 60 common tokens: three wait for the first, over several rounds, and share its pages."""
    common = ids(60, 11, 5)
    jobs = [({"prompt_token_ids": [*common, *ids(8, 11, seed)]}, stars.SamplingParams(max_tokens=9, seed=seed), STARS)
            for seed in range(4)]
    with counted(monkeypatch) as rows:
        made = engine(causal_reward(), 16)
        made.add_request(*DECODING[0])
        made.step()
        before = rows.of(made)
        outputs = run(made, jobs)
        # 67 rows of the first; each other one's own 7: 60 is a multiple of the pages' 5 tokens.
        assert [after - first for after, first in zip(rows.of(made), before, strict=True)] == [67 + 3 * 7] * 2
    alone = run(engine(causal_reward(), None), jobs)
    assert [text(one) for one in outputs] == [text(one) for one in alone]
    assert [one.metrics.prompt_tokens_cached for one in outputs] == [0, 60, 60, 60]


# -- pressure ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_tokens, page_size, rows", [(105, 5, 7), (133, 7, 3), (240, 16, 16), (99, 1, 1)])
def test_a_small_cache_and_small_chunks_give_the_outputs_of_large_ones(cache_tokens, page_size, rows):
    large = run(engine(function_reward(), None))
    small = run(engine(function_reward(), rows, cache_tokens, page_size=page_size))
    assert preemptions(small) > 5
    for one, other in zip(small, large, strict=True):
        assert facts(one) == facts(other) and counts(one) == counts(other)


def test_who_is_being_read_gives_way():
    """Its pages go back, and its prompt is read from the beginning when it comes again."""
    jobs = [({"prompt_token_ids": ids(9, 11, 1)}, stars.SamplingParams(max_tokens=90, seed=1, ignore_eos=True), STARS),
            ({"prompt_token_ids": ids(50, 11, 2)}, stars.SamplingParams(max_tokens=20, seed=2, ignore_eos=True), STARS)]
    gave_way = []
    made = engine(causal_reward(), 4, 105)

    def look(made):
        for request in made._requests.values():
            one = request.hypotheses[0]
            gave_way.append((one.metrics.num_preemptions, bool(one.token_ids)))

    first = made.add_request(*jobs[0])
    while not made._requests[first].hypotheses[0].token_ids:
        made.step()
    [second] = run(made, jobs[1:], look)
    assert (1, False) in gave_way, "in the middle of its prompt"
    [alone] = run(engine(causal_reward(), None), jobs[1:])
    assert [one[:2] for one in text(second)] == [one[:2] for one in text(alone)]
    assert second.metrics.num_preemptions >= 1


@pytest.mark.parametrize("rows", [5, 23])
def test_deterministic_mode_keeps_every_bit(monkeypatch, rows):
    """What was committed is computed again as it was drafted and scored, some segments a round."""
    lm = ToyModel(vocab=11, seed=1, positions=160)
    rm = ToyModel(vocab=11, seed=3, positions=160, head="reward", sharpness=1.5)

    def built(cache_tokens, rows):
        return toy_engine(lm, stars.CausalReward(rm.decoder()), cache_tokens=cache_tokens, page_size=5, max_num_seqs=14,
                          deterministic=True, max_num_batched_tokens=rows)

    large, small = run(built(LARGE, None)), run(built(120, rows))
    assert preemptions(small) > 5
    assert [text(one) for one in small] == [text(one) for one in large]


def test_what_was_committed_is_read_in_chunks_too(monkeypatch):
    """A response of 60 tokens that gave way is a prompt of 60 tokens more, for both models."""
    jobs = [({"prompt_token_ids": ids(9, 11, seed)}, stars.SamplingParams(max_tokens=70, seed=seed, ignore_eos=True),
             stars.STARS(4, 3, 1.0, 0.4, 0.5, 1)) for seed in range(2)]
    for deterministic in (False, True):
        with counted(monkeypatch) as rows:
            made = engine(causal_reward(), 12, 105, deterministic=deterministic)
            names, steps, done = [made.add_request(*job) for job in jobs], [], {}
            while made.has_unfinished_requests():
                decodes, before = any(unit.ready for unit in made._scheduler.running), rows.of(made)
                done |= {output.request_id: output for output in made.step()}
                if decodes:
                    steps.append(tuple(after - first for after, first in zip(rows.of(made), before, strict=True)))
        assert done[names[1]].metrics.num_preemptions > 0
        assert max(one for both in steps for one in both) <= 12
        # Nothing decodes while the one that gave way is alone: then all is read at once.
        assert len(done[names[1]].outputs[0].token_ids) == 70


def test_populations_are_read_in_parts_and_drawn_whole():
    job = ({"prompt_token_ids": ids(40, 11, 3)}, stars.SamplingParams(max_tokens=18, n=2, seed=3, ignore_eos=True),
           Population())
    made, parts = engine(function_reward(), 6), set()

    def look(made):
        for request in made._requests.values():
            for group in request.groups if isinstance(request.policy, Population) else ():
                growing = [one for one in group.hypotheses if one.finish_reason is None]
                drawing = len(group.active) if group in made._scheduler.groups else 0
                parts.add((len(growing), sum(one.table is not None for one in growing), drawing))

    made.add_request(*DECODING[0])
    made.step()
    [output] = run(made, [job], look)
    [alone] = run(engine(function_reward(), None), [job])
    assert facts(output) == facts(alone) and counts(output) == counts(alone)
    assert {(3, 1, 0), (3, 3, 3)} <= parts and {drawing for _, _, drawing in parts} == {0, 3}


# -- ends and faults --------------------------------------------------------------------------------------------------


def test_an_abort_in_the_middle_of_a_prompt():
    made = engine(causal_reward(), 8)
    made.add_request(*DECODING[0])
    made.step()
    for count in range(1, 5):
        name = made.add_request(*LONG[0])
        for _ in range(count):
            made.step()
        assert any(unit.request.request_id == name and not unit.ready for unit in made._scheduler.running)
        assert made.abort(name)
        made.check_integrity()
        [output] = [output for output in made.step() if output.request_id == name]
        assert output.outputs[0].finish_reason == "abort" and not output.outputs[0].token_ids
    stream = made.stream(*LONG[2])
    assert next(stream).outputs[0].token_ids
    stream.close()
    assert [unit.request.request_id for unit in made._scheduler.running] == ["0"]


class Opened:
    def __init__(self, ids):
        self.ids = ids


class Slow(stars.reward.base.Reward):
    """Starts one session a call, and fails where it is told to."""

    def __init__(self, fails: bool):
        self.fails, self.started, self.reserved = fails, [], []

    def open(self, prompt, max_tokens):
        return Opened(prompt.token_ids)

    def reserve(self, session, tokens):
        assert session in self.started or session not in self.reserved, "asked again before it has started"
        self.reserved.append(session)
        return True

    def start_in_chunks(self, sessions, max_rows):
        if self.fails and len(sessions[0].ids) == 53 and len(self.started) > 2:
            raise ZeroDivisionError("while it starts")
        self.started.append(sessions[0])
        return stars.reward.base.Progress(1, 1)

    def score(self, candidates):
        assert all(candidate.session in self.started for candidate in candidates), "it has not started"
        return [stars.reward.base.Scored(1.0) for _ in candidates]


@pytest.mark.parametrize("fails", [False, pytest.param(True, marks=pytest.mark.rounds_raise)])
def test_a_reward_that_starts_slowly(fails):
    """Nobody is scored before its session has started; who fails to start ends alone."""
    made = engine(Slow(fails), 64)
    made.add_request(*DECODING[0])
    made.step()
    names, done = [made.add_request(*job) for job in LONG], {}
    while made.has_unfinished_requests():
        done |= {output.request_id: output for output in made.step()}
        made.check_integrity()
    nothing_is_held(made)
    errors = [{one.error for one in done[name].outputs} for name in names]
    assert errors == [{None}, {"ZeroDivisionError: while it starts"} if fails else {None}, {None}, {None}]


@pytest.mark.rounds_raise
def test_a_reward_that_never_starts_ends_its_request():
    class Never(Slow):
        def start_in_chunks(self, sessions, max_rows):
            if len(sessions[0].ids) == 53:
                return stars.reward.base.Progress(0, 0)
            return super().start_in_chunks(sessions, max_rows)

    made = engine(Never(False), 64)
    names, done = [made.add_request(*job) for job in LONG], {}
    while made.has_unfinished_requests():
        done |= {output.request_id: output for output in made.step()}
    nothing_is_held(made)
    assert [{one.error for one in done[name].outputs} for name in names] == [
        {None}, {"Never.start_in_chunks has done nothing although max_rows is None: let it do all that it is asked"},
        {None}, {None}]


@IGNORED
@pytest.mark.parametrize("causal", [False, True], ids=["function", "causal"])
def test_an_interrupt_between_chunks_loses_nothing(causal):
    """One decodes, a second and a third come, are read in chunks and give way meanwhile."""
    first, *later = [({"prompt_token_ids": ids(length, 11, length)}, stars.SamplingParams(
        max_tokens=tokens, seed=length, ignore_eos=True), policy) for length, tokens, policy in (
        (5, 24, stars.STARS(4, 2, 1.0, 0.0, 0.5, 1)), (22, 6, STARS), (4, 6, STARS))]
    interrupt_everywhere(causal, 23, lambda number, runs: {1 if number % 2 else runs},
                         lambda made: pressed(made, [first], later), max_num_batched_tokens=3)


def test_settings_that_cannot_work_are_refused():
    for value in (0, -1, 1.5, "2048", True):
        with pytest.raises(RequestError, match="max_num_batched_tokens"):
            engine(None, value)
    assert [engine(None, rows).config.chunk for rows in (7, 10**6, None)] == [7, 256, 256]
    assert "max_num_batched_tokens=7" in repr(engine(None, 7).config)


def test_requests_of_every_policy_beside_one_another():
    """The traffic of the queue's tests, queued while others decode: texts, rewards and counts do not change."""
    jobs = [(prompt, dataclasses.replace(params, seed=params.seed + 1), policy) for prompt, params, policy in JOBS]
    for reward in (function_reward, causal_reward):
        whole = run(engine(reward(), None), jobs)
        made = engine(reward(), 6)
        made.add_request(*DECODING[0])
        made.step()
        chunked = run(made, jobs)
        assert [text(one) for one in chunked] == [text(one) for one in whole]
        if reward is function_reward:  # what a pass scores depends on who is scored beside it
            assert [counts(one) for one in chunked] == [counts(one) for one in whole]


BURST = [({"prompt_token_ids": ids(length, 11, 20 + length)}, stars.SamplingParams(
    max_tokens=9, seed=length, ignore_eos=True), STARS) for length in (97, 53, 20)]


@pytest.mark.parametrize("reward", [function_reward, causal_reward])
def test_what_is_there_is_read_in_chunks_and_begins_together(monkeypatch, reward):
    """A call of `step` reads a chunk, so that others come in between; nobody decodes before the others of a burst."""
    causal = reward is causal_reward
    with counted(monkeypatch) as seen:
        made, done, steps = engine(reward(), 16), {}, []
        names = [made.add_request(*job) for job in BURST]
        while not done:
            before = seen.of(made)
            done |= {output.request_id: output for output in made.step()}
            steps.append(tuple(after - first for after, first in zip(seen.of(made), before, strict=True)))
        total = 96 + 52 + 19
        assert [sum(column) for column in zip(*steps, strict=True)] == [total, total * causal]
        # Whole chunks of 16, in order: 96 = 6 x 16, 52 = 3 x 16 + 4, and 19 = 16 + 3, of which the 16 do not fit in.
        assert [one for one, _ in steps] == [16] * 9 + [4, 16, 3] or [one for one, _ in steps] == [16] * 9 + [4, 19]
        assert all(made._requests[name].hypotheses[0].metrics.attempts for name in names)
        late = made.add_request({"prompt_token_ids": ids(40, 11, 3)}, stars.SamplingParams(max_tokens=3, seed=0))
        while made.has_unfinished_requests():
            done |= {output.request_id: output for output in made.step()}
        nothing_is_held(made)
    assert [text(done[name]) for name in names] == [text(one) for one in run(engine(reward(), None), BURST)]
    assert done[late].finished


def test_a_burst_waits_for_nobody_who_comes_later():
    """Neither for one of its own user, nor, from the first of another user on, for its own."""
    for user in (None, "other"):
        made = engine(function_reward(), 16)
        first = made.add_request(*BURST[2])
        second = made.add_request(*BURST[0])
        assert made.step() == [] and made.step() == []  # the first is read, the second in part
        late = made.add_request(*BURST[1], user=user)
        decodes, steps = made._requests[first].hypotheses[0].metrics, 0
        while not decodes.attempts:
            made.step()
            steps += 1
        assert steps == (1 if user else 6), steps  # 96 / 16 of the burst are left
        assert made._requests[late].hypotheses[0].prefill is not None or not user
        made.abort(second)
        while made.has_unfinished_requests():
            made.step()
        nothing_is_held(made)


def test_who_is_read_may_be_aborted_between_two_chunks(monkeypatch):
    with counted(monkeypatch) as seen:
        made = engine(causal_reward(), 16)
        names = [made.add_request(*job) for job in BURST]
        made.step()
        assert made.abort(names[0])
        [output] = made.step()
        assert output.request_id == names[0] and output.outputs[0].finish_reason == "abort"
        rest, done = seen.of(made)[0], {}
        while made.has_unfinished_requests():
            done |= {output.request_id: output for output in made.step()}
        nothing_is_held(made)
        assert seen.of(made)[0] - rest < 52 + 19
    alone = run(engine(causal_reward(), 16), BURST[1:])
    assert [text(done[name]) for name in names[1:]] == [text(one) for one in alone]


def test_a_reward_that_starts_at_once_or_not_at_all():
    """Where nothing decodes, and it does nothing within a chunk, it is asked for all of it, as often as that is so."""
    class Whole(Slow):
        def start_in_chunks(self, sessions, max_rows):
            if max_rows is not None:
                return stars.reward.base.Progress(0, 0)
            asked.append(len(sessions))
            self.started += sessions
            return stars.reward.base.Progress(len(sessions), 1)

    asked: list[int] = []
    made = engine(Whole(False), 16)
    outputs = made.generate(*map(list, zip(*BURST, strict=True)), use_tqdm=False)
    assert asked == [3] and all(len(one.outputs[0].token_ids) == 9 for one in outputs)
    nothing_is_held(made)


def test_the_reward_of_a_prompt_that_comes_late_does_not_hold_up_reading(monkeypatch):
    """The first of a burst waits for the reward of its prompt; the others are read meanwhile, a chunk a step."""
    reward = LateFunction(lambda prompts, responses: [1.0] * len(responses), "ids")
    with counted(monkeypatch) as seen:
        made = engine(reward, 16)
        names = [made.add_request(*job) for job in (BURST[2], BURST[0])]
        waited: list[int] = []
        monkeypatch.setattr(stars.engine, "pause", lambda *_: waited.append(seen.of(made)[0]))
        while not waited:
            made.step()
        assert waited == [19 + 96]
        for name in names:
            made.abort(name)
        while made.has_unfinished_requests():
            made.step()
        nothing_is_held(made)


@pytest.mark.rounds_raise
def test_who_fails_is_found_where_prompts_are_longer_than_a_chunk():
    """Run by itself, a completion is read to its end first: also beside deadlines and other users."""
    class Fails(Slow):
        def score(self, candidates):
            if any(len(candidate.session.ids) == 53 for candidate in candidates):
                raise ZeroDivisionError("of this prompt")
            return super().score(candidates)

    made = engine(Fails(False), 16)
    names = [made.add_request(*job, budget=stars.Budget(seconds=600.0), user=f"{index % 2}")
             for index, job in enumerate(BURST)]
    done = {}
    for _ in range(200):
        done |= {output.request_id: output for output in made.step()}
    assert not made.has_unfinished_requests()
    nothing_is_held(made)
    assert [done[name].outputs[0].error for name in names] == [None, "ZeroDivisionError: of this prompt", None]


def test_who_takes_the_place_of_one_that_is_read_reads_their_common_beginning():
    """It had waited for pages that nobody wrote any more."""
    made = toy_engine(SMALL, None, max_num_seqs=1, max_num_batched_tokens=8, deterministic=True)
    params = stars.SamplingParams(max_tokens=4, seed=0, ignore_eos=True)
    names = [made.add_request({"prompt_token_ids": ids(60, 11)}, params, priority=1)]
    made.step()
    names.append(made.add_request({"prompt_token_ids": ids(60, 11)}, params, priority=0))
    done = {}
    while made.has_unfinished_requests():
        done |= {output.request_id: output for output in made.step()}
    assert [done[name].outputs[0].error for name in names] == [None, None]
    assert done[names[0]].metrics.num_preemptions == 1
    nothing_is_held(made)


@pytest.mark.parametrize("first", [False, True])
def test_a_reward_reads_a_common_prompt_before_others_share_it(monkeypatch, first):
    """Where the language model has it already, or is ahead by a chunk: a population fits that would not without."""
    prompt, params = {"prompt_token_ids": ids(65, 11)}, stars.SamplingParams(max_tokens=8, seed=0, ignore_eos=True)
    for jobs in ([(prompt, params, stars.SegmentBeam(3, 2, 4))], [(prompt, params, stars.Sample(score=True))] * 6):
        made = toy_engine(SMALL, stars.CausalReward(SMALL_RM.decoder()), max_num_batched_tokens=8,
                          cache_tokens=160 if len(jobs) == 1 else 4000)
        if first:  # which asks for no reward
            made.generate(prompt, params, use_tqdm=False)
        with counted(monkeypatch) as rows:
            assert [one.error for output in run(made, jobs) for one in output.outputs] == [None] * len(jobs)
            language, reward = rows.of(made)
        assert language <= 64 and reward <= 2 * 64 + 8


@pytest.mark.rounds_raise
def test_who_has_no_room_is_refused_and_nobody_else(monkeypatch):
    """A population whose third session the reward never has pages for; another user's request, which only waits, goes
    on."""
    made = toy_engine(SMALL, stars.CausalReward(SMALL_RM.decoder()), max_num_seqs=3)
    params = stars.SamplingParams(max_tokens=8, seed=0, ignore_eos=True)
    reserve, sessions = made.reward.reserve, []

    def reserving(session, tokens):
        if session not in sessions:
            sessions.append(session)
        return sessions.index(session) % 3 != 2 and reserve(session, tokens)

    monkeypatch.setattr(made.reward, "reserve", reserving)
    names = [made.add_request({"prompt_token_ids": ids(65, 11)}, params, stars.SegmentBeam(3, 2, 4), user="b"),
             made.add_request({"prompt_token_ids": ids(9, 11, 5)}, params, user="a")]
    done = {}
    for _ in range(200):
        done |= {output.request_id: output for output in made.step()}
    assert not made.has_unfinished_requests()
    assert "refuse it in check" in str(done[names[0]].outputs[0].error) and done[names[1]].outputs[0].error is None
    nothing_is_held(made)


@pytest.mark.parametrize("user", [None, "other"])
def test_who_waits_for_a_late_reward_has_begun(monkeypatch, user):
    """A long prompt that comes meanwhile is not read to its end before the response goes on."""
    reward = LateFunction(lambda prompt, responses: [1.0] * len(responses), "ids")
    made = toy_engine(ToyModel(vocab=11, seed=1, layers=1, positions=600), reward, max_num_batched_tokens=8)
    monkeypatch.setattr(stars.engine, "pause", lambda *_: reward.settle())
    name = made.add_request({"prompt_token_ids": ids(5, 11)}, stars.SamplingParams(
        max_tokens=40, seed=0, ignore_eos=True), stars.STARS(4, 1, 1.0, 0.0, -1e9))
    for _ in range(9):
        made.step()
    made.add_request({"prompt_token_ids": ids(400, 11)}, stars.SamplingParams(max_tokens=4, seed=1), user=user)
    decodes, still, most = made._requests[name].hypotheses[0], 0, 0
    while name in made._requests:
        tokens = len(decodes.token_ids)
        made.step()
        reward.settle()
        still = still + 1 if len(decodes.token_ids) == tokens else 0
        most = max(most, still)
    assert most <= 3
    made.abort([*made._requests])
    while made.has_unfinished_requests():
        made.step()
    nothing_is_held(made)
