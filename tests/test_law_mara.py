"""MARA's law through the engine: each token is the first of the filtered candidates, in their order, whose P(accept) is
over 0.5, else the first. Nothing is drawn, so that it is compared decision by decision with a loop that recomputes
everything (tests/mara_loop.py): on a toy in numpy and float64, and on the shipped pair by transformers. Errors are
planted, with each of which the same comparison must fail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import stars
import stars.hidden_states
import stars.judge
import stars.proposer
import stars.rules
from mara_loop import Choice, accept_probability, decide, head_tensors
from stars.cli.options import shipped_pair
from stars.model.action_head import NORM_EPS, convert_action_head, load_action_head, save_action_head
from stars.plan import Enumerate, Fixed, Hidden, Lanes, Plan, Score, plan_of
from stars.rules import Argmax, FirstAbove
from test_conservation import nothing_is_held
from toy import EOS, ToyModel, ids, toy_engine

VOCAB, HIDDEN, H = 19, 16, 24
MODEL = ToyModel(VOCAB, seed=5, layers=2)
TENSORS = head_tensors(HIDDEN, H, seed=6, bias=-1.0)
TOLERANCE = 2e-5  # of P(accept): float32 beside float64, whose decisions are compared as they are
PROMPTS = [ids(3 + 4 * index, VOCAB, index) for index in range(6)]
PLAIN = stars.SamplingParams(max_tokens=11, seed=4, temperature=0.8, top_k=9, top_p=0.9)
CASES = {
    "published": PLAIN, "temperature 0": dataclasses.replace(PLAIN, temperature=0.0, top_p=1.0),
    "penalties": dataclasses.replace(PLAIN, presence_penalty=0.7, repetition_penalty=1.2, top_p=0.95),
    "narrow": dataclasses.replace(PLAIN, top_p=0.35),
}

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("heads") / "agent.safetensors"
    save_file(TENSORS, path)
    return str(path)


def toy_state(tokens: Sequence[int]) -> np.ndarray:
    """Behind the final norm: the toy's logits are linear in it, and its last matrix has more rows than columns."""
    state, *_ = np.linalg.lstsq(MODEL.out.astype(np.float64), MODEL.logits(tokens), rcond=None)
    return state


def the_loop(prompt: list[int], params: stars.SamplingParams, topk: int) -> list[Choice]:
    seen = params if params.temperature else dataclasses.replace(params, temperature=1.0)
    return decide(MODEL.logits, toy_state, TENSORS, prompt, seen, topk, EOS)


def agree(engine: stars.Engine, policy: stars.MARA, params: stars.SamplingParams) -> int:
    """Compares every decision of every prompt; how many there were."""
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, policy, use_tqdm=False)
    decisions = 0
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        [completion], choices = output.outputs, the_loop(prompt, params, policy.topk)
        assert completion.error is None and completion.reward is None
        assert completion.token_ids == [choice.candidates[choice.taken] for choice in choices]
        for segment, choice in zip(completion.segments, choices, strict=True):
            assert segment.winner == choice.taken
            drawn = [attempt.token_ids for attempt in segment.attempts]
            assert drawn == [[token] for token in choice.candidates][: len(drawn)]
            rewards = [attempt.reward for attempt in segment.attempts]
            asked = rewards[: len(choice.accepted)]
            assert asked == pytest.approx(choice.accepted, abs=TOLERANCE)
            if len(choice.candidates) == 1:
                assert rewards == [None] and segment.accepted
            elif policy.width == 1:
                assert len(rewards) == len(choice.accepted) or choice.taken == 0 and len(rewards) == len(drawn)
            assert segment.accepted == (len(choice.candidates) == 1 or choice.accepted[choice.taken] > 0.5)
            decisions += 1
    engine.check_integrity()
    nothing_is_held(engine)
    return decisions


@pytest.mark.parametrize("width", [None, 1, 3])
@pytest.mark.parametrize("case", CASES)
def test_every_decision_is_the_loops(head, case, width):
    engine = toy_engine(MODEL, heads={"agent": head})
    assert agree(engine, stars.MARA(topk=7, width=width), CASES[case]) > 30


@pytest.mark.parametrize("options", [dict(deterministic=True), dict(max_segment_size=3), dict(max_num_lanes=6,
                         max_num_seqs=6), dict(cache_tokens=80, page_size=4), dict(max_num_seqs=2, max_num_lanes=5)],
                         ids=["deterministic", "slabs of three", "one lane each", "few pages", "two at a time"])
def test_whatever_the_engine(head, options):
    """Few slab rows, several rounds of one token, pages that run out: the same decisions."""
    engine = toy_engine(MODEL, heads={"agent": head}, **options)
    assert agree(engine, stars.MARA(topk=7), PLAIN) > 30


