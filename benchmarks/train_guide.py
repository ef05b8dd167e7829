"""Train a guide of the shipped language model (LM): a LoRA adapter that likes what the shipped reward model (RM) does.

    python benchmarks/train_guide.py --data IMDB --out GUIDE [--pairs 2500] [--tokens 64] [--beta 0.1]
    python benchmarks/train_guide.py --data IMDB --out GUIDE --preferences FILE
    python benchmarks/train_guide.py --data IMDB --out GUIDE --method sft
    python benchmarks/train_guide.py --data IMDB --out GUIDE --method measure

IMDB is the folder that `train_pair.py` reads. `dpo` (arXiv 2305.18290) draws two samples of the LM for each opening,
the first words of a training review, and the one of the higher reward is the chosen one; FILE holds pairs made
elsewhere instead, JSON lines (plain or .gz) with the texts `prompt`, `chosen` and `rejected`. `sft` goes on with the
training reviews of more than 5 stars. `measure` trains nothing: it measures the adapter that is there. GUIDE is an
adapter in peft's format over the LM, whose directory it names relative to itself: put it beside `lm`.

What is measured comes from reviews held out from all shipped models: the reward of plain samples of the guide beside
those of the LM, and how often the guide's implicit reward agrees with the RM about pairs of the LM's samples. The RM
that labels the pairs judges here, too: figures say how well the guide learnt it, and nothing about quality.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import pathlib
import random
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train_pair.py

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from common import DEMO_LM, DEMO_RM, RESULTS, describe_machine
from quality import bootstrap
from safetensors.torch import load_file, save_file
from train_pair import CONTEXT, EOS, evaluate_language, labelled_reviews, language_loss, pad

import stars

WORDS = 6  # of an opening
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HELD_OUT_OPENINGS, HELD_OUT_TOKENS = 200, 128
TEMPERATURE, TOP_K = 0.8, 40  # of the samples that are measured; those to learn from are drawn at temperature 1


class Pair(NamedTuple):
    """Token ids of a prompt and of the two responses to it, EOS included where they end."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Adapted(torch.nn.Module):
    """A linear layer W with the product of two narrow ones beside it: W x + alpha / rank * B A x; W is frozen."""

    def __init__(self, base: torch.nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale, self.on = base, alpha / rank, True
        self.A = torch.nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)  # [rank, in]
        self.B = torch.nn.Parameter(torch.zeros(base.out_features, rank))  # [out, rank]; zero: it starts as the LM

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        plain = self.base(rows)
        return plain + self.scale * F.linear(F.linear(rows, self.A), self.B) if self.on else plain


def adapt(model: transformers.LlamaForCausalLM, rank: int, alpha: float) -> dict[str, Adapted]:
    """Puts an adapter beside every linear layer of the decoder; by the layer's name."""
    model.requires_grad_(False)
    adapters = {}
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in MODULES:
            parent, _, last = name.rpartition(".")
            adapters[name] = Adapted(module, rank, alpha)
            setattr(model.get_submodule(parent), last, adapters[name])
    return adapters


@contextlib.contextmanager
def without(adapters: dict[str, Adapted]) -> Iterator[None]:
    """The LM itself, without gradients."""
    for adapter in adapters.values():
        adapter.on = False
    with torch.no_grad():
        yield
    for adapter in adapters.values():
        adapter.on = True


# ---------------------------------------------------------------- pairs


def openings_of(reviews: list[str]) -> list[str]:
    """The first words of each."""
    return [" ".join(review.split()[:WORDS]) for review in reviews]


def sampled_pairs(engine: stars.Engine, openings: list[str], tokens: int, seed: int) -> list[Pair]:
    """Two samples of each opening, of which the reward model prefers one; those of equal rewards are left out."""
    params = stars.SamplingParams(temperature=1.0, max_tokens=tokens, seed=seed, n=2)
    pairs = []
    for output in engine.generate(openings, params, stars.Sample(score=True), use_tqdm=False):
        low, high = sorted(output.outputs, key=lambda one: one.reward)
        if low.reward < high.reward:
            pairs.append(Pair(list(output.prompt_token_ids), list(high.token_ids), list(low.token_ids)))
    return pairs


