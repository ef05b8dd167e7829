"""Decoding with a reward model: segments that it rejects are drawn anew (STARS). Needs the package stars-engine."""

import difflib
from functools import lru_cache
from typing import Any

from transformers import StoppingCriteriaList, StopStringCriteria

import stars
from stars.adapters import transformers as adapter
from stars.reward import resolve_reward


def generate(model: Any, stars_reward: Any = None, stars_policy: Any = None, reward_threshold: Any = None,
             segment_size: Any = None, max_attempts: Any = None, beta: Any = None, alpha: Any = None, width: Any = None,
             stop_strings: Any = None, tokenizer: Any = None, stopping_criteria: Any = None, **arguments: Any) -> Any:
    """`model.generate(**inputs, custom_generate=REPOSITORY, trust_remote_code=True, stars_reward=…, …)`.

    stars_reward: a directory of a reward model, a callable, or a stars.Reward. reward_threshold, segment_size,
    max_attempts, beta, alpha, width: of the policy stars.STARS, which has a default for each but the threshold;
    stars_policy: another policy in its place. tokenizer:
    the model's, for rewards that read text and for stop_strings. seed, messages and all arguments of generate: as with
    stars.adapters.transformers.
    """
    settings = dict(reward_threshold=reward_threshold, segment_size=segment_size, max_attempts=max_attempts, beta=beta,
                    alpha=alpha, width=width)
    for name in arguments:
        meant = difflib.get_close_matches(name, ("stars_reward", "stars_policy", *settings), 1, 0.8)
        if meant:
            raise ValueError(f"generate has no {name}: did you mean {meant[0]}?")
    given = {name: value for name, value in settings.items() if value is not None}
    if stars_policy is None:
        if reward_threshold is None:
            raise ValueError("reward_threshold is missing: give what `stars calibrate` suggests, or stars_policy")
        stars_policy = stars.STARS(**given)
    elif given:
        raise ValueError(f"stars_policy has its own {', '.join(given)}: give one or the other")
    if stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings are found in the text: give tokenizer too")
        stopping_criteria = StoppingCriteriaList([*(stopping_criteria or ()),
                                                  StopStringCriteria(tokenizer, stop_strings)])
    try:
        reward = _reward(stars_reward)
    except TypeError:  # it cannot be kept by what it is; what is wrong with it says its own error
        reward = resolve_reward(stars_reward)
    return model.generate(custom_generate=_adapter(reward, stars_policy, tokenizer),
                          stopping_criteria=stopping_criteria, **arguments)


@lru_cache(maxsize=1)  # a reward model is loaded once, whatever the other settings
def _reward(reward: Any) -> Any:
    return resolve_reward(reward)


@lru_cache(maxsize=1)
def _adapter(reward: Any, policy: Any, tokenizer: Any) -> Any:
    return adapter(reward=reward, policy=policy, tokenizer=tokenizer)