def test_pages_run_out_where_that_is_said(head):
    """Responses gave way and came back, in deterministic mode too, and the texts stay."""
    for deterministic in (False, True):
        engine = toy_engine(MODEL, heads={"agent": head}, cache_tokens=80, page_size=4, deterministic=deterministic)
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS],
                                  dataclasses.replace(PLAIN, ignore_eos=True), stars.MARA(topk=7), use_tqdm=False)
        assert sum(output.metrics.num_preemptions for output in outputs) > 0
        wide = toy_engine(MODEL, heads={"agent": head}, deterministic=deterministic).generate(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS], dataclasses.replace(PLAIN, ignore_eos=True),
            stars.MARA(topk=7), use_tqdm=False)
        for one, other in zip(outputs, wide, strict=True):
            assert one.outputs[0].token_ids == other.outputs[0].token_ids
            if deterministic:
                for mine, theirs in zip(one.outputs[0].segments, other.outputs[0].segments, strict=True):
                    both = [(a.reward, b.reward) for a, b in zip(mine.attempts, theirs.attempts, strict=False)]
                    assert all(a == b for a, b in both if None not in (a, b))  # how many are asked at once differs


def test_the_cases_have_power():
    """Later candidates win, all are rejected, one is alone, EOS is rejected and wins."""
    choices = [choice for params in CASES.values() for prompt in PROMPTS for choice in the_loop(prompt, params, 7)]
    asked = [choice for choice in choices if choice.accepted]
    assert sum(choice.taken > 0 for choice in asked) > 0.2 * len(asked)
    assert sum(max(choice.accepted) <= 0.5 for choice in asked) > 5
    assert sum(len(choice.candidates) == 1 for choice in choices) > 5
    eos = [choice for choice in asked if EOS in choice.candidates[: len(choice.accepted)]]
    assert any(choice.candidates[choice.taken] != EOS for choice in eos)
    assert any(choice.candidates[choice.taken] == EOS for choice in eos)
    closest = min(abs(one - 0.5) for choice in asked for one in choice.accepted)
    assert closest > TOLERANCE, "rounding could decide"


def test_beside_requests_that_draw_and_are_scored(head):
    """The language model's passes of MARA leave the pages of others as they are, and the reverse; a reward is read once
    where it is asked for, at the end."""
    reward = stars.FunctionReward(lambda prompt, responses: [0.1 * sum(one) for one in responses], inputs="ids")
    engine = toy_engine(MODEL, reward, heads={"agent": head})
    asked = [(stars.MARA(topk=7, score=True), PLAIN), (stars.STARS(3, 4, 1.0, 0.5, 1.0, 2), PLAIN),
             (stars.ARGS(5), PLAIN), (stars.MARA(topk=7, width=2), dataclasses.replace(PLAIN, n=3))]
    policies, params = zip(*asked, strict=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS[:4]], list(params), list(policies),
                              use_tqdm=False)
    for output, (policy, given), prompt in zip(outputs, asked, PROMPTS, strict=False):
        alone = toy_engine(MODEL, reward, heads={"agent": head})
        [single] = alone.generate([{"prompt_token_ids": prompt}], given, policy, use_tqdm=False)
        assert [one.token_ids for one in output.outputs] == [one.token_ids for one in single.outputs]
    first = outputs[0].outputs[0]
    assert first.reward == pytest.approx(0.1 * sum(token for token in first.token_ids if token != EOS))
    assert all(0.0 < attempt.reward < 1.0 for attempt in first.segments[-1].attempts if attempt.reward is not None)
    assert {tuple(one.token_ids) for one in outputs[3].outputs} == {tuple(outputs[3].outputs[0].token_ids)}
    nothing_is_held(engine)


# -- planted errors -----------------------------------------------------------------------------------------------


def order_reversed(monkeypatch):
    """The least probable candidate is asked about first."""
    find = stars.proposer.Ranking
    monkeypatch.setattr(stars.proposer, "Ranking", lambda tokens, logprobs, *others: find(
        tokens[::-1], logprobs[::-1], *others))


def threshold_forgotten(monkeypatch):
    monkeypatch.setattr(stars.policies, "FirstAbove", lambda: FirstAbove(0.4))


def the_best_instead_of_the_first(monkeypatch):
    monkeypatch.setattr(FirstAbove, "in_order", False)

    def best(self, judged, state):
        if state.left:
            return None
        top = max(judged, key=lambda one: 1.0 if one.reward is None else one.reward)
        return stars.rules.Decision([stars.rules.whole(top)], [], {}) if (top.reward or 1.0) > 0.5 else None

    monkeypatch.setattr(FirstAbove, "__call__", best)


