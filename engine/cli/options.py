"""Flags that several commands share, and what they mean to the engine."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stars.errors import ModelError, RequestError

if TYPE_CHECKING:
    from stars.engine import Engine
    from stars.plan import Policy
    from stars.sampling import SamplingParams

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "max_tokens", "n", "stop", "stop_token_ids", "ignore_eos", "seed",
            "presence_penalty", "frequency_penalty", "repetition_penalty")
ENGINE = ("dtype", "deterministic", "cache_tokens", "gpu_memory_utilization", "max_model_len", "max_num_seqs",
          "max_num_lanes", "max_num_batched_tokens")
POLICY_FLAGS = {
    "stars": ("segment_size", "max_attempts", "alpha", "beta", "reward_threshold", "width"),
    "sample": (),
    "best-of-n": ("best_of",),
    "blockwise": ("k", "segment_size"),
}
"""The parameters each policy has."""


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Prompts as arguments or from a file."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue")
    parser.add_argument("--input", metavar="FILE", help='JSONL of prompts, - for stdin: a string a row, or an object '
                        'with "prompt", "prompt_token_ids" or "messages"')
    parser.add_argument("--chat", action="store_true", help="a prompt given as text becomes one user message")


def add_models(parser: argparse.ArgumentParser) -> None:
    """The two models."""
    group = parser.add_argument_group("models")
    group.add_argument("--model", metavar="DIR", help="the language model (without it: the shipped pair)")
    group.add_argument("--reward", metavar="DIR", help="the reward model")
    add_reward_head(group, "which head it has: ")
    group.add_argument("--reward-template", choices=("auto", "chat", "raw"), help="how it is shown prompt and response")
    group.add_argument("--reward-close", choices=("none", "template", "eos"), help="what is put after a response")


def add_reward_head(parser: argparse._ActionsContainer, what: str) -> None:
    """The choice of a reward head."""
    parser.add_argument("--reward-head", metavar="HEAD", type=_head,
                        help=what + "auto, a tensor's name, or a JSON object as CausalReward's head")


def add_sampling(parser: argparse.ArgumentParser, with_n: bool) -> None:
    """SamplingParams, under its own names; an absent flag leaves its default."""
    group = parser.add_argument_group("sampling (defaults are those of stars.SamplingParams)")
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the most probable token")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument("--presence-penalty", type=float, metavar="P", help="of tokens the response has already")
    group.add_argument("--frequency-penalty", type=float, metavar="P", help="the same, as often as it has them")
    group.add_argument("--repetition-penalty", type=float, metavar="P", help="of tokens of prompt and response")
    group.add_argument("--max-tokens", type=int, metavar="N", help="tokens of a response at most")
    if with_n:
        group.add_argument("--n", type=int, metavar="N", help="completions of each prompt")
    group.add_argument("--stop", action="append", metavar="TEXT", help="ends a response; may be given several times")
    group.add_argument("--stop-token-ids", type=int, nargs="+", action="extend", metavar="ID")
    group.add_argument("--ignore-eos", action="store_true", default=None)
    group.add_argument("--seed", type=int, metavar="S", help="of the random numbers, the same for every prompt")


def add_policy(parser: argparse.ArgumentParser) -> None:
    """The method and its parameters."""
    group = parser.add_argument_group("policy")
    group.add_argument("--policy", choices=tuple(POLICY_FLAGS), help="stars where there is a reward, else sample")
    group.add_argument("--segment-size", type=int, metavar="B", help="stars, blockwise: tokens of a segment (16)")
    group.add_argument("--max-attempts", type=int, metavar="N", help="stars: before the best seen wins (20)")
    group.add_argument("--alpha", type=float, help="stars: where the threshold starts, 0 at r(prompt) (0.5)")
    group.add_argument("--beta", type=float, help="stars: temperature of accepting, 0 is the hard rule (0.7)")
    group.add_argument("--reward-threshold", type=_threshold, metavar="R",
                       help="stars: the reward aimed at; auto measures it on the first prompts (auto)")
    group.add_argument("--width", type=int, metavar="W", help="stars: candidates drawn at once (chosen by the engine)")
    group.add_argument("--best-of", type=int, metavar="N", help="best-of-n: whole responses drawn (8)")
    group.add_argument("--k", type=int, metavar="K", help="blockwise: candidates of a segment (8)")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Sizes and arithmetic of the engine."""
    group = parser.add_argument_group("engine (defaults are those of stars.Engine)")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16"),
                       help="of the stored matrices; bfloat16 also of their products, where the CPU has them")
    group.add_argument("--deterministic", action="store_true", default=None,
                       help="the same text for a seed at any width and in any batch")
    group.add_argument("--cache-tokens", type=int, metavar="N", help="budget of each model's KV cache")
    group.add_argument("--gpu-memory-utilization", type=float, metavar="P",
                       help="on a GPU without --cache-tokens: the share of its memory that may be in use (0.9)")
    group.add_argument("--max-model-len", type=int, metavar="N", help="tokens of prompt and response together")
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="responses decoded at once")
    group.add_argument("--max-num-lanes", type=int, metavar="N", help="candidates drafted at once")
    group.add_argument("--max-num-batched-tokens", type=int, metavar="N",
                       help="tokens of prompts that each model reads in a round while others decode")


