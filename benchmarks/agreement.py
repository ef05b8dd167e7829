"""How far rewards and log-probabilities of models in fewer bits agree with full precision, on real texts.

A reward reads each text's first tokens as the prompt and the next ones as the response. Beside full precision stand
int8 and int4, as matrices are rounded while they are read, and a GGUF file where one is given: rank correlation of the
rewards (Spearman's), mean absolute difference in units of the full-precision rewards' standard deviation, and how
many accept decisions are the same at the threshold that full precision passes 30 % of the texts by. A language model's
log-probabilities of the same responses give its perplexity; with `int4, head too` a head that is the embedding has four
bits as well, where it has eight otherwise.

    python benchmarks/agreement.py --texts reviews.jsonl.xz --out results/agreement.json
    python benchmarks/agreement.py --texts hh.jsonl.gz --model SmolLM2 --reward stars/demo_models/smollm2_reward \\
        --file SmolLM2.Q4_1.gguf --out results/agreement-smollm2.json
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import DEMO_LM, DEMO_RM, describe_machine, set_threads

from stars import Engine
from stars.model import quantization
from stars.prompt import parse_prompt
from stars.reward.base import Candidate
from stars.reward.logprobs import LogprobReward

PROMPT, RESPONSE = 32, 96  # tokens
ACCEPTED = 0.3  # share of texts that full precision accepts
BATCH = 8
VARIANTS: dict[str, str | None] = {"full precision": None, "int8": "int8", "int4": "int4"}


def texts_of(path: Path, count: int) -> list[str]:
    """The first texts of a JSONL file, plain, .gz or .xz: "text", or "prompt" and "chosen" together."""
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    found: list[str] = []
    with opener(path, "rt", encoding="utf8") as lines:
        for line in lines:
            row = json.loads(line)
            found.append(row["text"] if "text" in row else row["prompt"] + row["chosen"])
            if len(found) == count:
                return found
    sys.exit(f"{path} has {len(found)} texts, and {count} are wanted")


def scores(engine: Engine, texts: Sequence[list[int]]) -> Iterator[tuple[float, int]]:
    """What an engine's reward says of each text, and how many tokens it has behind the prompt."""
    reward, tokenizer, vocabulary = engine.reward, engine.tokenizer, engine.model_config.vocab_size
    for begin in range(0, len(texts), BATCH):
        ids = texts[begin : begin + BATCH]
        sessions = [reward.open(parse_prompt({"prompt_token_ids": one[:PROMPT]}, tokenizer, vocabulary), RESPONSE)
                    for one in ids]
        for session in sessions:  # one at a time: two texts may begin alike
            assert reward.reserve(session, RESPONSE)
            reward.start([session])
        candidates = [Candidate(session, one[PROMPT:], tokenizer.decode(one[PROMPT:]))
                      for session, one in zip(sessions, ids, strict=True)]
        for candidate, scored in zip(candidates, reward.score(candidates), strict=True):
            assert isinstance(scored.reward, float), scored.reward
            yield scored.reward, len(candidate.token_ids)
            reward.discard(scored.handle)
            reward.close(candidate.session)


def compared(rewards: torch.Tensor, full: torch.Tensor) -> dict[str, float]:
    """Rewards float64 [texts] beside those of full precision."""
    threshold = torch.quantile(full, 1 - ACCEPTED)
    ranks = torch.stack([one.argsort().argsort().double() for one in (rewards, full)])
    difference = (rewards - full).abs()
    return {"rank_correlation": torch.corrcoef(ranks)[0, 1].item(),
            "same_decisions": ((rewards >= threshold) == (full >= threshold)).double().mean().item(),
            "accepted": (rewards >= threshold).double().mean().item(),
            "mean_difference": difference.mean().item(), "largest_difference": difference.max().item(),
            "mean_difference_in_deviations": (difference.mean() / full.std()).item(),
            "deviation": full.std().item(), "threshold": threshold.item()}


def measured(args: argparse.Namespace, texts: Sequence[str], language: bool) -> dict[str, dict[str, float]]:
    """Every variant's figures, of the reward or of the language model."""
    variants = [(name, args.model, given, "int8") for name, given in VARIANTS.items()]
    if language:
        variants.append(("int4, head too", args.model, "int4", "int4"))
    if args.file is not None:
        variants.append((args.file.suffixes[-2].lstrip(".") + " file" if len(args.file.suffixes) > 1 else "file",
                         args.file, None, "int8"))
    found: dict[str, dict[str, float]] = {}
    full = torch.empty(0)
    ids: list[list[int]] = []  # the same for all: a file's tokenizer may differ from the directory's
    for name, model, given, tied in variants:
        quantization.TIED = tied  # the head's alternative is measured here alone
        sys.modules["stars.model.reader"].TIED = tied
        begin = time.perf_counter()
        over = Path(args.reward, "adapter_config.json").exists() or language  # reads the language model's own weights
        engine = Engine(model, LogprobReward(model, "language model", given) if language else args.reward,
                        quantization=given if over else None, reward_quantization=None if over else given,
                        max_num_seqs=BATCH, max_num_lanes=BATCH)
        loaded = time.perf_counter() - begin
        ids = ids or [engine.tokenizer.encode(text)[: PROMPT + RESPONSE] for text in texts]
        with torch.inference_mode():
            rewards, lengths = zip(*scores(engine, ids), strict=True)
        values = torch.tensor(rewards, dtype=torch.float64)
        full = values if not found else full
        found[name] = {"load_seconds": loaded}
        if language:
            found[name] |= {"perplexity": math.exp(-values.sum().item() / sum(lengths))}
        found[name] |= compared(values, full)
        print(f"{name:<16}" + "  ".join(f"{key} {value:.4g}" for key, value in found[name].items()), flush=True)
        del engine
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, metavar="FILE")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--model", type=Path, default=DEMO_LM, metavar="DIR")
    parser.add_argument("--reward", type=Path, default=DEMO_RM, metavar="DIR")
    parser.add_argument("--file", type=Path, metavar="GGUF", help="the same model as a GGUF file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    set_threads(args.threads)
    texts = texts_of(args.texts, args.count)
    record = {"machine": describe_machine(), "model": args.model.name, "reward": args.reward.name,
              "texts": args.texts.name, "count": args.count, "prompt_tokens": PROMPT, "response_tokens": RESPONSE,
              "rewards": measured(args, texts, False), "language_model": measured(args, texts, True)}
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
