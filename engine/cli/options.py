"""Flags that several commands share, and what they mean to the engine."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stars.calibration import Calibration
from stars.errors import ModelError, RequestError
from stars.plan import OWN, Hidden, plan_of
from stars.policies import POLICIES, parameters_of

if TYPE_CHECKING:
    from stars.engine import Engine
    from stars.plan import Policy
    from stars.sampling import SamplingParams

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "max_tokens", "n", "stop", "stop_token_ids", "ignore_eos", "seed",
            "presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs")
ENGINE = ("device", "dtype", "quantization", "reward_quantization", "deterministic", "cache_tokens",
          "gpu_memory_utilization", "max_model_len", "max_num_seqs", "max_num_lanes", "max_num_batched_tokens",
          "max_segment_size")
REWARD = {"reward_head": "head", "reward_template": "template", "reward_close": "close"}
"""Flags of a model directory, with their names in its class."""
IMPLICIT = ("beta", "length_normalised")
"""What --reward-set says of an ImplicitReward."""
REMOTE = {"reward_model": "model", "reward_api": "api", "reward_label": "label", "reward_timeout": "timeout",
          "reward_retries": "retries", "reward_key_env": "api_key_env"}
"""Flags of a remote reward, with their names in RemoteReward."""
POLICY_FLAGS = {name: name for name in (
    "segment_size", "max_attempts", "alpha", "beta", "reward_threshold", "width", "k")} | {"best_of": "n"}
"""Flags of their own, and the parameter of a policy that each sets; --set reaches all of them."""
SHIPPED_MODELS = {"guide": "guide", "reference": "lm", "small": "small"}
SHIPPED_HEADS = {"agent": "agent/model.safetensors"}
"""What a policy's models and heads are beside the shipped pair, by their names: places in the package's demo_models."""


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Prompts as arguments or from a file."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue")
    parser.add_argument("--input", metavar="FILE", help='JSONL of prompts, - for stdin: a string a row, or an object '
                        'with "prompt", "prompt_token_ids" or "messages", and beside those '
                        '"tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message", '
                        '"special_tokens"')
    parser.add_argument("--chat", action="store_true", help="a prompt given as text becomes one user message")


def add_models(parser: argparse.ArgumentParser) -> None:
    """The two models."""
    group = parser.add_argument_group("models")
    group.add_argument("--model", metavar="DIR", help="the language model: a directory, a GGUF file or "
                       "a name of the Hugging Face hub, as every DIR may be (without it: the shipped pair)")
    group.add_argument("--named", action="append", default=[], type=_named, metavar="NAME=DIR",
                       help="a further language model, or a LoRA adapter, that a policy calls by this name; may be "
                       "given several times")
    group.add_argument("--head", action="append", default=[], type=_named, metavar="NAME=FILE",
                       help="a head on the language model's hidden states, the same way")
    group.add_argument("--reward", metavar="DIR", action="append",
                       help="the reward model; may be given several times, for the sum of several")
    group.add_argument("--reward-implicit", nargs=2, metavar=("POLICY", "REFERENCE"), action="append",
                       help="two language models: how much likelier the first makes a response (stars.ImplicitReward); "
                       "its parameters are --reward-set beta=… and length_normalised=…; without --model "
                       "`guide lm` are the shipped ones")
    group.add_argument("--reward-weight", metavar="W", type=_finite, action="append",
                       help="of a reward in a sum, once for each in their order: --reward, --reward-implicit, "
                       "--reward-url (1)")
    add_reward_head(group, "which head it has: ")
    group.add_argument("--reward-template", choices=("auto", "chat", "raw"), help="how it is shown prompt and response")
    group.add_argument("--reward-close", choices=("none", "template", "eos"), help="what is put after a response")
    group.add_argument("--reward-set", action="append", default=[], type=_assignment, metavar="KEY=VALUE",
                       help="a parameter of the class that reads it (CausalReward, ProcessReward, EncoderReward, "
                       "ImplicitReward), such as aggregate=min; may be given several times")
    group = parser.add_argument_group("a reward model on a vLLM server (defaults are those of stars.RemoteReward)")
    group.add_argument("--reward-url", metavar="URL", help="its address, such as http://127.0.0.1:8000")
    group.add_argument("--reward-model", metavar="NAME", help="the name it is served by")
    group.add_argument("--reward-api", choices=("classify", "pooling"), help="what is asked for (classify)")
    group.add_argument("--reward-label", type=int, metavar="I", help="which of a model's numbers is the reward")
    group.add_argument("--reward-timeout", type=float, metavar="S", help="seconds of one try (60)")
    group.add_argument("--reward-retries", type=int, metavar="N", help="further tries (3)")
    group.add_argument("--reward-key-env", metavar="VAR", help="the environment variable that holds its key")


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
        group.add_argument("--n", type=int, metavar="N",
                           help="completions of each prompt, each with all that the policy draws for one")
    group.add_argument("--stop", action="append", metavar="TEXT", help="ends a response; may be given several times")
    group.add_argument("--stop-token-ids", type=int, nargs="+", action="extend", metavar="ID")
    group.add_argument("--ignore-eos", action="store_true", default=None)
    group.add_argument("--seed", type=int, metavar="S", help="of the random numbers, the same for every prompt")
    if with_n:
        group.add_argument("--logprobs", type=int, metavar="K",
                           help="JSON rows have each token's log-probability, and those of the K most probable ones")


def add_policy(parser: argparse.ArgumentParser) -> None:
    """The method and its parameters."""
    group = parser.add_argument_group("policy (`stars methods` lists all with their parameters)")
    group.add_argument("--policy", choices=tuple(POLICIES), metavar="NAME",
                       help=f"{', '.join(POLICIES)} (stars where there is a reward, else sample)")
    group.add_argument("--set", action="append", default=[], type=_assignment, metavar="KEY=VALUE",
                       help="a parameter of the policy, by its Python name; may be given several times")
    group.add_argument("--segment-size", type=int, metavar="B", help="tokens of a segment")
    group.add_argument("--max-attempts", type=int, metavar="N", help="at one segment, before what exhaust says is kept")
    group.add_argument("--alpha", type=float, help="where the threshold starts: 0 at r(prompt), 1 at its end "
                       "(speculative-rejection: the share that each segment drops)")
    group.add_argument("--beta", type=_number_or_auto, help="temperature of accepting, 0 is the hard rule; auto is the "
                       "one of --calibration, or of the calibration on the first prompts")
    group.add_argument("--reward-threshold", type=_number_or_auto, metavar="R",
                       help="the reward aimed at; auto measures it on the first prompts (auto; `stars serve` measures "
                       "nothing: without this or --calibration, requests bring it)")
    group.add_argument("--calibration", metavar="FILE", help="threshold and beta=auto as `stars calibrate --save FILE` "
                       "measured them")
    group.add_argument("--width", type=int, metavar="W", help="candidates drawn at once (chosen by the engine)")
    group.add_argument("--best-of", type=int, metavar="N", help="best-of-n: whole responses drawn")
    group.add_argument("--k", type=int, metavar="K", help="blockwise: candidates of a segment")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Sizes and arithmetic of the engine."""
    group = parser.add_argument_group("engine (defaults are those of stars.Engine)")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"),
                       help="where it runs (auto: a GPU that serves the model, where there is one, else the CPU)")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"),
                       help="of the stored matrices; bfloat16 also of their products, where the CPU has them; float16 "
                       "on a GPU alone")
    for name, what in (("--quantization", "the language model's"), ("--reward-quantization", "the reward model's")):
        group.add_argument(name, choices=("int8", "int4", "fp8"),
                           help=f"what {what} matrices are rounded to as they are read, fp8 on a GPU alone (as they "
                           "are stored)")
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
    group.add_argument("--max-segment-size", type=int, metavar="N", help="tokens of the longest segment that a policy "
                       "may ask for")


