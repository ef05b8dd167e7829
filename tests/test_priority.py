"""Priorities: who is admitted first, who gives way, and that nobody can tell from the texts."""

from __future__ import annotations

import dataclasses
import random

import pytest

import stars
from stars.errors import OutOfPages
from test_conservation import nothing_is_held
from test_scheduler import JOBS, LARGE, Population, causal_reward, engine, function_reward, run
from test_scheduler import text as whole_text
from toy import ToyModel, facts, ids, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LONG = stars.SamplingParams(max_tokens=50, seed=1, ignore_eos=True)
SHORT = stars.SamplingParams(max_tokens=12, seed=2, ignore_eos=True)
PROMPT = {"prompt_token_ids": ids(11, 11)}
POLICY = stars.STARS(5, 6, 0.5, 0.4, 1.5, 2)


def running(made: stars.Engine) -> list[str]:
    return [unit.request.request_id for unit in made._scheduler.running]


def drain(made: stars.Engine) -> dict[str, stars.RequestOutput]:
    done: dict[str, stars.RequestOutput] = {}
    for _ in range(5000):
        if not made.has_unfinished_requests():
            break
        done.update((output.request_id, output) for output in made.step() if output.finished)
        made.check_integrity()
    nothing_is_held(made)
    return done


def test_the_lowest_number_is_admitted_first():
    made = engine(function_reward(), LARGE, max_num_seqs=1)
    for name, priority in (("a", 0), ("b", 5), ("c", 1), ("d", 1), ("e", -2)):
        made.add_request(PROMPT, SHORT, POLICY, request_id=name, priority=priority)
    order = []
    while made.has_unfinished_requests():
        order += [output.request_id for output in made.step() if output.finished]
    assert order == ["e", "a", "c", "d", "b"]


@pytest.mark.parametrize("sizes", [{"max_num_seqs": 2}, {"cache_tokens": 70}])
def test_a_lower_number_takes_the_place_of_a_higher_one(sizes):
    """Where there are no places, and where there are no pages. Who gave way comes back to the same text."""
    large = engine(function_reward(), LARGE)
    other = {"prompt_token_ids": ids(17, 11, 5)}
    [alone] = run(large, [(other, LONG, POLICY)])
    made = engine(function_reward(), **({"cache_tokens": LARGE} | sizes))
    for name in ("a", "b"):
        made.add_request(other, LONG, POLICY, request_id=name, priority=3)
    for _ in range(4):
        made.step()
    held = running(made)
    made.add_request(PROMPT, SHORT, POLICY, request_id="first", priority=0)
    made.step()
    assert "first" in running(made) and len(running(made)) <= len(held)
    assert "b" not in running(made), "the youngest gives way"
    done = drain(made)
    assert facts(done["a"]) == facts(done["b"]) == facts(alone)
    assert done["b"].metrics.num_preemptions >= 1 and done["first"].metrics.num_preemptions == 0
    assert list(done)[0] == "first"


def test_an_equal_or_higher_number_takes_no_place():
    made = engine(function_reward(), LARGE, max_num_seqs=1)
    made.add_request(PROMPT, LONG, POLICY, request_id="a", priority=3)
    made.step()
    for name, priority in (("b", 3), ("c", 4)):
        made.add_request(PROMPT, SHORT, POLICY, request_id=name, priority=priority)
        made.step()
        assert running(made) == ["a"]
    done = drain(made)
    assert list(done) == ["a", "b", "c"] and done["a"].metrics.num_preemptions == 0


def test_pages_that_run_out_are_those_of_the_highest_number():
    """The oldest of the lowest priority never gives way, though it came last."""
    made = engine(function_reward(), 110)
    for index in range(3):
        made.add_request({"prompt_token_ids": ids(9, 11, index)}, LONG, POLICY, request_id=f"low{index}", priority=9)
    made.step()
    made.add_request({"prompt_token_ids": ids(9, 11, 7)}, LONG, POLICY, request_id="high", priority=-1)
    done = drain(made)
    assert done["high"].metrics.num_preemptions == 0 and list(done)[0] == "high"
    assert sum(done[f"low{index}"].metrics.num_preemptions for index in range(3)) >= 2


@pytest.mark.parametrize("reward", [function_reward, causal_reward])
@pytest.mark.parametrize("sizes", [{"cache_tokens": 110}, {"max_num_seqs": 4}, {"cache_tokens": 140,
                                                                                "max_num_batched_tokens": 5}])
