"""Users share the engine: by a clock that only the work moves, what a light one waits because of a heavy one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import stars
from stars.fairness import Fairness
from stars.intake import Asked
from stars.seating import Load, cost
from stars.unit import Unit
from test_conservation import nothing_is_held
from test_waiting import rewards
from toy import Digits, ToyModel, facts, ids, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LM = ToyModel(vocab=5, seed=1, layers=1, positions=256)
PER_LANE, FIXED, PER_ROW = 0.3, 1.0, 0.1  # of a step, and of a row of a prompt
CHAT = stars.STARS(4, 6, 0.5, 0.3, 1.0)
WORK = stars.STARS(8, 6, 0.5, 0.3, 1.0)


def step(lanes: int) -> float:
    return FIXED + PER_LANE * lanes


class Clock:
    """Moves by what the language model runs, and by nothing else. So times are the same on every machine.

    seconds: of a step by its lanes. per_row: of a row of a prompt. drafts: the tokens that lanes of each might draw.
    """

    def __init__(self, made: stars.Engine, seconds: Callable[[int], float] = step, per_row: float = PER_ROW):
        self.now, self.lane_steps, self.rounds = 0.0, 0, 0
        self.drafts: list[list[int]] = []
        chooser, drafter, passes = made._round.proposer.chooser, made._round.drafter, made._models.own.passes
        chooser._measure, chooser._seconds, chooser._known = seconds, {}, {}
        launch, prefill = drafter.launch, passes.prefill

        def launched(specs):
            self.now += cost(seconds, [Load(1, spec.max_tokens) for spec in specs])
            self.lane_steps += sum(spec.max_tokens for spec in specs)
            self.rounds += 1
            self.drafts.append([spec.max_tokens for spec in specs])
            launch(specs)

        def read(jobs, max_rows=None, **more):
            rows = prefill(jobs, max_rows, **more)
            self.now += per_row * rows
            return rows

        drafter.launch, passes.prefill = launched, read


def engine(**options: Any) -> stars.Engine:
    return toy_engine(LM, stars.FunctionReward(rewards, inputs="ids"), tokenizer=Digits(),
                      **(dict(max_num_seqs=16, max_num_lanes=32) | options))


class User:
    """Keeps so many requests under way, and thinks for a while before it asks again."""

    def __init__(self, name: str, side_by_side: int, tokens: int, policy: Any, prompt: int = 6, thinks: float = 0.0,
                 priority: int = 0):
        self.name, self.many, self.tokens, self.policy = name, side_by_side, tokens, policy
        self.prompt, self.thinks, self.priority = prompt, thinks, priority
        self.open: dict[str, float] = {}
        self.asked, self.times, self.texts, self.first = 0, [], {}, {}
        self.wakes = 0.0

    def ask(self, made: stars.Engine, clock: Clock) -> None:
        while len(self.open) < self.many and clock.now >= self.wakes:
            request = ({"prompt_token_ids": ids(self.prompt, seed=self.asked % 9)},
                       stars.SamplingParams(max_tokens=self.tokens, seed=self.asked, ignore_eos=True), self.policy)
            name = made.add_request(*request, request_id=f"{self.name}-{self.asked}", user=self.name,
                                    priority=self.priority)
            self.open[name] = clock.now
            self.asked += 1

    def take(self, output: stars.RequestOutput, clock: Clock) -> None:
        if output.finished:
            self.times.append(clock.now - self.open.pop(output.request_id))
            self.texts[output.request_id] = [one[:3] for one in facts(output)]
            self.wakes = clock.now + self.thinks


def serve(made: stars.Engine, users: list[User], enough: Callable[[], bool]) -> Clock:
    clock, by_name = Clock(made), {user.name: user for user in users}
    for _ in range(20000):
        for user in users:
            user.ask(made, clock)
        if not made.has_unfinished_requests():
            clock.now = min(user.wakes for user in users)
        for output in made.step():
            by_name[output.request_id.split("-")[0]].take(output, clock)
        if enough():
            break
    else:
        raise AssertionError("it goes on for ever")
    made.check_integrity()
    for user in users:
        for name in user.open:
            made.abort(name)
    made.step()
    nothing_is_held(made)
    return clock


def light(**options: Any) -> User:
    return User("light", 1, 24, CHAT, thinks=40.0, **options)


def p99(times: list[float]) -> float:
    return sorted(times)[int(0.99 * (len(times) - 1) + 0.5)]


def alone(count: int = 40, **options: Any) -> User:
    user = light()
    serve(engine(**options), [user], lambda: len(user.times) >= count)
    return user


@pytest.mark.parametrize("load", [1, 10, 100])
@pytest.mark.parametrize("sizes", [{}, {"max_num_seqs": 6, "max_num_lanes": 8}])
def test_a_chat_beside_a_long_batch(load, sizes):
    """One short chat after another, and so many long texts of somebody else, 10:1 and more: its p99 is at most twice
    that of its own time. Its texts are the same."""
    before = alone(**sizes)
    chat, batch = light(), User("batch", load, 120, WORK, prompt=9)
    serve(engine(**sizes), [batch, chat], lambda: len(chat.times) >= 40)
    assert p99(chat.times) <= 2.0 * p99(before.times), (p99(chat.times), p99(before.times))
    assert {name: chat.texts[name] for name in before.texts} == before.texts
    assert batch.times or load == 100


def test_without_users_the_same_chat_waits_long():
    """What the users are for: as one user the batch comes first, and the chat waits for a place."""
    before = alone(max_num_seqs=6, max_num_lanes=8)
    chat, batch = light(), User("batch", 10, 120, WORK, prompt=9)
    made = engine(max_num_seqs=6, max_num_lanes=8)
    add = made.add_request
    made.add_request = lambda *given, user, **more: add(*given, **more)
    serve(made, [batch, chat], lambda: len(chat.times) >= 10)
    assert p99(chat.times) > 4.0 * p99(before.times)


def test_a_batch_loses_no_more_than_its_share():
    """Beside a chat that asks all the time a batch has an eighth of what it draws alone, at least: a third of the time,
    in rounds of few lanes, which are dearer by the lane."""
    def drawn(users: list[User]) -> float:
        made = engine()
        clock = serve(made, users, lambda: len(users[0].times) >= 20)
        return 20 / clock.now

    whole = drawn([User("batch", 10, 60, WORK)])
    shared = drawn([User("batch", 10, 60, WORK), User("light", 1, 24, CHAT)])
    assert whole > shared > whole / 8


def test_two_equal_users_and_three():
    for count in (2, 3):
        users = [User(f"user{index}", 10, 40, WORK) for index in range(count)]
        serve(engine(), users, lambda users=users: sum(len(user.times) for user in users) >= 60)
        ended = [len(user.times) for user in users]
        assert max(ended) - min(ended) <= 8, ended


def test_three_users_of_different_loads():
    before = alone()
    chat = light()
    others = [User("batch", 10, 120, WORK), User("other", 3, 60, WORK)]
    serve(engine(), [*others, chat], lambda: len(chat.times) >= 30)
    assert p99(chat.times) <= 3.0 * p99(before.times)
    assert all(user.times for user in others)


def test_long_prompts_delay_nobody_beyond_their_share():
    """Prompts of 200 tokens, one after the other, beside a chat that draws."""
    before = alone()
    chat, reader = light(), User("reader", 4, 4, CHAT, prompt=200)
    serve(engine(cache_tokens=8192), [reader, chat], lambda: len(chat.times) >= 40)
    assert p99(chat.times) <= 2.2 * p99(before.times)
    assert len(reader.times) > 20


def test_the_groups_of_a_user_take_turns():
    made = engine()
    Clock(made)
    narrow = stars.STARS(4, 6, 0.5, 0.3, 1.0, width=1)
    for name, many, policy in (("batch", 8, WORK), ("light", 1, narrow)):
        for index in range(many):
            made.add_request({"prompt_token_ids": ids(6, seed=index)}, stars.SamplingParams(
                max_tokens=120, seed=index, ignore_eos=True), policy, user=name, request_id=f"{name}-{index}")
    run, seats = made._round.run, Counter()

    def running(groups):
        seats.update(group.request.request_id for group in groups)
        return run(groups)

    made._round.run = running
    for _ in range(24):
        made.step()
    batch = [seats[f"batch-{index}"] for index in range(8)]
    assert max(batch) - min(batch) <= 1 and min(batch) >= 1 and seats["light-0"] >= 20 > 2 * max(batch), seats


def test_who_gives_way_where_pages_run_out():
    """The oldest of the lowest priority never, though its user was served most."""
    fairness, made = Fairness(), engine()

    def unit(user, priority=0):
        request = made._parse(Asked({"prompt_token_ids": ids(4)}, stars.SamplingParams(max_tokens=4), user=user,
                                    priority=priority))
        fairness.enter(request)
        return Unit(request.groups[0])

    first, second, third = unit("a"), unit("b"), unit("b")
    fairness.read(first.request, 100)
    assert fairness.last([first, second, third]) is third
    more = unit("a")
    assert fairness.last([first, second, more, third]) is more
    low = unit("c", 1)
    assert fairness.last([low, first, second, more]) is low
    assert fairness.last([low, unit("c", 2), first]).request.priority == 2


def test_with_one_user_nothing_changes():
    """The same rounds, the same order, the same lanes: of a name, and of none."""
    runs = []
    for name in (None, "somebody"):
        made, seen = engine(max_num_seqs=5, cache_tokens=256), []
        clock = Clock(made)
        names = [made.add_request({"prompt_token_ids": ids(9, seed=index)}, stars.SamplingParams(
            max_tokens=30, seed=index, ignore_eos=True), WORK, user=name, request_id=f"{index}") for index in range(12)]
        fairness = made._scheduler._fairness
        made._scheduler._seating._loads = None  # who is alone has no loads
        while made.has_unfinished_requests():
            seen += [(clock.now, output.request_id, facts(output)) for output in made.step()]
        assert fairness._served == {} and len(names) == 12
        runs.append((seen, clock.now, clock.lane_steps, clock.rounds))
    assert runs[0] == runs[1]


def test_who_comes_back_is_lifted():
    fairness = Fairness()
    made = engine()

    def request(user):
        return made._parse(Asked(
            {"prompt_token_ids": ids(4)}, stars.SamplingParams(max_tokens=4), user=user))

    one, other = request("a"), request("b")
    fairness.enter(one)
    fairness.read(one, 1000)
    fairness.enter(other)
    fairness.read(one, 50)
    fairness.read(other, 20)
    assert (fairness.served("a"), fairness.served("b")) == (1050, 1020)
    for hypothesis in other.hypotheses:
        hypothesis.finish("abort")
    fairness.leave(other)
    fairness.leave(other)
    third = request("c")
    fairness.enter(third)
    assert fairness.served("c") == 1050, "as those who are there"
    again = request("b")
    fairness.read(one, 7)
    fairness.read(third, 9)
    fairness.enter(again)
    assert fairness.served("b") == 1057
    for name in (one, third, again):
        fairness.leave(name)
    assert fairness._served == {} and fairness.plain


def test_what_users_do_changes_no_text():
    """Random users, priorities and sizes: the texts are those of each request alone, and everybody ends."""
    chance = random.Random(5)
    jobs = [({"prompt_token_ids": ids(chance.randint(3, 30), seed=index % 5)},
             stars.SamplingParams(max_tokens=chance.randint(4, 40), seed=index, n=chance.randint(1, 2)),
             chance.choice([CHAT, WORK, stars.Sample(score=True), stars.BestOfN(3), stars.SegmentBeam(2, 2, 4),
                            stars.ParticleFilter(3, 0.5, 4), stars.RejectionSampling(2.0, 0.3, 4)]))
            for index in range(30)]
    whole = [facts(made) for job in jobs for made in engine().generate(job[0], job[1], job[2], use_tqdm=False)]

    def kept(of):
        return [one[:3] for one in of]

    for sizes in ({}, {"cache_tokens": 160, "max_num_seqs": 6, "max_num_lanes": 8},
                  {"max_num_batched_tokens": 5, "max_num_seqs": 4, "max_num_lanes": 9}):
        made, done = engine(**sizes), {}
        for index, job in enumerate(jobs):
            made.add_request(*job, request_id=str(index), user=chance.choice(["a", "b", None]),
                             priority=chance.choice([0, 0, 1, -3]))
            for _ in range(chance.randint(0, 3)):
                done |= {output.request_id: output for output in made.step()}
                made.check_integrity()
        for _ in range(5000):
            if not made.has_unfinished_requests():
                break
            done |= {output.request_id: output for output in made.step()}
        nothing_is_held(made)
        assert [kept(facts(done[str(index)])) for index in range(len(jobs))] == [kept(one) for one in whole]


def test_a_heavy_user_has_its_turn_beside_light_ones_that_come_and_go():
    """What it is left without adds up, whoever leaves meanwhile: 8 lanes of 128 tokens beside segments of 4."""
    made = toy_engine(ToyModel(vocab=11, seed=1, layers=1, positions=512), stars.FunctionReward(rewards, inputs="ids"),
                      max_segment_size=128)
    Clock(made)
    heavy = made.add_request({"prompt_token_ids": ids(5, seed=1)}, stars.SamplingParams(
        max_tokens=128, seed=0, ignore_eos=True), stars.BlockwiseBestOfK(8, 128), user="heavy")
    running: set[str] = set()
    for number in range(600):
        if len(running) < 3:
            running.add(made.add_request({"prompt_token_ids": ids(3, seed=number)}, stars.SamplingParams(
                max_tokens=8 + 4 * (number % 3), seed=number, ignore_eos=True), stars.STARS(4, 1, 1.0, 0.0, -1e9),
                user=f"light {number}"))
        running -= {output.request_id for output in made.step() if output.finished}
        if heavy not in made._requests:
            break
    assert 20 < number < 599
