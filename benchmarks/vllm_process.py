"""vLLM's CPU build beside the engine, in a process and an environment of its own, which is asked in turns.

As a program, run by the interpreter that has vLLM, it is that process: `vllm_process.py --model DIR --reward DIR
--dtype DTYPE`. It reads one JSON object a line and answers with one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class VLLM:
    """The process, started by `python`, with a language model and a reward model loaded, both computed in `dtype`."""

    def __init__(self, python: str, model: Path, reward: Path, dtype: str, threads: int, log: Path):
        environment = dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1",
                           VLLM_CPU_NUM_OF_RESERVED_CPU="0", HF_HUB_OFFLINE="1", OMP_NUM_THREADS=str(threads),
                           VLLM_NO_USAGE_STATS="1")
        for name in ("PYTHONPATH", "STARS_LIBRARY"):
            environment.pop(name, None)
        self._log = log.open("w")
        # Another directory: those of a script and of the process are where Python looks first, and ours have common
        # names.
        code = f"import runpy; runpy.run_path({str(Path(__file__).resolve())!r}, run_name='__main__')"
        self._process = subprocess.Popen(
            [python, "-c", code, "--model", str(model.resolve()), "--reward", str(reward.resolve()), "--dtype", dtype],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment,
            cwd=log.resolve().parent)
        self.version = str(self._answer()["version"])

    def candidates(self, prompt: list[int], rounds: int, seed: int) -> Mapping[str, Any]:
        """See `_candidates`."""
        return self._ask(prompt=prompt, rounds=rounds, seed=seed)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _ask(self, **question: Any) -> Mapping[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Mapping[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM ended with {self._process.wait()}, see {self._log.name}")
        answer: Mapping[str, Any] = json.loads(line)
        return answer


# -- the process ------------------------------------------------------------------------------------------------------


def _candidates(lm: Any, reward: Any, prompt: list[int], rounds: int, seed: int) -> dict[str, Any]:
    """`rounds` times: eight candidates of 16 tokens, all scored, the best one is kept. Its seconds and tokens."""
    from vllm import SamplingParams

    text = list(prompt)
    begin = time.perf_counter()
    for index in range(rounds):
        params = SamplingParams(n=8, max_tokens=16, ignore_eos=True, temperature=0.8, top_k=40, seed=seed + index,
                                detokenize=False)
        outputs = lm.generate({"prompt_token_ids": text}, params, use_tqdm=False)[0].outputs
        texts = [text + list(output.token_ids) for output in outputs]
        scores = reward.classify([{"prompt_token_ids": one} for one in texts], use_tqdm=False)
        rewards = [float(score.outputs.probs[0]) for score in scores]
        text = texts[max(range(len(texts)), key=rewards.__getitem__)]
    return {"seconds": time.perf_counter() - begin, "tokens": len(text) - len(prompt), "rewards": rewards}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--reward", required=True)
    parser.add_argument("--dtype", required=True)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")  # vLLM writes to the standard output as well
    os.dup2(2, 1)
    import vllm

    common = dict(dtype=options.dtype, max_model_len=1024, enable_prefix_caching=True, block_size=32, max_num_seqs=16)
    lm = vllm.LLM(options.model, **common)
    reward = vllm.LLM(options.reward, runner="pooling", convert="classify", **common)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer({"version": vllm.__version__})
    for line in sys.stdin:
        answer(_candidates(lm, reward, **json.loads(line)))


if __name__ == "__main__":
    main()
