"""Fit a head for MARA: it accepts or rejects candidate tokens of the shipped language model (LM) by the LM's hidden
state, so that texts come out as the shipped reward model (RM) likes them.

    python benchmarks/train_agent.py --data IMDB --out agent/model.safetensors [--texts 400] [--rounds 2]

MARA's authors train it as the actor of a discrete soft actor-critic, over transitions from candidate to candidate and
from token to token, with the reward of the finished text, a term of log-probability, and critics that are learned. What
is done here is a policy gradient of the same actor with two shortcuts, which make it a matter of minutes:

- the critic is not learned. The value of a candidate is the RM's reward of the text so far with it, plus KL times its
  log-probability: an RM that was trained on prefixes is a critic already. So a decision is credited with what the next
  token changes (a discount of 0), and not with the end of the text;
- all candidates of a position were scored, so that its expected value under the policy is a sum and not a sample:
  J = sum_i P(i is taken) * (r_i + KL * log p_i), P(i is taken) = a_i * prod_{j < i} (1 - a_j), plus, for the first,
  prod_j (1 - a_j); a_i is the head's P(accept). Its gradient has no variance beyond the choice of positions.

Positions come from texts that the engine decodes with every candidate scored: in the first round texts that are drawn
from the LM, or guided by the RM; in later ones those of MARA with the head so far. Hidden states are transformers'.

What is measured, on openings of reviews held out from all shipped models: the mean reward of finished texts of MARA
with the head, beside the LM's most probable text, plain samples and ARGS, and what a token costs.
"""

import argparse
import json
import pathlib
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import numpy as np
import torch
import transformers
from common import DEMO_LM, DEMO_RM, RESULTS, describe_machine
from quality import bootstrap
from train_pair import labelled_reviews

import stars
from stars.model.action_head import NORM_EPS, save_action_head
from stars.plan import Enumerate, Fixed, Lanes, Plan, Score
from stars.rules import Decision, Judged, Note, State, whole

WORDS = 6  # of an opening
TOPK = 40
SAMPLING = {"temperature": 0.8, "top_k": TOPK, "top_p": 0.95}  # the published evaluation's
HELD_OUT_OPENINGS, HELD_OUT_TOKENS = 100, 64
BATCH = 64  # positions of a step
SEQUENCES = 16  # responses that decode side by side


class Positions(NamedTuple):
    """Places of texts, padded to the most candidates."""

    states: torch.Tensor  # float32 [positions, TOPK, hidden]
    values: torch.Tensor  # float32 [positions, TOPK]
    real: torch.Tensor  # bool [positions, TOPK]


