"""Decoding with a reward model: segments that it rejects are drawn anew (STARS). Needs the package stars-engine."""

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
    if stars_policy is None:
        if reward_threshold is None:
            raise ValueError(f"reward_threshold is missing beside {', '.join(sorted(arguments))}: give what `stars "
                             "calibrate` suggests, or stars_policy")
        given = dict(segment_size=segment_size, max_attempts=max_attempts, beta=beta, alpha=alpha, width=width)
        stars_policy = stars.STARS(reward_threshold=reward_threshold,
                                   **{name: value for name, value in given.items() if value is not None})
    if stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings are found in the text: give tokenizer too")
        stopping_criteria = StoppingCriteriaList([*(stopping_criteria or ()),
                                                  StopStringCriteria(tokenizer, stop_strings)])
    return model.generate(custom_generate=_adapter(_reward(stars_reward), stars_policy, tokenizer),
                          stopping_criteria=stopping_criteria, **arguments)


@lru_cache(maxsize=1)  # a reward model is loaded once, whatever the other settings
def _reward(reward: Any) -> Any:
    return resolve_reward(reward)


@lru_cache(maxsize=1)
def _adapter(reward: Any, policy: Any, tokenizer: Any) -> Any:
    return adapter(reward=reward, policy=policy, tokenizer=tokenizer)
