"""The next scoring pass is prepared while the device is at the one before it: the same pass, only sooner."""

from __future__ import annotations

import pytest

import recorded_gpu
import stars
from building import PADDED, work_as
from stars.bindings import libstars
from stars.reward.scoring import AheadScores, ScoringReward, TrailingScores
from stars.scores import Scores
from test_scheduler import counts, text
from toy import ToyModel, ids, toy_engine

pytestmark = [pytest.mark.usefixtures("one_torch_thread"),
              pytest.mark.skipif(not libstars.available(), reason="libstars is not built")]

LM = ToyModel(vocab=11, seed=1, layers=1, positions=160)
RM = ToyModel(vocab=11, seed=3, layers=1, positions=160, head="reward", sharpness=1.5)
TARGET = PADDED._replace(ridge_rows=16)  # passes of two candidates of eight tokens
SIZES = dict(cache_tokens=1024, page_size=4, max_num_seqs=7, max_num_lanes=32, max_segment_size=8)
PARAMS = stars.SamplingParams(max_tokens=40, seed=3, ignore_eos=True)
PROMPT = {"prompt_token_ids": ids(9, 11)}
SOFT, HARD, ALL = (stars.STARS(8, 8, 0.5, 0.4, 1.5, 8), stars.STARS(8, 8, 1.0, 0.0, 2.5, 8),
                   stars.BlockwiseBestOfK(8, 8))
BEST = stars.BlockwiseBestOfK(6, 8)


class Passes:
    """What became of the passes that were prepared: launched or dropped."""

    def __init__(self, monkeypatch):
        self.launched = self.dropped = 0
        for name in ("launch", "drop"):
            whole = getattr(AheadScores, name)

            def noting(ahead, whole=whole, name=name):
                self.launched += name == "launch"
                self.dropped += name == "drop"
                whole(ahead)

            monkeypatch.setattr(AheadScores, name, noting)


def built(monkeypatch, look: bool = True) -> stars.Engine:
    work_as(monkeypatch, TARGET)
    made = toy_engine(LM, stars.CausalReward(RM.decoder()), **SIZES)
    made._round._scores._looks_ahead = look
    if look:
        monkeypatch.setattr(Scores, "_idle", property(lambda scores: 1.0, lambda scores, seconds: None), raising=False)
    return made


def generate(made: stars.Engine, policies, count: int = 1) -> list[stars.RequestOutput]:
    names = [made.add_request(PROMPT if not index else {"prompt_token_ids": ids(9, 11, index)}, PARAMS, policy)
             for policy in policies for index in range(count)]
    done = {}
    while made.has_unfinished_requests():
        done |= {output.request_id: output for output in made.step()}
        made.check_integrity()
    assert made.reward.cache.num_free_slabs == made.reward.cache.num_slabs
    return [done[name] for name in names]


@pytest.mark.parametrize("policies, count", [([SOFT], 1), ([HARD], 1), ([ALL], 1), ([SOFT, ALL, HARD], 2)])
def test_texts_rewards_and_counts_are_the_same(monkeypatch, policies, count):
    with monkeypatch.context() as patched:
        wanted = generate(built(patched, look=False), policies, count)
    seen, made = Passes(monkeypatch), built(monkeypatch)
    got = generate(made, policies, count)
    assert [text(one) for one in got] == [text(one) for one in wanted]
    assert [counts(one) for one in got] == [counts(one) for one in wanted]
    assert made._round._scores._ahead is None
    assert seen.launched >= 2
    if policies == [ALL]:  # eight candidates a segment, two a pass: whatever is prepared is wanted
        assert seen.dropped == 0 and seen.launched == 5 * 3
    else:
        assert seen.dropped > 0  # the rule took one of the candidates before


def test_while_a_pass_takes_longer_than_to_prepare_one(monkeypatch):
    """A pass that is over before the next is prepared is not worth it, but where the next is scored in any case."""
    seen, made = Passes(monkeypatch), built(monkeypatch)
    monkeypatch.setattr(Scores, "_idle", property(lambda scores: 0.0, lambda scores, seconds: None), raising=False)
    made._round._scores._preparing = 1.0
    generate(made, [HARD])
    assert seen.dropped == 0
    seen.launched = 0
    generate(made, [ALL])
    assert seen.launched == 5 * 3 and seen.dropped == 0