def check_prompts(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program where prompts are missing or said twice."""
    if bool(args.prompts) == (args.input is not None):
        parser.error("give prompts as arguments, or a file of them with --input")


def check_models(parser: argparse.ArgumentParser, args: argparse.Namespace, needs_reward: bool) -> None:
    """Ends the program where models are missing or said twice."""
    if needs_reward and args.model is not None and not _rewards(args):
        parser.error("this needs a reward model: give --reward DIR, --reward-url URL, or --reward-implicit POLICY "
                     "REFERENCE")
    if args.model is not None and not _rewards(args) and (_given(args, REWARD) or args.reward_set):
        parser.error("--reward-head, --reward-template, --reward-close and --reward-set belong to --reward, which is "
                     "not given")
    own = [name for name, _ in args.reward_set if not args.reward_implicit or name not in IMPLICIT]
    if args.reward is None and args.reward_url is not None and (args.reward_close or args.reward_head or own):
        parser.error("--reward-head, --reward-close and --reward-set belong to --reward, which is not given: a server "
                     "has its own")
    if args.reward is None and args.reward_implicit and args.reward_url is None and (_given(args, REWARD) or own):
        parser.error("--reward-head, --reward-template and --reward-close belong to --reward, which is not given, and "
                     f"--reward-set to --reward-implicit only as {' and '.join(IMPLICIT)}")
    if args.reward_url is None and any(getattr(args, name) is not None for name in REMOTE):
        parser.error(", ".join(f"--{name.replace('_', '-')}" for name in REMOTE) + " belong to --reward-url, which is "
                     "not given")
    _check_once(parser, [f"--named {name}" for name, _ in args.named])
    _check_once(parser, [f"--head {name}" for name, _ in args.head])
    _check_once(parser, [name for name, _ in args.reward_set] + [REWARD[flag] for flag in _given(args, REWARD)])
    if args.reward_weight is not None and len(args.reward_weight) != max(1, _rewards(args)):
        parser.error(f"--reward-weight is given {len(args.reward_weight)} times for {max(1, _rewards(args))} "
                     "rewards: give it once for each, or not at all")


def check_policy(parser: argparse.ArgumentParser, args: argparse.Namespace, alone: bool = True) -> None:
    """Sets the default policy, and ends the program over parameters that do not belong to the one chosen. alone:
    whether no other will run."""
    if args.policy is None:
        args.policy = "sample" if args.model is not None and not _rewards(args) else "stars"
    known = parameters_of(args.policy)
    for flag, name in POLICY_FLAGS.items():
        if getattr(args, flag) is not None and (name not in known or flag == "best_of" and args.policy != "best-of-n"):
            owners = ["best-of-n"] if flag == "best_of" else [
                policy for policy in POLICIES if name in parameters_of(policy)]
            parser.error(f"--{flag.replace('_', '-')} belongs to --policy {', '.join(owners)}, and the policy is "
                         f"{args.policy}")
    for name, _ in args.set:
        if name not in known:
            parser.error(f"--set {name}: --policy {args.policy} has {', '.join(known) or 'no parameters'}")
    names = [name for name, _ in args.set] + [POLICY_FLAGS[flag] for flag in _given(args, POLICY_FLAGS)]
    _check_once(parser, names)
    if args.calibration is not None and (alone and "reward_threshold" not in known or "reward_threshold" in names):
        parser.error("--calibration gives the reward_threshold: leave out the other, and take a policy that has one")
    check_models(parser, args, needs_reward="score" not in known)


def _check_once(parser: argparse.ArgumentParser, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            parser.error(f"{name} is given twice: once is enough")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The SamplingParams of the flags; RequestError."""
    from stars.sampling import SamplingParams

    return SamplingParams(**_given(args, SAMPLING))


def policy(args: argparse.Namespace, calibration: float | None = None) -> Policy:
    """The policy of the flags; `calibration` is what was measured, for where the flags leave that open. RequestError.
    """
    given = policy_parameters(args)
    if needs_calibration(args):
        given["reward_threshold"] = calibration
        if given.get("beta") == "auto" and not isinstance(calibration, Calibration):
            given["beta"] = 0.0  # nothing is measured yet, or no prompt can run
    if "score" in parameters_of(args.policy) and "score" not in given:
        given["score"] = bool(_rewards(args)) or args.model is None
    made = POLICIES[args.policy](**given)
    plan_of(made)  # what does not go together is said before any file is touched
    return made


def needs_calibration(args: argparse.Namespace) -> bool:
    """Whether the threshold has to be measured, or read from a file."""
    return ("reward_threshold" in parameters_of(args.policy)
            and policy_parameters(args).get("reward_threshold", "auto") == "auto")


def policy_parameters(args: argparse.Namespace) -> dict[str, Any]:
    """The parameters that were given, under the policy's own names."""
    return dict(args.set) | {POLICY_FLAGS[flag]: value for flag, value in _given(args, POLICY_FLAGS).items()}


def build_engine(args: argparse.Namespace, policy: Policy | None = None, any_policy: bool = False) -> Engine:
    """The engine of the flags; without --model the shipped pair, which is said on stderr, and what `policy` asks for
    beside it and the flags do not name, or with `any_policy` whatever one might ask for."""
    model, rewards = args.model, list(args.reward or ())
    models: dict[str, Path] = {}
    heads: dict[str, Path] = {}
    if model is None:
        model, shipped = shipped_pair()
        what = "language model" if _rewards(args) else "pair"
        rewards = rewards if _rewards(args) else [shipped]
        print(f"stars: no --model given, so this uses the shipped {what}, a toy trained on film reviews",
              file=sys.stderr)
        if any_policy:
            models, heads = _shipped(SHIPPED_MODELS, {*SHIPPED_MODELS}), _shipped(SHIPPED_HEADS, {*SHIPPED_HEADS})
        elif policy is not None:
            models, heads = shipped_models(policy), shipped_heads(policy)
    from stars.engine import Engine

    engine = Engine(model, _reward(args, rewards), models=models | dict(args.named), heads=heads | dict(args.head),
                    **_given(args, ENGINE))
    for name in _unasked(args, policy) if policy is not None else ():  # behind errors, which are one line
        print(f"stars: {args.policy or 'this policy'} asks for no {name!r}, which --named or --head gives",
              file=sys.stderr)
    return engine


def gives_reward(args: argparse.Namespace) -> bool:
    """Whether the flags name a reward."""
    return _rewards(args) > 0


def _rewards(args: argparse.Namespace) -> int:
    """How many rewards the flags name."""
    return len(args.reward or ()) + len(args.reward_implicit or ()) + (args.reward_url is not None)


def _reward(args: argparse.Namespace, directories: list[Any]) -> Any:
    """The reward of the flags over these directories; None where there are none."""
    from stars.reward import ImplicitReward, RemoteReward, WeightedReward

    rewards = [_model_reward(args, directory) for directory in directories]
    of_implicit = {name: value for name, value in args.reward_set if name in IMPLICIT}
    rewards += [ImplicitReward(*(_shipped_or_given(args, model) for model in models), **of_implicit)
                for models in args.reward_implicit or ()]
    if args.reward_url is not None:
        given = {REMOTE[name]: value for name, value in _given(args, tuple(REMOTE)).items()}
        rewards.append(RemoteReward(args.reward_url, template=args.reward_template or "auto", **given))
    if len(rewards) < 2 and args.reward_weight is None:
        return rewards[0] if rewards else None
    return WeightedReward(list(zip(rewards, args.reward_weight or [1.0] * len(rewards), strict=True)))


def _model_reward(args: argparse.Namespace, directory: Any) -> Any:
    """A directory's reward, of the class that it is read by, with what the flags say of it."""
    from stars.reward import CausalReward, ProcessReward, resolve_reward

    given = {REWARD[flag]: value for flag, value in _given(args, REWARD).items()} | {
        name: value for name, value in args.reward_set if not args.reward_implicit or name not in IMPLICIT}
    if not given:
        return directory
    kind: Any = type(resolve_reward(directory))
    known, of_steps = _keywords(kind), _keywords(ProcessReward)
    if kind is CausalReward and any(name in of_steps and name not in known for name in given):
        kind, known = ProcessReward, of_steps  # a language model that judges steps by its vocabulary
    for name in given:
        if name not in known:
            raise RequestError(f"{directory} is read as a {kind.__name__}, which has no {name}: it has "
                               f"{', '.join(known)}")
    return kind(directory, **given)


def _keywords(kind: Any) -> list[str]:
    """The parameters of a reward's class that flags may set."""
    return [name for name in list(inspect.signature(kind).parameters)[1:] if name != "tokenizer"]


def shipped_pair() -> tuple[Path, Path]:
    """The directories of the language model and the reward model in the package; ModelError where it has none."""
    root = _demo_models()
    pair = root / "lm", root / "rm"
    if not all((directory / "config.json").is_file() for directory in pair):
        raise ModelError(f"this installation has no models in {root}: give --model and --reward, or install it again")
    return pair


def shipped_calibration() -> Path:
    """What `stars calibrate` measured of the shipped pair."""
    return _demo_models() / "calibration.json"


def shipped_models(policy: Policy) -> dict[str, Path]:
    """Engine's `models` of those names that a policy uses and the package has something for."""
    return _shipped(SHIPPED_MODELS, _models_of(policy))


def _models_of(policy: Policy) -> set[str]:
    """The names of the models that a policy asks for, beside the engine's own."""
    plan = plan_of(policy)
    return {name for name, _ in plan.drafts_with}.union(plan.reads_with) - {OWN}


def _unasked(args: argparse.Namespace, policy: Policy) -> list[str]:
    """The names of --named and --head that a policy has no use for: misspelt, perhaps."""
    reads = plan_of(policy).score.reads
    heads = {reads.head} if isinstance(reads, Hidden) else set()
    return ([name for name, _ in args.named if name not in _models_of(policy)]
            + [name for name, _ in args.head if name not in heads])


def _shipped_or_given(args: argparse.Namespace, model: str) -> str | Path:
    """Without --model a shipped model may be given by its name, unless a directory has it."""
    if args.model is not None or Path(model).exists():
        return model
    return _shipped(SHIPPED_MODELS | {OWN: "lm"}, {model}).get(model, model)


def shipped_heads(policy: Policy) -> dict[str, Path]:
    """Engine's `heads`, as `shipped_models`."""
    reads = plan_of(policy).score.reads
    return _shipped(SHIPPED_HEADS, {reads.head} if isinstance(reads, Hidden) else set())


def _shipped(places: dict[str, str], names: set[str]) -> dict[str, Path]:
    """What the package has of these names: the rest is missed by the request that asks for it."""
    found = {name: _demo_models() / places[name] for name in sorted(names) if name in places}
    return {name: path for name, path in found.items() if path.exists()}


def _demo_models() -> Path:
    return Path(__file__).resolve().parent.parent / "demo_models"


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def _head(text: str) -> Any:
    """A name, or the object of a JSON text."""
    return json.loads(text) if text.lstrip().startswith("{") else text


_head.__name__ = "head"


def _number_or_auto(text: str) -> float | str:
    if text == "auto":
        return text
    value = float(text)
    if math.isnan(value):
        raise ValueError("not a number")
    return value


_number_or_auto.__name__ = "number"  # what argparse calls it in its errors


def _assignment(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as JSON or as a number where it is one, else as text; a list becomes a tuple."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ValueError("no KEY=VALUE")
    value = {"True": "true", "False": "false", "None": "null"}.get(value, value)  # as `stars methods` prints them
    for read in (json.loads, float):
        try:
            found = read(value)
            return name.replace("-", "_"), tuple(found) if isinstance(found, list) else found
        except (ValueError, RecursionError):
            continue
    return name.replace("-", "_"), value


_assignment.__name__ = "KEY=VALUE"


def _named(text: str) -> tuple[str, str]:
    """NAME=PATH, in which the path may have further signs of equality."""
    name, sign, path = text.partition("=")
    if not sign or not name.strip() or not path:
        raise ValueError("no NAME=PATH")
    return name, path


_named.__name__ = "NAME=PATH"


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("not finite")
    return value


_finite.__name__ = "finite number"


def checked_quantile(quantile: float) -> float:
    """`quantile` where it is one; RequestError."""
    if not 0.0 <= quantile <= 1.0:
        raise RequestError(f"quantile is {quantile}, it must be between 0 and 1")
    return quantile