def the_last_where_none_is_accepted(monkeypatch):
    monkeypatch.setattr(stars.policies, "First", stars.exhaustions.Last)


def the_single_candidate_is_asked(monkeypatch):
    monkeypatch.setattr(stars.hidden_states, "_alone", lambda lane: False)


def lanes_in_wrong_order(monkeypatch):
    accept = stars.model.action_head.ActionHead.accept

    def rotated(self, hidden):
        found = accept(self, hidden)
        return found[1:] + found[:1]

    monkeypatch.setattr(stars.model.action_head.ActionHead, "accept", rotated)


def state_before_the_final_norm(monkeypatch):
    """What LayerNorm would be given without the language model's own norm: up to its scale, the state over its gains.
    """
    accept, gains = stars.model.action_head.ActionHead.accept, torch.tensor(MODEL.final_norm)
    monkeypatch.setattr(stars.model.action_head.ActionHead, "accept",
                        lambda self, hidden: accept(self, hidden / gains))


def the_token_before_is_not_seen(monkeypatch):
    """The pages do not hold the keys of the last token where candidates are read."""
    span = stars.hidden_states.Span
    monkeypatch.setattr(stars.hidden_states, "Span",
                        lambda table, tokens, start, slots: span(table, tokens, start - 1, slots))


def reject_is_read(monkeypatch):
    """P(reject) for P(accept)."""
    accept = stars.model.action_head.ActionHead.accept
    monkeypatch.setattr(stars.model.action_head.ActionHead, "accept",
                        lambda self, hidden: [1.0 - one for one in accept(self, hidden)])


@pytest.mark.parametrize("error", [
    order_reversed, threshold_forgotten, the_best_instead_of_the_first, the_last_where_none_is_accepted,
    the_single_candidate_is_asked, lanes_in_wrong_order, state_before_the_final_norm, the_token_before_is_not_seen,
    reject_is_read], ids=lambda error: error.__name__)
def test_a_planted_error_is_seen(head, error, monkeypatch):
    error(monkeypatch)
    with pytest.raises(AssertionError):
        test_every_decision_is_the_loops(head, "published", None)
        test_every_decision_is_the_loops(head, "narrow", None)


# -- the shipped pair and head ------------------------------------------------------------------------------------