def test_texts_do_not_depend_on_priorities_users_and_budgets_of_others(reward, sizes):
    chance = random.Random(str(sizes))
    whole = run(engine(reward(), LARGE))
    made, done = engine(reward(), **({"cache_tokens": LARGE} | sizes)), {}
    bounded = set()
    for index, job in enumerate(JOBS):
        budget = None
        if chance.random() < 0.3:
            bounded.add(str(index))
            budget = stars.Budget(seconds=chance.choice([0.001, 0.05, 100.0]), attempts=chance.choice([None, 3, 9]),
                                  lm_tokens=chance.choice([None, 30]), rm_calls=chance.choice([None, 4]))
        made.add_request(*job, request_id=str(index), priority=chance.randint(-2, 2), budget=budget,
                         user=chance.choice([None, "a", "b", "c"]))
        for _ in range(chance.randint(0, 2)):
            done.update((output.request_id, output) for output in made.step() if output.finished)
            made.check_integrity()
    done |= drain(made)
    assert len(done) == len(JOBS) and 0 < len(bounded) < len(JOBS)
    for index, one in enumerate(whole):
        if str(index) not in bounded:
            other = done[str(index)]
            assert [(part.token_ids, part.finish_reason) for part in one.outputs] == [
                (part.token_ids, part.finish_reason) for part in other.outputs]
        assert all(part.error is None for part in done[str(index)].outputs)


def test_everybody_ends_while_others_of_all_priorities_come():
    """No two units take turns in giving way: the engine works on, and the lowest number of each moment ends first."""
    chance, made, done = random.Random(2), engine(function_reward(), 105, max_num_seqs=3), []
    for index in range(40):
        made.add_request({"prompt_token_ids": ids(5 + index % 9, 11, index)}, dataclasses.replace(SHORT, seed=index),
                         POLICY, priority=chance.randint(0, 3), user=chance.choice("ab"))
        done += [output for output in made.step() if output.finished]
    steps = 0
    while made.has_unfinished_requests():
        done += [output for output in made.step() if output.finished]
        steps += 1
        assert steps < 2000
    assert len(done) == 40 and sum(output.metrics.num_preemptions for output in done) < 60
    nothing_is_held(made)


def test_deterministic_mode_keeps_every_bit_of_who_gave_way():
    lm = ToyModel(vocab=11, seed=1, positions=160)
    rm = ToyModel(vocab=11, seed=3, positions=160, head="reward", sharpness=1.5)
    texts = []
    for size in (LARGE, 120):
        made = toy_engine(lm, stars.CausalReward(rm.decoder()), cache_tokens=size, page_size=5, max_num_seqs=14,
                          deterministic=True)
        done = {}
        for index, job in enumerate(JOBS[:8]):
            made.add_request(*job, request_id=str(index), priority=-index)
            done.update((output.request_id, output) for output in made.step() if output.finished)
        done |= drain(made)
        assert sum(output.metrics.num_preemptions for output in done.values()) > 2 or size == LARGE
        texts.append([whole_text(done[str(index)]) for index in range(8)])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("tokens, rows, count, size", [(94, 6, 4, 2), (123, 4, 5, 2), (80, 7, 3, 3)])
def test_the_rest_of_a_population_waits_where_pages_run_out(tokens, rows, count, size):
    """The first of a population is read while others grow. Where they have taken the pages of the second by then, all
    of it waits; it does not end with an error."""
    prompt = {"prompt_token_ids": ids(17, 11, 5)}
    [whole] = run(engine(function_reward(), LARGE), [(prompt, SHORT, Population())])
    refused = []
    for steps in range(1, 12):
        made = engine(function_reward(), tokens, max_num_batched_tokens=rows, page_size=7)
        for index in range(count):
            made.add_request({"prompt_token_ids": ids(2 + 3 * index, 11, index)}, dataclasses.replace(LONG, seed=index),
                             stars.STARS(size, 3, 1.0, 0.3, 0.5, 1))
        for _ in range(steps):
            made.step()
        made.add_request(prompt, SHORT, Population(), request_id="many")
        opened = made._cache.open

        def opening(*given, opened=opened):
            try:
                return opened(*given)
            except OutOfPages:
                refused.append(given)
                raise

        made._cache.open = opening
        assert facts(drain(made)["many"]) == facts(whole)
    assert refused