class Agent(torch.nn.Module):
    """The head, as MARA's actor has it: layers of h and h / 4."""

    def __init__(self, hidden: int, h: int):
        super().__init__()
        self.ln = torch.nn.LayerNorm(hidden, NORM_EPS)
        self.linear1, self.linear2 = torch.nn.Linear(hidden, h), torch.nn.Linear(h, h // 4)
        self.output_linear = torch.nn.Linear(h // 4, 2)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Logits of reject and accept."""
        first = torch.relu(self.linear1(self.ln(states)))
        return self.output_linear(torch.relu(self.linear2(first)))


@dataclass(frozen=True)
class Along:
    """Keeps the attempts that a script says, one of each segment."""

    script: tuple[int, ...]  # from 0
    in_order: ClassVar[bool] = False
    uniforms: ClassVar[int] = 0

    def __call__(self, judged: Sequence[Judged], state: State) -> Decision | None:
        """Once all are scored."""
        if state.left > 0:
            return None
        chosen = judged[self.script[state.segment]]
        return Decision([whole(chosen)], [], {(chosen.hypothesis, chosen.attempt): Note(None, None, True)})


@dataclass(frozen=True)
class Scripted:
    """Every candidate is scored, and a script says which is taken."""

    script: tuple[int, ...]

    def plan(self) -> Plan:
        """As ARGS has it, but for the rule."""
        return Plan(Enumerate(TOPK), Fixed(1), Lanes(TOPK, TOPK), Score("segment"), Along(self.script))


def openings_of(texts: Sequence[str]) -> list[str]:
    """The first words of each."""
    return [" ".join(text.split()[:WORDS]) for text in texts]


def engine_with(head: pathlib.Path | None) -> stars.Engine:
    """The shipped pair."""
    return stars.Engine(DEMO_LM, DEMO_RM, max_num_seqs=SEQUENCES, max_num_lanes=SEQUENCES * TOPK,
                        heads={} if head is None else {"agent": head})


def params(tokens: int, seed: int = 0) -> stars.SamplingParams:
    return stars.SamplingParams(**SAMPLING, max_tokens=tokens, seed=seed)


def explored(openings: list[str], tokens: int, seed: int) -> list[stars.RequestOutput]:
    """Texts whose candidates are all scored: drawn from the LM, or with the RM's reward beside it."""
    policies = [stars.ARGS(TOPK, weight, "stochastic", temperature=0.8)
                for _, weight in zip(openings, np.resize([0.0, 1.0], len(openings)), strict=True)]
    seeds = [params(tokens, seed + index) for index in range(len(openings))]
    return engine_with(None).generate(openings, seeds, policies, use_tqdm=False)


def followed(openings: list[str], tokens: int, head: pathlib.Path) -> list[stars.RequestOutput]:
    """MARA's texts with the head, once more with every candidate scored."""
    engine = engine_with(head)
    outputs = engine.generate(openings, params(tokens), stars.MARA(), use_tqdm=False)
    scripts = [Scripted(tuple(segment.winner for segment in output.outputs[0].segments)) for output in outputs]
    return engine.generate(openings, params(tokens), scripts, use_tqdm=False)


@torch.no_grad()
def positions_of(model: Any, outputs: Sequence[stars.RequestOutput], kl: float) -> Positions:
    """All places with more than one candidate; the LM is run once a text, its candidates beside it: each sees the text
    before it, and itself."""
    states, values, real = [], [], []
    for output in outputs:
        completion, prompt = output.outputs[0], len(output.prompt_token_ids)
        trunk = [*output.prompt_token_ids, *completion.token_ids[:-1]]
        places = [(prompt + at, attempt) for at, segment in enumerate(completion.segments)
                  for attempt in segment.attempts if len(segment.attempts) > 1]
        ids = torch.tensor([[*trunk, *(attempt.token_ids[0] for _, attempt in places)]])
        where = torch.tensor([*range(len(trunk)), *(place for place, _ in places)])
        seen = where[:, None] >= torch.arange(len(where))[None, :]
        seen[len(trunk) :, : len(trunk)] = where[len(trunk) :, None] > torch.arange(len(trunk))[None, :]
        seen[:, len(trunk) :] = torch.eye(len(where), dtype=torch.bool)[:, len(trunk) :]
        mask = torch.zeros(len(where), len(where)).masked_fill(~seen, float("-inf"))
        found = model(input_ids=ids, position_ids=where[None], attention_mask=mask[None, None],
                      use_cache=False).last_hidden_state[0, len(trunk) :]
        row = 0
        for segment in completion.segments:
            count = len(segment.attempts)
            if count < 2:
                continue
            state, value = torch.zeros(TOPK, found.shape[1]), torch.zeros(TOPK)
            state[:count] = found[row : row + count]
            value[:count] = torch.tensor([attempt.reward + kl * attempt.logprob for attempt in segment.attempts])
            states.append(state)
            values.append(value)
            real.append(torch.arange(TOPK) < count)
            row += count
    return Positions(torch.stack(states), torch.stack(values), torch.stack(real))


def taken(agent: Agent, positions: Positions) -> torch.Tensor:
    """P(candidate i is taken), [positions, TOPK]."""
    logits = torch.log_softmax(agent(positions.states), dim=-1)
    accept = logits[..., 1].masked_fill(~positions.real, float("-inf"))
    reject = logits[..., 0].masked_fill(~positions.real, 0.0)
    before = reject.cumsum(1) - reject
    chosen = torch.exp(accept + before)
    none = torch.exp(reject.sum(1, keepdim=True))
    return torch.cat([chosen[:, :1] + none, chosen[:, 1:]], 1)


def fit(agent: Agent, positions: Positions, steps: int, rate: float) -> dict[str, Any]:
    """Raises the expected value of a position above that of its most probable candidate."""
    gains = torch.where(positions.real, positions.values - positions.values[:, :1], 0.0)
    optimizer = torch.optim.AdamW(agent.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    order, losses = torch.randperm(len(gains)), []
    for step in range(steps):
        at = order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]
        loss = -(taken(agent, Positions(*(one[at] for one in positions))) * gains[at]).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(-loss.item())
    return {"positions": len(gains), "steps": steps, "gain_at_first": round(float(np.mean(losses[:20])), 4),
            "gain_at_last": round(float(np.mean(losses[-50:])), 4),
            "gain_of_the_best_candidates": round(float(gains.amax(1).mean()), 4)}


def measure(head: pathlib.Path, openings: list[str]) -> dict[str, Any]:
    """Rewards and costs of finished texts, method by method."""
    engine = engine_with(head)
    greedy = stars.SamplingParams(temperature=0.0, max_tokens=HELD_OUT_TOKENS)
    rows = {"MARA": (stars.MARA(score=True), params(HELD_OUT_TOKENS)), "greedy": (stars.Sample(score=True), greedy),
            "sample": (stars.Sample(score=True), params(HELD_OUT_TOKENS, 11)),
            "ARGS": (stars.ARGS(), params(HELD_OUT_TOKENS))}
    found: dict[str, Any] = {"openings": len(openings), "tokens": HELD_OUT_TOKENS, "sampling": SAMPLING}
    rewards = {}
    for name, (policy, given) in rows.items():
        begin = time.perf_counter()
        outputs = engine.generate(openings, given, policy, use_tqdm=False)
        seconds = time.perf_counter() - begin
        one_by_one = time.perf_counter()
        alone = sum(len(engine.generate(opening, given, policy, use_tqdm=False)[0].outputs[0].token_ids)
                    for opening in openings[:5])
        one_by_one = time.perf_counter() - one_by_one
        completions = [output.outputs[0] for output in outputs]
        kept = sum(len(one.token_ids) for one in completions)
        segments = [segment for one in completions for segment in one.segments]
        values = rewards[name] = np.array([one.reward for one in completions], dtype=np.float64)[:, None]
        found[name] = {
            "mean_reward": round(float(values.mean()), 4), "mean_reward_95": bootstrap(values),
            "tokens_per_text": round(kept / len(completions), 2), "ms_per_token": round(1e3 * seconds / kept, 3),
            "ms_per_token_of_one_stream": round(1e3 * one_by_one / alone, 3),
            "distinct_texts": len({one.text for one in completions})}
        if name == "MARA":
            found[name] |= {
                "rows_read_per_token": round(sum(attempt.reward is not None for segment in segments
                                                 for attempt in segment.attempts) / kept, 2),
                "share_not_the_first": round(sum(segment.winner > 0 for segment in segments) / kept, 4)}
    for name in ("greedy", "sample", "ARGS"):
        found["MARA"][f"above_{name}"] = round(float((rewards["MARA"] - rewards[name]).mean()), 4)
        found["MARA"][f"above_{name}_95"] = bootstrap(rewards["MARA"] - rewards[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of the reviews")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the head's safetensors file")
    parser.add_argument("--texts", type=int, default=200, help="of a round")
    parser.add_argument("--tokens", type=int, default=48, help="of a text to learn from")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1500, help="of a round")
    parser.add_argument("--h", type=int, default=64, help="units of the head's first layer")
    parser.add_argument("--kl", type=float, default=0.1, help="of a candidate's log-probability, beside its reward")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS / "train_agent.json")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    chance = random.Random(options.seed)
    training, held_out = labelled_reviews(options.data)
    texts = openings_of(chance.sample([text for text, _ in training], options.texts * options.rounds))
    model = transformers.LlamaForCausalLM.from_pretrained(DEMO_LM, dtype=torch.float32).model.eval()
    agent = Agent(model.config.hidden_size, options.h)
    found, rounds, begin = [], [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        head = pathlib.Path(folder) / "head.safetensors"
        for index in range(options.rounds):
            chosen = texts[index * options.texts : (index + 1) * options.texts]
            outputs = followed(chosen, options.tokens, head) if index else explored(chosen, options.tokens, 100)
            found.append(positions_of(model, outputs, options.kl))
            facts = fit(agent, Positions(*(torch.cat(parts) for parts in zip(*found, strict=True))), options.steps,
                        options.rate)
            save_action_head(agent.state_dict(), head)
            rounds.append(facts | {"minutes": round((time.monotonic() - begin) / 60, 2)})
            print(rounds[-1], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_action_head(agent.state_dict(), options.out)
    step = len(held_out) // HELD_OUT_OPENINGS
    facts = {"machine": describe_machine(),
             "settings": {name: value for name, value in vars(options).items() if not isinstance(value, pathlib.Path)},
             "rounds": rounds, "bytes": options.out.stat().st_size,
             "held_out": measure(options.out, openings_of([text for text, _ in held_out[::step]]))}
    options.results.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts["held_out"], indent=1))


if __name__ == "__main__":
    main()
