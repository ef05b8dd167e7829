"""Train a reward for a chat model on human preferences: a LoRA adapter and a head over the chat model's own body.

    python benchmarks/train_lora_reward.py --model DIR --data HH --out OUT [--seconds 120] [--device cuda]

DIR is the chat model, a Hugging Face directory with tokenizer and chat template. HH is the folder with
hh_helpful_test.jsonl.gz and hh_harmless_test.jsonl.gz (Bai et al., "Training a Helpful and Harmless Assistant with
Reinforcement Learning from Human Feedback", arXiv 2204.05862): JSON lines with `prompt`, `chosen` and `rejected`. They
are split in three by a hash of a dialogue's first turn, so that no dialogue is in two thirds: one trains the reward,
one trains a judge that never guides, one is reported on. Of a training third, every eighth dialogue chooses the
learning rate and when to stop.

OUT/reward and OUT/judge are written in peft's format for sequence classification (`stars.LoraReward` reads them), and
OUT/figures.json says what was measured. The loss is that of Bradley and Terry, half of it on whole replies, half on
pairs that are both cut after the same random number of tokens: unfinished replies are what STARS scores. A dialogue is
put into the chat template as the engine's causal rewards put it, and the last token's reward is read: no end of the
turn is behind it, as with close="none".

The learning rate follows the fraction of the steps or of the seconds that is spent, whichever is larger, so a slow
machine gives fewer steps and never a schedule cut off in its middle. On a GPU products are formed in bfloat16
(autocast), on a CPU in float32; what is trained is kept in float32 and rounded to bfloat16 before it is measured, as it
is stored.
"""
# ruff: noqa: E402 a checkout that is not installed is made importable first

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import pathlib
import random
import re
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

if find_spec("stars") is None:
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "device"))
    import importable

    importable.install()

import torch
import torch.nn.functional as F
import transformers
from common import describe_machine
from safetensors.torch import save_file
from train_guide import MODULES, Adapted, adapt
from train_pair import pad

from stars.model.tokenizer import Tokenizer, load_tokenizer

FILES = {"helpful": "hh_helpful_test.jsonl.gz", "harmless": "hh_harmless_test.jsonl.gz"}
THIRDS = ("reward", "judge", "report")
CHECKED = 8  # one dialogue of so many of a training third chooses rate and step
LONGEST_PROMPT, LONGEST_REPLY = 448, 256  # tokens; dialogues lose their first turns, replies their ends
CUTS = 4  # of each pair, in a step
CHECKED_CUTS = (8, 16, 32, 64, 128)  # of each pair, where a checkpoint is chosen
SHORTEST_CUT = 4  # tokens; a shorter reply says too little
REPORTED = (16, 32, 64)  # tokens
CHECKS = 6  # times that a run looks at what it does not train on
Z = 1.959964  # of a 95 % interval


class Pair(NamedTuple):
    """Token ids of a prompt and of the two replies to it."""

    kind: str  # of FILES
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def length(self) -> int:
        """Of the longer text."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class Scorer(NamedTuple):
    """A body with adapters, and what reads it."""

    body: Any  # transformers' model without a head
    adapters: dict[str, Adapted]
    head: torch.nn.Parameter  # float32 [1, hidden]

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """All that learns."""
        return [weight for one in self.adapters.values() for weight in (one.A, one.B)] + [self.head]


# ---------------------------------------------------------------- data


def turns_of(prompt: str) -> list[dict[str, str]]:
    """The messages of a dialogue in the data set's form, "\\n\\nHuman: …\\n\\nAssistant:", without the open turn.

    A few turns end with the next one's name: it is cut off.
    """
    parts = re.split(r"\n\n(Human|Assistant):", prompt)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [{"role": roles[name], "content": cleaned(text)} for name, text in zip(parts[::2], parts[1::2])]
    if len(messages) < 2 or messages[-1] != {"role": "assistant", "content": ""}:
        raise ValueError(f"{prompt[-60:]!r} does not end with an open turn of the assistant")
    return messages[:-1]


def cleaned(text: str) -> str:
    """A turn without white space around it and without the next turn's name at its end."""
    return re.sub(r"(\s*\n\n(Human|Assistant):?)+\s*$", "", text).strip()