def test_the_shipped_head_beside_transformers():
    """Hidden states of transformers, everything computed anew for every candidate."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    directory = shipped_pair()[0]
    file = str(directory).removesuffix("lm") + "agent/model.safetensors"
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    engine = stars.Engine(*shipped_pair(), heads={"agent": file}, dtype="float32")
    params = stars.SamplingParams(max_tokens=6, temperature=0.8, top_k=40, top_p=0.95)
    [output] = engine.generate("The acting in this", params, stars.MARA(), use_tqdm=False)
    known: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}

    @torch.no_grad()
    def run(tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        if tuple(tokens) not in known:
            found = model(torch.tensor([list(tokens)]), output_hidden_states=True)
            known[tuple(tokens)] = tuple(row[0, -1].double().numpy() for row in (found.logits, found.hidden_states[-1]))
        return known[tuple(tokens)]

    choices = decide(lambda tokens: run(tokens)[0], lambda tokens: run(tokens)[1], load_file(file),
                     output.prompt_token_ids, params, 40, eos=2)
    [completion] = output.outputs
    assert completion.token_ids == [choice.candidates[choice.taken] for choice in choices]
    for segment, choice in zip(completion.segments, choices, strict=True):
        assert segment.winner == choice.taken
        assert [attempt.reward for attempt in segment.attempts][: len(choice.accepted)] == pytest.approx(
            choice.accepted, abs=1e-3)


# -- heads and their files ----------------------------------------------------------------------------------------


def test_the_bits_of_a_row_do_not_depend_on_others(head):
    """In deterministic mode: what width and neighbours rest on."""
    agent = load_action_head(head, HIDDEN, "a head", deterministic=True)
    hidden = torch.randn(37, HIDDEN, generator=torch.Generator().manual_seed(1))
    together = agent.accept(hidden)
    assert together == pytest.approx([accept_probability(TENSORS, row.double().numpy()) for row in hidden], abs=1e-6)
    padded = torch.cat([hidden, hidden[:3]])  # to a multiple of four, as passes in that mode are
    assert agent.accept(padded)[:37] == together


def test_a_pickle_is_converted(tmp_path, capsys):
    from stars.cli import main

    source, target = tmp_path / "actor.pth", tmp_path / "agent.safetensors"
    torch.save({name: tensor.double() for name, tensor in TENSORS.items()}, source)
    assert main(["convert-head", str(source), str(target)]) == 0
    assert "24 units over hidden states of 16 numbers" in capsys.readouterr().out
    hidden = torch.randn(5, HIDDEN)
    assert load_action_head(target, HIDDEN, "a head").accept(hidden) == pytest.approx(
        [accept_probability(TENSORS, row.double().numpy()) for row in hidden], abs=1e-6)


class Harm:
    def __reduce__(self):
        return print, ("a pickle was run",)


def test_a_pickle_of_more_than_tensors_is_refused(tmp_path, capsys):
    source = tmp_path / "actor.pth"
    torch.save(TENSORS | {"extra": Harm()}, source)
    with pytest.raises(stars.errors.ModelError, match="cannot be read as a pickle of tensors alone"):
        convert_action_head(source, tmp_path / "out.safetensors")
    assert "was run" not in capsys.readouterr().out and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(("change", "words"), [
    (dict(missing="linear2.bias"), r"lacks linear2.bias: a head has ln.weight"),
    (dict(extra=torch.zeros(2)), "has extra, which no head has"),
    ({"ln.weight": torch.ones(8), "ln.bias": torch.zeros(8), "linear1.weight": torch.zeros(H, 8)},
     "reads hidden states of 8 numbers and the language model's have 16: use the head of this model"),
    ({"linear2.weight": torch.zeros(6, H + 1)}, r"linear2.weight of .* has shape \[6, 25\] .* ask for \[6, 24\]"),
    ({"output_linear.weight": torch.zeros(3, 6)},
     r"has shape \[3, 6\] where the head's other tensors ask for \[2, 6\]"),
    ({"ln.bias": torch.full((HIDDEN,), float("nan"))}, "ln.bias .* NaN or infinite"),
    ({"linear1.bias": torch.zeros(H, dtype=torch.int64)}, "is no tensor of floating point numbers"),
], ids=["missing", "extra", "width", "inner width", "actions", "NaN", "integers"])
def test_heads_that_do_not_fit(tmp_path, change, words):
    tensors = TENSORS | {name: value for name, value in change.items() if name != "missing"}
    tensors.pop(change.get("missing", ""), None)
    path = tmp_path / "agent.safetensors"
    save_file(tensors, path)
    with pytest.raises(stars.errors.ModelError, match=words):
        toy_engine(MODEL, heads={"agent": str(path)})


def test_a_file_that_is_no_safetensors(tmp_path):
    path = tmp_path / "agent.safetensors"
    path.write_bytes(b"no header")
    with pytest.raises(stars.errors.ModelError, match=r"heads\['agent'\]: .* cannot be read as safetensors"):
        toy_engine(MODEL, heads={"agent": str(path)})


def test_at_the_door(head):
    engine = toy_engine(MODEL, heads={"agent": head})
    prompt = {"prompt_token_ids": PROMPTS[0]}
    with pytest.raises(stars.errors.RequestError, match=r"no head named 'judge' \(those given: 'agent'\)"):
        engine.add_request(prompt, PLAIN, stars.MARA(head="judge"))
    with pytest.raises(stars.errors.RequestError, match="hold 1: build it with a larger max_segment_size"):
        toy_engine(MODEL, heads={"agent": head}, max_segment_size=1).add_request(prompt, PLAIN, stars.MARA())
    with pytest.raises(stars.errors.RequestError, match="MARA.head is ''"):
        stars.MARA(head="")
    with pytest.raises(stars.errors.RequestError, match="needs a reward"):
        engine.add_request(prompt, PLAIN, stars.MARA(score=True))


@dataclasses.dataclass(frozen=True)
class Own:
    made: Plan

    def plan(self) -> Plan:
        return self.made


@pytest.mark.parametrize(("plan", "words"), [
    (Plan(stars.plan.Sampled(), Fixed(1), Lanes(1), Score("never", reads=Hidden("agent")), FirstAbove()),
     "gives tokens that are enumerated their rewards"),
    (Plan(Enumerate(4), Fixed(1), Lanes(4, 4), Score("segment", reads=Hidden("agent")), FirstAbove()),
     "gives tokens that are enumerated their rewards"),
    (Plan(Enumerate(4), Fixed(1), Lanes(4, 4), Score("never", reads=Hidden("agent")), Argmax()),
     "gives none to an attempt that is alone"),
    (Plan(Enumerate(4), Fixed(1), Lanes(4, 4), Score("never"), FirstAbove()), "decides by rewards"),
])
def test_plans_that_do_not_go_together(plan, words):
    with pytest.raises(stars.errors.RequestError, match=words):
        plan_of(Own(plan))


def test_the_norm_is_torchs():
    assert torch.nn.LayerNorm(4).eps == NORM_EPS
    with pytest.raises(stars.errors.ModelError, match="lacks ln.weight"):
        save_action_head({}, "nowhere")
