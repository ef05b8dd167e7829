"""Decoding with a reward model: segments that it rejects are drawn anew (STARS). Needs the package stars-engine."""

from functools import lru_cache
from typing import Any

from transformers import StoppingCriteriaList, StopStringCriteria

import stars
from stars.adapters import transformers as adapter


def generate(model: Any, stars_reward: Any = None, stars_policy: Any = None, reward_threshold: Any = None,
             segment_size: Any = 16, max_attempts: Any = 20, beta: Any = 0.7, alpha: Any = 0.5, width: Any = None,
             stop_strings: Any = None, tokenizer: Any = None, stopping_criteria: Any = None, **arguments: Any) -> Any:
    """`model.generate(**inputs, custom_generate=REPOSITORY, trust_remote_code=True, stars_reward=…, …)`.

    stars_reward: a directory of a reward model, a callable, or a stars.Reward. reward_threshold, segment_size,
    max_attempts, beta, alpha, width: of the policy stars.STARS; stars_policy: another policy in its place. tokenizer:
    the model's, for rewards that read text and for stop_strings. seed, messages and all arguments of generate: as with
    stars.adapters.transformers.
    """
    if stars_policy is None:
        if reward_threshold is None:
            raise ValueError("reward_threshold is missing: give what `stars calibrate` suggests, or stars_policy")
        stars_policy = stars.STARS(segment_size=segment_size, max_attempts=max_attempts, beta=beta, alpha=alpha,
                                   reward_threshold=reward_threshold, width=width)
    if stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings are found in the text: give tokenizer too")
        stopping_criteria = StoppingCriteriaList([*(stopping_criteria or ()),
                                                  StopStringCriteria(tokenizer, stop_strings)])
    return model.generate(custom_generate=_adapter(stars_reward, stars_policy, tokenizer),
                          stopping_criteria=stopping_criteria, **arguments)


@lru_cache(maxsize=1)  # a reward model is not loaded at every call, but where a setting is another
def _adapter(reward: Any, policy: Any, tokenizer: Any) -> Any:
    return adapter(reward=reward, policy=policy, tokenizer=tokenizer)