def third(messages: list[dict[str, str]]) -> str:
    """Which third a dialogue is in: by its first turn, which dialogues of one conversation share."""
    return THIRDS[_digest(messages) % 3]


def checks(messages: list[dict[str, str]]) -> bool:
    """Whether a dialogue of a training third is kept apart to choose by."""
    return _digest(messages) // 3 % CHECKED == 0


def _digest(messages: list[dict[str, str]]) -> int:
    return int.from_bytes(hashlib.sha256(messages[0]["content"].encode()).digest()[:8], "big")


def read_pairs(folder: pathlib.Path, tokenizer: Tokenizer) -> tuple[dict[str, list[Pair]], dict[str, int]]:
    """Pairs by third, of the training ones "reward check" and "judge check" besides; and how many lines are left out
    and why."""
    found: dict[str, list[Pair]] = {name: [] for name in (*THIRDS, "reward check", "judge check")}
    left_out = {"a reply is empty": 0, "both replies are the same": 0, "the last turn is too long": 0}
    for kind, name in FILES.items():
        with gzip.open(folder / name, "rt", encoding="utf8") as lines:
            for row in map(json.loads, lines):
                messages, replies = turns_of(row["prompt"]), [cleaned(row[key]) for key in ("chosen", "rejected")]
                if not all(replies):
                    left_out["a reply is empty"] += 1
                elif replies[0] == replies[1]:
                    left_out["both replies are the same"] += 1
                elif (prompt := prompt_ids(messages, tokenizer)) is None:
                    left_out["the last turn is too long"] += 1
                else:
                    part = third(messages)
                    if part != "report" and checks(messages):
                        part += " check"
                    found[part].append(Pair(kind, prompt, *(reply_ids(text, tokenizer) for text in replies)))
    return found, left_out


def prompt_ids(messages: list[dict[str, str]], tokenizer: Tokenizer) -> list[int] | None:
    """What the engine's causal rewards read before a reply; of a long dialogue without its first turns, and None where
    the last one alone is too long."""
    for begin in range(0, len(messages), 2):
        before, _ = tokenizer.split_template(messages[begin:])
        ids = tokenizer.encode(before, add_special_tokens=False)
        if len(ids) <= LONGEST_PROMPT:
            return ids
    return None


def reply_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """A reply as the engine has it scored: without the end of the turn, which is no token of a response."""
    return tokenizer.encode(text, add_special_tokens=False)[:LONGEST_REPLY]