def read_pairs(path: pathlib.Path, tokenizer: Any) -> list[Pair]:
    """Pairs of a file, cut to CONTEXT tokens; prompts keep their end."""
    opener = gzip.open if path.suffix == ".gz" else open
    pairs = []
    with opener(path, "rt", encoding="utf8") as lines:
        for row in map(json.loads, lines):
            prompt, *responses = (tokenizer(row[name]).input_ids for name in ("prompt", "chosen", "rejected"))
            responses = [[*ids[1:], EOS][: CONTEXT // 2] for ids in responses]  # without <s>
            pairs.append(Pair(prompt[-CONTEXT // 2:], *responses))
    return pairs


def log_probabilities(model: Any, prompts: list[list[int]], responses: list[list[int]]) -> torch.Tensor:
    """Sum of the log-probabilities of each response's tokens after its prompt, float32 [rows]."""
    ids, lengths = pad([prompt + response for prompt, response in zip(prompts, responses)])
    starts = torch.tensor([len(prompt) for prompt in prompts])
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # [rows, length - 1, hidden]
    losses = F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    places = torch.arange(1, ids.shape[1])[None, :]  # of the tokens that are predicted
    counted = (places >= starts[:, None]) & (places < lengths[:, None])
    return -(losses.view(counted.shape) * counted).sum(1)


def ratios(model: Any, adapters: dict[str, Adapted], pairs: list[Pair]) -> torch.Tensor:
    """log pi - log pi_reference of the chosen and the rejected responses, float32 [2, pairs]; the LM is the reference.
    """
    prompts = [pair.prompt for pair in pairs] * 2
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    with without(adapters):
        reference = log_probabilities(model, prompts, responses)
    return (log_probabilities(model, prompts, responses) - reference).view(2, -1)


# ---------------------------------------------------------------- training


def dpo_batches(pairs: list[Pair], batch: int, chance: random.Random) -> Iterator[list[Pair]]:
    """One pass over the pairs; those of a batch are of like length, batches in random order."""
    order = sorted(range(len(pairs)), key=lambda at: (len(pairs[at].chosen) + len(pairs[at].rejected), at))
    groups = [order[start : start + batch] for start in range(0, len(order), batch)]
    chance.shuffle(groups)
    yield from ([pairs[at] for at in group] for group in groups)


def sft_batches(texts: list[str], tokenizer: Any, batch: int, chance: random.Random) -> Iterator[torch.Tensor]:
    """One pass over the texts: ids int64 [batch, length] of `<s> text </s>`, cut to CONTEXT tokens."""
    chance.shuffle(texts)
    for start in range(0, len(texts), batch):
        yield pad([[*ids, EOS][:CONTEXT] for ids in tokenizer(texts[start : start + batch]).input_ids])[0]


def train(model: Any, adapters: dict[str, Adapted], batches: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Fits the adapters; what was seen on the way."""
    weights = [weight for adapter in adapters.values() for weight in (adapter.A, adapter.B)]
    optimizer = torch.optim.AdamW(weights, lr=options.rate, betas=(0.9, 0.98), weight_decay=0.0)
    begin, losses = time.monotonic(), []
    model.train()
    for step, batch in enumerate(batches):
        if options.method == "dpo":
            chosen, rejected = ratios(model, adapters, batch)
            loss = -F.logsigmoid(options.beta * (chosen - rejected)).mean()
        else:
            loss = language_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        done = step / len(batches)
        for group in optimizer.param_groups:  # a tenth of the steps to warm up, then down to nothing
            group["lr"] = options.rate * min(done * 10, (1 - done) / 0.9)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 25 == 24:
            print(f"step {step + 1} of {len(batches)}, training loss {np.mean(losses[-25:]):.4f}", flush=True)
    model.eval()
    return {"steps": len(batches), "minutes": round((time.monotonic() - begin) / 60, 1),
            "loss_of_the_first_25_steps": round(float(np.mean(losses[:25])), 4),
            "loss_of_the_last_25_steps": round(float(np.mean(losses[-25:])), 4)}


# ---------------------------------------------------------------- files and figures


def save(adapters: dict[str, Adapted], directory: pathlib.Path, rank: int, alpha: float) -> None:
    """Writes adapter_config.json and adapter_model.safetensors (bfloat16), and rounds the adapters to what ships."""
    tensors = {}
    for name, adapter in adapters.items():
        for part in ("A", "B"):
            weight = getattr(adapter, part)
            shipped = weight.detach().to(torch.bfloat16)
            weight.data.copy_(shipped)
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = shipped.contiguous()
    config = {
        "base_model_name_or_path": "../lm", "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_alpha": alpha, "lora_dropout": 0.0, "modules_to_save": None,
        "peft_type": "LORA", "r": rank, "target_modules": list(MODULES), "task_type": "CAUSAL_LM", "use_dora": False,
        "use_rslora": False}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in directory.iterdir():
        path.chmod(0o644)


def load(directory: pathlib.Path, model: Any) -> dict[str, Adapted]:
    """The adapters of a directory that `save` wrote, put beside the layers of the LM."""
    config = json.loads((directory / "adapter_config.json").read_text())
    adapters = adapt(model, config["r"], config["lora_alpha"])
    tensors = load_file(directory / "adapter_model.safetensors")
    for name, adapter in adapters.items():
        for part in ("A", "B"):
            getattr(adapter, part).data.copy_(tensors[f"base_model.model.{name}.lora_{part}.weight"])
    return adapters


def merged(adapters: dict[str, Adapted], directory: pathlib.Path, tokenizer: Any) -> None:
    """Writes the guide as a whole model in float32, for an engine that is to sample it."""
    model = transformers.LlamaForCausalLM.from_pretrained(DEMO_LM, dtype=torch.float32)
    for name, adapter in adapters.items():
        model.get_submodule(name).weight.data += adapter.scale * (adapter.B @ adapter.A).detach()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def plain_samples(directory: pathlib.Path, openings: list[str], seeds: int = 2) -> tuple[np.ndarray, float]:
    """Rewards of plain samples, float64 [openings, seeds], and how many tokens one of them has."""
    engine = stars.Engine(directory, DEMO_RM, max_num_seqs=64, max_num_lanes=64)
    params = stars.SamplingParams(temperature=TEMPERATURE, top_k=TOP_K, max_tokens=HELD_OUT_TOKENS, seed=5, n=seeds)
    outputs = engine.generate(openings, params, stars.Sample(score=True), use_tqdm=False)
    rewards = np.array([[one.reward for one in output.outputs] for output in outputs])
    return rewards, sum(len(one.token_ids) for output in outputs for one in output.outputs) / rewards.size


def agreement(model: Any, adapters: dict[str, Adapted], pairs: list[Pair]) -> dict[str, Any]:
    """How often the implicit reward, the sum of log pi - log pi_reference, is higher for the chosen response."""
    with torch.no_grad():
        found = torch.cat([ratios(model, adapters, pairs[start : start + 16]) for start in range(0, len(pairs), 16)], 1)
    lengths = torch.tensor([[len(pair.chosen) for pair in pairs], [len(pair.rejected) for pair in pairs]])
    wins = (found[0] > found[1]).double().numpy()
    return {"pairs": len(pairs), "win_rate": float(wins.mean()), "win_rate_95": bootstrap(wins[:, None]),
            "win_rate_of_means_by_token": float(((found / lengths)[0] > (found / lengths)[1]).double().mean()),
            "mean_ratio_chosen": float(found[0].mean()), "mean_ratio_rejected": float(found[1].mean())}


def batches_of(options: argparse.Namespace, engine: stars.Engine, training: list[tuple[str, float]],
               tokenizer: Any) -> list[Any]:
    """What is learnt from, in the order of the steps."""
    chance = random.Random(options.seed)
    if options.method == "sft":
        reviews = [text for text, label in training if label]
        return list(sft_batches(chance.sample(reviews, min(options.pairs, len(reviews))), tokenizer, options.batch,
                                chance))
    if options.preferences is not None:
        pairs = read_pairs(options.preferences, tokenizer)[: options.pairs]
    else:
        texts = chance.sample([text for text, _ in training], options.pairs)
        pairs = sampled_pairs(engine, openings_of(texts), options.tokens, seed=options.seed + 2)
    return list(dpo_batches(pairs, options.batch, chance))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of the reviews")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the adapter")
    parser.add_argument("--method", choices=["dpo", "sft", "measure"], default="dpo")
    parser.add_argument("--preferences", type=pathlib.Path, help="pairs made elsewhere, instead of samples")
    parser.add_argument("--pairs", type=int, default=2500, help="dpo: pairs to learn from; sft: reviews")
    parser.add_argument("--tokens", type=int, default=64, help="of a sample to learn from")
    parser.add_argument("--beta", type=float, default=0.1, help="of DPO")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16.0, help="of the adapter: its products count alpha / rank")
    parser.add_argument("--batch", type=int, default=16, help="pairs, or reviews, of a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS / "train_guide.json")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    training, held_out = labelled_reviews(options.data)
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_LM)
    engine = stars.Engine(DEMO_LM, DEMO_RM, max_num_seqs=64, max_num_lanes=64)
    openings = openings_of([text for text, _ in held_out[:: len(held_out) // HELD_OUT_OPENINGS]])
    tests = sampled_pairs(engine, openings, options.tokens, seed=options.seed + 1)

    model = transformers.LlamaForCausalLM.from_pretrained(DEMO_LM, dtype=torch.float32)
    facts: dict[str, Any] = {}
    if options.method == "measure":
        adapters = load(options.out, model)
    else:
        begin = time.monotonic()
        batches = batches_of(options, engine, training, tokenizer)
        facts["minutes_of_making_pairs"] = round((time.monotonic() - begin) / 60, 1)
        adapters = adapt(model, options.rank, options.alpha)
        facts |= train(model, adapters, batches, options)
        save(adapters, options.out, options.rank, options.alpha)
    facts["adapter_bytes"] = (options.out / "adapter_model.safetensors").stat().st_size
    facts["held_out_pairs"] = agreement(model, adapters, tests)
    reviews = [text for text, _ in held_out[::16]]
    with without(adapters):
        plain_loss = evaluate_language(model, tokenizer, reviews)
    facts["held_out_reviews"] = {"reviews": len(reviews), "loss_of_the_lm_in_nats_per_token": plain_loss,
                                 "loss_of_the_guide_in_nats_per_token": evaluate_language(model, tokenizer, reviews)}
    with tempfile.TemporaryDirectory() as folder:
        merged(adapters, pathlib.Path(folder), tokenizer)
        plain, plain_tokens = plain_samples(DEMO_LM, openings)
        guided, guided_tokens = plain_samples(pathlib.Path(folder), openings)
    facts["held_out_samples"] = {
        "openings": len(openings), "samples_of_each": plain.shape[1], "tokens": HELD_OUT_TOKENS,
        "temperature": TEMPERATURE, "top_k": TOP_K, "mean_tokens_of_the_lm": plain_tokens,
        "mean_tokens_of_the_guide": guided_tokens,
        "mean_reward_of_the_lm": float(plain.mean()), "mean_reward_of_the_lm_95": bootstrap(plain),
        "mean_reward_of_the_guide": float(guided.mean()), "mean_reward_of_the_guide_95": bootstrap(guided),
        "difference": float((guided - plain).mean()), "difference_95": bootstrap(guided - plain)}
    used = ("seed", "threads", "tokens") if options.method == "measure" else tuple(vars(options))
    settings = {name: vars(options)[name] for name in used if not isinstance(vars(options)[name], pathlib.Path)}
    if options.preferences is not None:
        settings["preferences"] = options.preferences.name
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    results[options.method] = {"machine": describe_machine(), "settings": settings} | facts
    options.results.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
