"""What a reward of another tokenizer costs beside one of the language model's own vocabulary, the rest being equal.

    python benchmarks/foreign_tokenizer.py --model DIR [--tokenizer DIR] [--repeats 5] [--tokens 96] [--out FILE]

Both rewards are the body of the language model with one random head. One keeps the tokenizer; the other has that of
--tokenizer (the shipped pair's, if left out), with as many of the body's embeddings as this has tokens. What such a
model says is worth nothing, and not needed: attempts are accepted by the same uniforms whatever their rewards are, so
both engines draw as many. Texts are equal until a segment has no accepted attempt and the best is kept (equal_texts
says how often they are). Runs alternate in one process.

A text of other tokens is encoded again from its beginning at each attempt, and what the last segment's end has changed
is read again. Counted are those tokens, and the seconds of encoding. Where the machine has other work, go by the
processor's time, on one thread: threads that wait for each other spend it, too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import (
    DEMO_LM,
    RESULTS,
    Figure,
    compare,
    describe_machine,
    forced_accept,
    interleave,
    load_prompts,
    print_table,
    set_threads,
    speedup,
    write_json,
)
from safetensors.torch import load_file, save_file

import stars

SEGMENT, WIDTH, ATTEMPTS, RATE = 16, 4, 8, 0.3


def write_reward(source: Path, tokenizer: Path | None, target: Path) -> Path:
    """The body of a language model with a random reward head, for its own tokenizer or another one."""
    target.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= load_file(file)
    tensors.pop("lm_head.weight", None)
    config = json.loads((source / "config.json").read_text())
    body = "LlamaForSequenceClassification" if config["model_type"] == "llama" else "Qwen3ForSequenceClassification"
    embeddings = tensors["model.embed_tokens.weight"]
    if tokenizer is not None:
        count = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
        rows = torch.arange(count) % len(embeddings)
        tensors["model.embed_tokens.weight"] = embeddings[rows].contiguous()
    head = torch.randn(1, embeddings.shape[1], generator=torch.Generator().manual_seed(0)) / embeddings.shape[1] ** 0.5
    tensors["score.weight"] = head.to(embeddings.dtype)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config |= dict(architectures=[body], num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0},
                   vocab_size=len(tensors["model.embed_tokens.weight"]))
    (target / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if ((tokenizer or source) / name).is_file():
            shutil.copy((tokenizer or source) / name, target / name)
    return target


class Counts:
    """What one reward has done: candidates, tokens that they grew by, tokens run for them, seconds of encoding."""

    def __init__(self, reward: Any):
        self.candidates = self.grown = self.run = 0
        self.encoding = 0.0
        score, encoder = reward._run, reward.framing.encoder

        def counted(plans: Any) -> Any:
            for plan in plans.values():
                self.candidates += 1
                # One that grew out of its text has the prompt behind it, so no fewer than nothing.
                self.grown += max(0, len(plan.ids) - len(plan.session.committed))
                self.run += plan.run
            return score(plans)

        reward._run = counted
        if encoder is not None:
            encode = encoder.encode

            def timed(*given: Any, **options: Any) -> list[int]:
                begin = time.perf_counter()
                try:
                    return encode(*given, **options)
                finally:
                    self.encoding += time.perf_counter() - begin

            encoder.encode = timed

    def a_candidate(self) -> dict[str, float]:
        """Each of them per candidate."""
        many = max(1, self.candidates)
        return {"tokens run": self.run / many, "tokens of its own": self.grown / many,
                "tokens read again": (self.run - self.grown) / many, "encoding, ms": 1e3 * self.encoding / many}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO_LM)
    parser.add_argument("--tokenizer", type=Path, default=DEMO_LM, help="a directory with config.json, too")
    parser.add_argument("--requests", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu-foreign-tokenizer.json")
    options = parser.parse_args()
    set_threads(options.threads)
    prompts = load_prompts(None, options.requests)
    with tempfile.TemporaryDirectory() as home:
        rewards = {"same": write_reward(options.model, None, Path(home) / "same"),
                   "foreign": write_reward(options.model, options.tokenizer, Path(home) / "foreign")}
        engines = {name: stars.Engine(options.model, stars.CausalReward(rewards[name], template="raw"),
                                      dtype="bfloat16", cache_tokens=4096, max_model_len=1024, max_num_seqs=8,
                                      max_num_lanes=16, max_segment_size=SEGMENT) for name in rewards}
    if engines["same"].reward.needs_text or not engines["foreign"].reward.needs_text:
        parser.error("--tokenizer has the vocabulary of --model: give another one")
    counts = {name: Counts(engine.reward) for name, engine in engines.items()}
    policy = stars.STARS(SEGMENT, ATTEMPTS, beta=1.0, reward_threshold=0.0, width=WIDTH)
    tokens: dict[str, list[int]] = {name: [] for name in engines}
    drawn: dict[str, list[list[int]]] = {name: [] for name in engines}

    processor: dict[str, list[float]] = {name: [] for name in engines}

    def run(name: str, index: int) -> None:
        begin = time.process_time()
        params = [stars.SamplingParams(max_tokens=options.tokens, ignore_eos=True, seed=100 * index + one)
                  for one in range(len(prompts))]
        with forced_accept(RATE):
            outputs = engines[name].generate(prompts, params, policy, use_tqdm=False)
        drawn[name].append([token for output in outputs for token in output.outputs[0].token_ids])
        tokens[name].append(len(drawn[name][-1]))
        processor[name].append(time.process_time() - begin)

    seconds = interleave({name: lambda index, name=name: run(name, index) for name in engines}, options.repeats)
    for name in tokens:
        del tokens[name][0], drawn[name][0], processor[name][0]  # the warm-up's
    same_text = statistics.mean(one == other for one, other in zip(drawn["same"], drawn["foreign"], strict=True))
    each = {name: one.a_candidate() for name, one in counts.items()}
    share = counts["foreign"].encoding / sum(seconds["foreign"]) * options.repeats / (options.repeats + 1)
    figures = [
        speedup("aligned, reward of another tokenizer", tokens["foreign"], seconds["foreign"],
                "reward of the same vocabulary", seconds["same"], their_tokens=tokens["same"],
                equal_texts=same_text, candidates={name: one.candidates for name, one in counts.items()}),
        compare("processor time a token", "ms", [1e3 * cpu / n for cpu, n in zip(
            processor["foreign"], tokens["foreign"], strict=True)], "same vocabulary", [
                1e3 * cpu / n for cpu, n in zip(processor["same"], tokens["same"], strict=True)]),
        *(compare(f"{what} a candidate", what.partition(", ")[2] or "tokens", [each["foreign"][what]],
                  "same vocabulary", [each["same"][what]]) for what in ("tokens run", "tokens of its own")),
    ]
    for what in ("tokens read again", "encoding, ms"):
        figures.append(Figure(
            f"{what} a candidate", each["foreign"][what], what.partition(", ")[2] or "tokens",
            "same vocabulary", each["same"][what]))
    figures.append(Figure("encoding's share of the time", share, "", "same vocabulary", 0.0))
    print_table(figures)
    write_json(options.out, describe_machine(), {
        "model": options.model.name, "tokenizer": options.tokenizer.name, "dtype": "bfloat16",
        "requests": options.requests, "tokens": options.tokens, "segment": SEGMENT, "width": WIDTH,
        "attempts": ATTEMPTS, "accept rate": RATE, "threads": options.threads}, figures)


if __name__ == "__main__":
    main()