def check_models(parser: argparse.ArgumentParser, args: argparse.Namespace, needs_reward: bool) -> None:
    """Ends the program where prompts or models are missing or said twice."""
    if bool(args.prompts) == (args.input is not None):
        parser.error("give prompts as arguments, or a file of them with --input")
    if needs_reward and args.model is not None and args.reward is None:
        parser.error("this needs a reward model: give --reward DIR")
    if args.model is not None and args.reward is None and (
            args.reward_template or args.reward_close or args.reward_head):
        parser.error("--reward-head, --reward-template and --reward-close belong to --reward, which is not given")


def check_policy(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Sets the default policy, and ends the program over flags that do not belong to the one chosen."""
    if args.policy is None:
        args.policy = "sample" if args.model is not None and args.reward is None else "stars"
    for name in sorted({name for names in POLICY_FLAGS.values() for name in names}):
        if getattr(args, name) is not None and name not in POLICY_FLAGS[args.policy]:
            owners = " and ".join(policy for policy, names in POLICY_FLAGS.items() if name in names)
            parser.error(f"--{name.replace('_', '-')} belongs to --policy {owners}, and the policy is {args.policy}")
    check_models(parser, args, needs_reward=args.policy != "sample")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The SamplingParams of the flags; RequestError."""
    from stars.sampling import SamplingParams

    return SamplingParams(**_given(args, SAMPLING))


def policy(args: argparse.Namespace, reward_threshold: float | None = None) -> Policy:
    """The policy of the flags; `reward_threshold` is the measured one, for where the flag gives none. RequestError."""
    from stars import policies

    given = _given(args, POLICY_FLAGS[args.policy])
    if args.policy == "stars":
        if given.get("reward_threshold", "auto") == "auto":
            given["reward_threshold"] = reward_threshold
        return policies.STARS(**given)
    if args.policy == "best-of-n":
        return policies.BestOfN(*given.values())
    if args.policy == "blockwise":
        return policies.BlockwiseBestOfK(**given)
    return policies.Sample(score=args.reward is not None or args.model is None)


def needs_threshold(args: argparse.Namespace) -> bool:
    """Whether the threshold has to be measured."""
    return args.policy == "stars" and args.reward_threshold in (None, "auto")


def build_engine(args: argparse.Namespace) -> Engine:
    """The engine of the flags; without --model the shipped pair, which is said on stderr."""
    model, reward = args.model, args.reward
    if model is None:
        model, shipped = shipped_pair()
        reward = reward if reward is not None else shipped
        print("stars: no --model given, so this uses the shipped pair, a toy trained on film reviews", file=sys.stderr)
    from stars.engine import Engine

    if any(value is not None for value in (args.reward_head, args.reward_template, args.reward_close)):
        from stars.reward import CausalReward, ProcessReward, resolve_reward

        head = "auto" if args.reward_head is None else args.reward_head
        if not isinstance(resolve_reward(reward), ProcessReward):
            reward = CausalReward(reward, head=head, template=args.reward_template or "auto",
                                  close=args.reward_close or "none")
        elif args.reward_close is None:
            reward = ProcessReward(reward, head=head, template=args.reward_template)
        else:
            raise RequestError(f"--reward-close is of models that judge responses, and {reward} judges steps: leave it "
                               "out")
    return Engine(model, reward, **_given(args, ENGINE))


def shipped_pair() -> tuple[Path, Path]:
    """The directories of the language model and the reward model in the package; ModelError where it has none."""
    root = Path(__file__).resolve().parent.parent / "demo_models"
    pair = root / "lm", root / "rm"
    if not all((directory / "config.json").is_file() for directory in pair):
        raise ModelError(f"this installation has no models in {root}: give --model and --reward, or install it again")
    return pair


def _given(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def _head(text: str) -> Any:
    """A name, or the object of a JSON text."""
    return json.loads(text) if text.lstrip().startswith("{") else text


_head.__name__ = "head"


def _threshold(text: str) -> float | str:
    if text == "auto":
        return text
    value = float(text)
    if math.isnan(value):
        raise ValueError("not a number")
    return value


_threshold.__name__ = "number"  # what argparse calls it in its errors


def checked_quantile(quantile: float) -> float:
    """`quantile` where it is one; RequestError."""
    if not 0.0 <= quantile <= 1.0:
        raise RequestError(f"quantile is {quantile}, it must be between 0 and 1")
    return quantile