@pytest.mark.parametrize("policy, early", [(ALL, True), (HARD, False)])
def test_what_is_wanted_anyway_is_launched_before_the_host_reads(monkeypatch, policy, early):
    """Of a rule that reads rewards in order, a pass waits for its word; of another, it lies behind the one that runs,
    and no more than that one."""
    made, order = built(monkeypatch), []
    for owner, name in ((TrailingScores, "launch"), (TrailingScores, "results"), (AheadScores, "launch"),
                        (AheadScores, "results")):
        whole = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, whole=whole, name=name: (order.append(name), whole(*given))[1])
    generate(made, [policy])
    under_way = [order[: index + 1].count("launch") - order[: index + 1].count("results")
                 for index in range(len(order))]
    assert under_way[-1] == 0 and set(under_way) == ({0, 1, 2} if early else {0, 1})
    if early:  # four passes a segment, of two candidates each
        assert order == ["launch", "launch", "results", "launch", "results", "launch", "results", "results"] * 5


def test_rewards_of_two_passes_are_read_apart(monkeypatch):
    """On a device with memory of its own, that does at any time as much as it likes of what it was given."""
    with monkeypatch.context() as patched:
        wanted = generate(built(patched, look=False), [ALL, BEST], 2)
    gpu = recorded_gpu.install(monkeypatch)
    work_as(monkeypatch, recorded_gpu.TARGET._replace(ridge_rows=16))
    seen = Passes(monkeypatch)
    made = recorded_gpu.build(gpu, LM.decoder(), stars.CausalReward(RM.decoder()), **SIZES)
    for _ in range(3):  # what was launched one by one is then captured, and replayed
        got = generate(made, [ALL, BEST], 2)
        assert [text(one) for one in got] == [text(one) for one in wanted]
        assert [counts(one) for one in got] == [counts(one) for one in wanted]
    assert seen.launched > 3 * 5 * 2 and seen.dropped == 0 and gpu.replays > 100


@pytest.mark.parametrize("faulty", [2, 5])
def test_a_pass_that_was_launched_in_vain_gives_back_what_it_took(monkeypatch, faulty):
    """A candidate of the pass before, whose reward is NaN, ends the request; another request goes on."""
    made, whole, calls = built(monkeypatch), ScoringReward.ahead_results, []
    seen = Passes(monkeypatch)

    def results(*given):
        calls.append(1)
        found = whole(*given)
        return [one._replace(reward=float("nan")) for one in found] if len(calls) == faulty else found

    monkeypatch.setattr(ScoringReward, "ahead_results", results)
    [ended] = generate(made, [ALL])
    assert "NaN" in ended.outputs[0].error and seen.dropped == (faulty % 3 != 0) == 1
    with monkeypatch.context() as patched:
        wanted = generate(built(patched, look=False), [ALL])
    assert [text(one) for one in generate(made, [ALL])] == [text(one) for one in wanted]


def test_a_cpu_prepares_nothing(monkeypatch):
    seen = Passes(monkeypatch)
    made = toy_engine(LM, stars.CausalReward(RM.decoder()), **SIZES)
    generate(made, [SOFT, ALL])
    assert seen.launched == seen.dropped == 0


def test_a_pass_in_between_only_costs_the_preparation(monkeypatch):
    """Buffers that another pass has filled since are filled again."""
    with monkeypatch.context() as patched:
        wanted = generate(built(patched, look=False), [ALL])
    made = built(monkeypatch)
    passes, launch, lost = made.reward._passes, AheadScores.launch, []

    def between(ahead) -> None:
        if passes.prepared:
            table = made.reward.cache.open([1, 2, 3])
            passes.prefill([(table, [1, 2, 3], 3)])
            made.reward.cache.close(table)
            lost.append(not passes.prepared)
        launch(ahead)

    monkeypatch.setattr(AheadScores, "launch", between)
    assert [text(one) for one in generate(made, [ALL])] == [text(one) for one in wanted]
    assert lost and all(lost)


@pytest.mark.parametrize("place", ["launch", "results", "drop", "__init__"])
def test_an_interrupt_loses_nothing(monkeypatch, place):
    wanted = generate(built(monkeypatch), [SOFT, ALL])
    made, whole, calls = built(monkeypatch), getattr(AheadScores, place), []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(AheadScores, place, interrupted)
    names, done = [made.add_request(PROMPT, PARAMS, policy) for policy in (SOFT, ALL)], {}
    while made.has_unfinished_requests():
        try:
            done |= {output.request_id: output for output in made.step()}
        except KeyboardInterrupt:
            made.check_integrity()
    made.check_integrity()
    assert len(calls) > 2
    assert [[one.token_ids for one in done[name].outputs] for name in names] == [
        [one.token_ids for one in output.outputs] for output in wanted]