def spread(pairs: list[Pair], count: int | None) -> list[Pair]:
    """At most `count` of them, of all kinds."""
    return pairs if count is None else pairs[:: max(1, len(pairs) // count)][:count]


def batches(pairs: Sequence[Pair], size: int, chance: random.Random | None = None) -> list[list[Pair]]:
    """All pairs in groups of like length; with `chance` other ones each time, in random order."""
    def key(at: int) -> tuple[float, int]:
        return pairs[at].length * (1.0 if chance is None else chance.uniform(0.9, 1.1)), at

    keys = [key(at) for at in range(len(pairs))]
    order = [at for _, at in sorted(keys)]
    groups = [[pairs[at] for at in order[start : start + size]] for start in range(0, len(order), size)]
    if chance is not None:
        chance.shuffle(groups)
    return groups


# ---------------------------------------------------------------- model


def new_scorer(model: pathlib.Path, rank: int, alpha: float, device: torch.device) -> Scorer:
    """Adapters that change nothing yet, and a head of zeros."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    body = transformers.AutoModel.from_pretrained(model, dtype=dtype)
    adapters = adapt(body, rank, alpha)
    body.to(device)
    return Scorer(body, adapters, torch.nn.Parameter(torch.zeros(1, body.config.hidden_size, device=device)))


def restart(scorer: Scorer, seed: int) -> None:
    """Sets everything that learns to where training begins."""
    generator = torch.Generator().manual_seed(seed)
    for one in scorer.adapters.values():
        shape = one.A.shape
        one.A.data.copy_(torch.randn(shape, generator=generator) / shape[1] ** 0.5)
        one.B.data.zero_()
    scorer.head.data.zero_()


def rewards_at(scorer: Scorer, pairs: Sequence[Pair], cuts: Sequence[Sequence[int]]) -> torch.Tensor:
    """float32 [2, pairs, 1 + cuts]: rewards of the chosen and the rejected replies, first whole and then after so many
    tokens each, or whole where they have no more."""
    device = scorer.head.device
    texts = [pair.prompt + pair.chosen for pair in pairs] + [pair.prompt + pair.rejected for pair in pairs]
    places = [[len(pair.prompt) + min(length, len(reply)) - 1 for length in (len(reply), *lengths)]
              for name in ("chosen", "rejected") for pair, lengths in zip(pairs, cuts)
              for reply in (getattr(pair, name),)]
    ids, _ = pad(texts)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        hidden = scorer.body(input_ids=ids.to(device), use_cache=False).last_hidden_state  # [rows, length, hidden]
    at = torch.tensor(places, device=device)  # [rows, 1 + cuts]
    read = hidden[torch.arange(len(texts), device=device)[:, None], at].float()
    return F.linear(read, scorer.head).squeeze(-1).view(2, len(pairs), -1)


def preference_loss(rewards: torch.Tensor) -> torch.Tensor:
    """Half of it on whole replies, half on cut ones; of rewards [2, pairs, 1 + cuts]."""
    losses = -F.logsigmoid(rewards[0] - rewards[1])  # [pairs, 1 + cuts]
    return losses[:, 0].mean() / 2 + losses[:, 1:].mean() / 2


def random_cuts(pair: Pair, chance: random.Random) -> list[int]:
    """Numbers of tokens after which both replies are unfinished, where they are long enough."""
    last = max(1, min(len(pair.chosen), len(pair.rejected)) - 1)
    return [chance.randint(min(SHORTEST_CUT, last), last) for _ in range(CUTS)]


# ---------------------------------------------------------------- training


def held_out_loss(scorer: Scorer, pairs: Sequence[Pair], size: int) -> float:
    """The mean loss of pairs that are not trained on, at fixed cuts."""
    total = 0.0
    with torch.no_grad():
        for group in batches(pairs, size):
            total += preference_loss(rewards_at(scorer, group, [CHECKED_CUTS] * len(group))).item() * len(group)
    return total / len(pairs)


def train(scorer: Scorer, pairs: Sequence[Pair], checked: Sequence[Pair], rate: float, seconds: float,
          options: argparse.Namespace, name: str) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Trains from the beginning; facts, and what was learnt where the loss on `checked` was lowest."""
    begin = time.monotonic()
    chance = random.Random(options.seed)
    restart(scorer, options.seed)
    optimizer = torch.optim.AdamW(scorer.trained, lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    epoch = math.ceil(len(pairs) / options.batch)
    facts: dict[str, Any] = {"rate": rate, "pairs": len(pairs), "pairs_to_choose_by": len(checked), "checks": []}
    best, kept = math.inf, [weight.detach().clone() for weight in scorer.trained]
    groups: list[list[Pair]] = []
    losses: list[torch.Tensor] = []
    step, done = 0, 0.0
    while done < 1.0:
        groups = groups or batches(pairs, options.batch, chance)
        group = groups.pop()
        for parameters in optimizer.param_groups:  # a tenth of the budget to warm up, then down to nothing
            parameters["lr"] = rate * min(max(done, 1 / epoch) * 10, (1 - done) / 0.9)
        loss = preference_loss(rewards_at(scorer, group, [random_cuts(pair, chance) for pair in group]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(scorer.trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        step += 1
        before, done = done, max(step / (epoch * options.epochs), (time.monotonic() - begin) / seconds)
        if done >= 1.0 or int(done * CHECKS) > int(before * CHECKS):
            found = held_out_loss(scorer, checked, options.batch)
            learnt, losses = torch.stack(losses).mean().item(), []
            facts["checks"].append({"step": step, "training_loss": round(learnt, 4), "held_out_loss": round(found, 4)})
            print(f"{name}, rate {rate:g}: step {step}, {step / epoch:.2f} passes, training loss {learnt:.4f}, "
                  f"held out {found:.4f}, {time.monotonic() - begin:.0f} of {seconds:.0f} s", flush=True)
            if not math.isfinite(found):
                break
            if found < best:
                best, kept = found, [weight.detach().clone() for weight in scorer.trained]
                facts |= {"best_step": step, "held_out_loss": round(found, 4)}
    facts |= {"steps": step, "passes": round(step / epoch, 2), "seconds": round(time.monotonic() - begin, 1)}
    return facts, kept


def take(scorer: Scorer, weights: Sequence[torch.Tensor]) -> None:
    """Sets everything that learns to `weights`, rounded as they are stored."""
    for weight, value in zip(scorer.trained, weights, strict=True):
        weight.data.copy_(value.to(torch.bfloat16))


def save(scorer: Scorer, directory: pathlib.Path, rank: int, alpha: float, base: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, bfloat16, as peft does for sequence classification."""
    prefix = "base_model.model."
    tensors = {f"{prefix}model.{name}.lora_{part}.weight": getattr(one, part).detach().to("cpu", torch.bfloat16)
               for name, one in scorer.adapters.items() for part in ("A", "B")}
    tensors[f"{prefix}score.weight"] = scorer.head.detach().to("cpu", torch.bfloat16)
    config = {
        "base_model_name_or_path": base, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_alpha": alpha, "lora_dropout": 0.0, "modules_to_save": ["score"],
        "peft_type": "LORA", "r": rank, "target_modules": list(MODULES), "task_type": "SEQ_CLS", "use_dora": False,
        "use_rslora": False}
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "adapter_model.safetensors",
              metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in directory.iterdir():
        path.chmod(0o644)


# ---------------------------------------------------------------- figures


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share, Wilson's: it holds at the ends, too, and for few."""
    share, square = right / count, Z * Z / count
    middle = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return middle - half, middle + half


def accuracy(right: Sequence[bool]) -> dict[str, Any]:
    """Of how many pairs the chosen reply has the higher number."""
    if not right:
        return {"pairs": 0}
    low, high = wilson(sum(right), len(right))
    return {"pairs": len(right), "right": sum(right), "accuracy": round(sum(right) / len(right), 4),
            "low": round(low, 4), "high": round(high, 4)}


def scored(scorer: Scorer, pairs: Sequence[Pair], size: int) -> dict[int, list[list[float]]]:
    """Rewards [2][1 + REPORTED] of every pair by its id()."""
    found = {}
    with torch.no_grad():
        for group in batches(pairs, size):
            rewards = rewards_at(scorer, group, [REPORTED] * len(group)).transpose(0, 1).tolist()
            found |= {id(pair): row for pair, row in zip(group, rewards)}
    return found


def differs(pair: Pair, cut: int | None) -> bool:
    """Whether the two replies can be told apart after so many tokens."""
    return pair.chosen[:cut] != pair.rejected[:cut]


def figures_of(rewards: dict[int, list[list[float]]], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Accuracies on whole replies and on their beginnings; pairs that begin alike are left out of the latter."""
    def at(place: int, cut: int | None, kind: str | None = None) -> dict[str, Any]:
        chosen = [pair for pair in pairs if differs(pair, cut) and kind in (None, pair.kind)]
        return accuracy([rewards[id(pair)][0][place] > rewards[id(pair)][1][place] for pair in chosen])

    everything = [reward for pair in pairs for row in rewards[id(pair)] for reward in row[:1]]
    mean = sum(everything) / len(everything)
    return {"whole": at(0, None), **{str(cut): at(place, cut) for place, cut in enumerate(REPORTED, 1)},
            **{f"whole, {kind}": at(0, None, kind) for kind in FILES},
            "mean_reward": round(mean, 4),
            "deviation": round(math.sqrt(sum((one - mean) ** 2 for one in everything) / len(everything)), 4)}


def report(rewards: dict[str, dict[int, list[list[float]]]], pairs: Sequence[Pair]) -> dict[str, Any]:
    """All that is said of the third that nothing was trained on, by whose rewards they are."""
    def prefers(name: str, pair: Pair) -> bool:
        chosen, rejected = rewards[name][id(pair)]
        return chosen[0] > rejected[0]

    facts: dict[str, Any] = {name: figures_of(found, pairs) for name, found in rewards.items()}
    facts["the longer reply"] = accuracy([len(pair.chosen) > len(pair.rejected) for pair in pairs
                                          if len(pair.chosen) != len(pair.rejected)])
    facts["reward agrees with judge"] = accuracy([prefers("reward", pair) == prefers("judge", pair) for pair in pairs])
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="directory of the chat model")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of the preferences")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for reward, judge and figures.json")
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the adapters' name of it")
    parser.add_argument("--weights", default="", help="what is to be said of the base's weights")
    parser.add_argument("--seconds", type=float, default=120.0, help="of everything, loading included")
    parser.add_argument("--epochs", type=float, default=4.0, help="passes over a third, at most")
    parser.add_argument("--pairs", type=int, help="of each third, at most; for a rehearsal")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16.0, help="of the adapter: its products count alpha / rank")
    parser.add_argument("--batch", type=int, default=16, help="pairs of a step")
    parser.add_argument("--rates", default="3e-4,1e-3", help="peaks to choose from; the reward's is the judge's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begin = time.monotonic()
    torch.set_num_threads(options.threads)
    device, rates = torch.device(options.device), [float(rate) for rate in options.rates.split(",")]
    tokenizer = load_tokenizer(options.model)
    if tokenizer is None or not tokenizer.has_chat_template:
        raise SystemExit(f"{options.model} has no tokenizer with a chat template: a chat model is needed")
    thirds, left_out = read_pairs(options.data, tokenizer)
    thirds = {name: spread(pairs, options.pairs) for name, pairs in thirds.items()}
    print(f"{ {name: len(pairs) for name, pairs in thirds.items()} } pairs, left out {left_out}", flush=True)
    scorer = new_scorer(options.model, options.rank, options.alpha, device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"loaded on {where}, {sum(weight.numel() for weight in scorer.trained):,} numbers learn, "
          f"{time.monotonic() - begin:.0f} s", flush=True)
    settings = {name: str(value) if isinstance(value, pathlib.Path) else value
                for name, value in vars(options).items() if name not in ("model", "data", "out")}
    facts: dict[str, Any] = {
        "base": options.base, "weights": options.weights, "settings": settings, "device": where,
        "pairs": {name: len(pairs) for name, pairs in thirds.items()}, "left_out": left_out,
        "longest_prompt": LONGEST_PROMPT, "longest_reply": LONGEST_REPLY, "machine": describe_machine()}

    # Reading a third costs about a third of a pass of training over it, and that is done twice and in every check.
    each = max(1.0, (options.seconds - (time.monotonic() - begin)) * 0.8 / (len(rates) + 1))
    tried = []
    for rate in rates:
        tried.append(train(scorer, thirds["reward"], thirds["reward check"], rate, each, options, "reward"))
        best = min(tried, key=lambda run: run[0].get("held_out_loss", math.inf))
        take(scorer, best[1])
        save(scorer, options.out / "reward", options.rank, options.alpha, options.base)
    facts["training"] = {"reward": [run[0] for run in tried]}
    rewards = {"reward": scored(scorer, thirds["report"], options.batch)}
    rate = best[0]["rate"]
    run = train(scorer, thirds["judge"], thirds["judge check"], rate, each, options, "judge")
    facts["training"]["judge"] = run[0]
    take(scorer, run[1])
    save(scorer, options.out / "judge", options.rank, options.alpha, options.base)
    rewards["judge"] = scored(scorer, thirds["report"], options.batch)
    facts["held_out"] = report(rewards, thirds["report"])
    facts["seconds"] = round(time.monotonic() - begin, 1)
    (options.out / "figures.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts["held_out"], indent=1), f"\n{facts['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
