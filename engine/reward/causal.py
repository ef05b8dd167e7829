"""A causal reward model in a cache of its own: only new tokens are scored, rejected ones cost nothing to forget."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from stars.arguments import shown
from stars.cache import PagedCache
from stars.config import EngineConfig
from stars.determinism import check_row_invariance
from stars.errors import ModelError, RewardError
from stars.kernels.quant import Rounded
from stars.kernels.types import Draft
from stars.model.bases import is_adapter
from stars.model.config import ModelConfig, load_config
from stars.model.decoder import Decoder
from stars.model.head_files import HeadChoice, head_choice
from stars.model.heads import RewardHead
from stars.model.loaded import LoadedModel, own_tokenizer, taken
from stars.model.loader import load_model
from stars.model.location import located
from stars.model.tokenizer import Tokenizer, from_transformers, load_tokenizer
from stars.passes import Passes
from stars.reward.base import Held, check_path, checked_rounding, rounding_of
from stars.reward.framing import Framing
from stars.reward.gating import Gating
from stars.reward.scoring import ScoringReward
from stars.sizes import reward_model, slab_length

REENCODE_SLACK = 64  # tokens a re-encoded response may run longer than the LM's, before pages are taken for it


class CausalReward(ScoringReward):
    """A decoder with a reward head: what the head says of the last token, in float32.

    model: as the engine's, or a Decoder with a reward head. One that transformers has loaded needs its `tokenizer`, a
    fast one, unless it is from a directory here; it is held until an engine has read it. head: which of the files';
    "auto" finds it by its tensors. One row gives the raw logit, two labels the probability of the second, ArmoRM's and
    QRM's objectives their sum by the weights that a gate gives the prompt. A name of a tensor chooses among several,
    "lm_head" takes its row 0, and a dict says more: tensor; rows, one of the reward, or the bad one's and the good
    one's; activation, "none", "sigmoid" or "softmax"; mean and std of the rewards; sign, -1 where lower is better;
    prompt_pattern, ids at which a gate reads the prompt, and its temperature.

    template: "chat" renders prompt and response with the RM's chat template (a plain prompt becomes one user turn),
    "raw" puts the response right after the prompt, "auto" is "chat" for messages and "raw" for text. The template is
    given the tools of the prompt, and chat_template_kwargs; a final message that is continued and the response are one
    turn, and without a generation prompt the response is a turn all the same. Messages whose beginning was cut are
    rendered whole. close: what is
    scored after every response and then dropped: "none", "template" (what the chat template puts after an assistant
    turn), "eos".

    quantization: what a directory's matrices are rounded to, as `load_model`'s; "auto" takes the engine's
    reward_quantization, None leaves them as they are. The head is float32 in any case.

    With the LM's vocabulary token ids are passed through; with another one the response is decoded, the whole text
    is encoded again, and the cache is kept up to the longest common prefix. Ids that spell a stop string are scored
    where ids are passed through and cut off where text is.

    A response that is encoded again may take more tokens than the model's context has. Where segments are scored, one
    that does so after its first segment ends there with finish_reason "length", as at the end of a context. Elsewhere
    the request ends with an error: in a first segment, and where a finished response is scored, by Sample(score=True)
    and BestOfN.
    """

    exclusive = True
    readings = 1  # of a candidate, in one pass

    def __init__(self, model: Any, *, head: Any = "auto", tokenizer: Any = None,
                 template: Literal["auto", "chat", "raw"] = "auto", close: Literal["none", "template", "eos"] = "none",
                 chat_template_kwargs: dict[str, Any] | None = None, quantization: str | None = "auto"):
        name, model = type(self).__name__, taken(model)
        if not hasattr(model, "forward"):
            check_path(name, model)
            model = located(model)
        try:
            chosen = head_choice(head) != HeadChoice()
        except ModelError as error:
            raise RewardError(f"{name}.{error}") from None
        if chosen and hasattr(model, "forward"):
            raise RewardError(f"{name}.head belongs to a directory, and model is a Decoder, which has its head: "
                              "give load_model(DIR, head='reward', reward_head=…) that head")
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer = from_transformers(tokenizer)
        elif isinstance(tokenizer, (str, Path)):
            path, tokenizer = tokenizer, load_tokenizer(tokenizer)
            if tokenizer is None:
                raise RewardError(f"{name}.tokenizer is {shown(str(path))}, where no tokenizer.json is: give the "
                                  "directory of a fast tokenizer")
        if tokenizer is not None and not callable(getattr(tokenizer, "encode", None)):
            raise RewardError(f"{name}.tokenizer is {shown(tokenizer)}, it must be a stars tokenizer, as of "
                              "stars.model.tokenizer.load_tokenizer(DIR)")
        if template not in ("auto", "chat", "raw"):
            raise RewardError(f'{name}.template is {template!r}, it must be "auto", "chat" or "raw"')
        if close not in ("none", "template", "eos"):
            raise RewardError(f'{name}.close is {close!r}, it must be "none", "template" or "eos"')
        self.model = model
        self.head = head
        self.quantization = checked_rounding(name, quantization, model)
        self.template = template
        self.close_policy = close
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.tokenizer = tokenizer
        self._in_memory = isinstance(model, LoadedModel)
        self._given: dict[str, Any] | None = None  # what `decoder` was loaded with, where `model` was no Decoder

    def holds(self, tokenizer: Tokenizer | None, vocab_size: int, config: EngineConfig) -> Held:
        """The model, and slabs for what its vocabulary makes of a segment."""
        shape = self.model.config if hasattr(self.model, "forward") else load_config(self.model)
        return Held(self.model, self._slab_length(self._framing(tokenizer, vocab_size, shape), config),
                    reward_head=self.head, quantization=self._rounding(config))

    def bind(self, tokenizer: Tokenizer | None, vocab_size: int, config: EngineConfig) -> None:
        """Loads the model, unless that was done alike before, compares vocabularies, allocates the cache."""
        self._own_tokenizer()  # of the directory that a model in memory is from, which it forgets below
        given: dict[str, Any] = dict(dtype=config.dtype, device=config.device, deterministic=config.deterministic,
                                     quantization=self._rounding(config))
        if hasattr(self.model, "forward"):
            if self._given not in (None, given):
                raise RewardError(f"the model of this {type(self).__name__} was in memory and has been read with "
                                  f"{_settings(self._given)}, not with {_settings(given)}: make another one of it")
            self.decoder: Decoder = self.model
        elif self._given != given or is_adapter(Path(self.model)):  # whose base may be another engine's own by now
            self.decoder = load_model(self.model, head="reward", max_rows=1, max_model_len=1, reward_head=self.head,
                                      **given)
            self._given = given
            if self._in_memory:
                self.model = self.decoder  # what was copied of the one given is not kept alive twice
        self.decoder.check_device(config.device, "the reward model")
        self.locks = (self.decoder.lock,)
        if config.deterministic:
            check_row_invariance(self.decoder, config.target)
        self.target = config.target
        shape = self.decoder.config
        self.deterministic = config.deterministic
        self.framing = self._framing(tokenizer, vocab_size, shape)
        self.same_vocabulary = self.framing.encoder is None
        self.needs_text = not self.same_vocabulary
        self.max_model_len = shape.context_length
        sizes = reward_model(shape, config, self._slab_length(self.framing, config), self.readings)
        self.cache = PagedCache(shape, config, sizes, self.decoder.dtype)
        with self.decoder.lock:  # another engine may be at work with it
            self._passes = Passes(self.decoder, self.cache, config, sizes)
        head = self.decoder.score_head
        gate = head.gate if isinstance(head, RewardHead) else None
        self.activated = isinstance(head, RewardHead) and head.activation != "none"
        self.gating = None if gate is None else Gating(gate, self._passes, self.cache)
        self.vocab_size = shape.vocab_size
        self.slack = 0 if self.same_vocabulary else REENCODE_SLACK

    def warm_up(self, draft: Draft) -> None:
        """Captures every shape of a pass."""
        with self.decoder.lock:
            self._passes.warm_up(draft)

    def _rounding(self, config: EngineConfig) -> Rounded | None:
        """What the matrices of a directory are rounded to; ModelError where they cannot be."""
        return rounding_of(self.model, self.quantization, "reward", self.head, config)

    def _framing(self, tokenizer: Tokenizer | None, vocab_size: int, shape: ModelConfig) -> Framing:
        """Compares vocabularies; RewardError where they cannot be compared or do not match."""
        self._own_tokenizer()
        if tokenizer is not None and self.tokenizer is not None:
            same = tokenizer.same_vocabulary(self.tokenizer)
        elif tokenizer is None and self.tokenizer is None:
            same = True  # as far as anybody knows
        else:
            side = "reward model" if self.tokenizer is None else "model"
            if self.tokenizer is None and self._in_memory:
                raise RewardError("the reward model was given without its tokenizer, so its vocabulary cannot be "
                                  f"compared with the other's: give {type(self).__name__}(model, tokenizer=tokenizer)")
            raise RewardError(f"the {side} has no tokenizer.json, so its vocabulary cannot be compared with the "
                              "other's: add the tokenizer to both directories or to neither")
        if same and shape.vocab_size < vocab_size and self.tokenizer is None:
            raise RewardError(f"the reward model's vocabulary of {shape.vocab_size} does not match the model's of "
                              f"{vocab_size}: use a reward model of the same vocabulary, or give both a tokenizer")
        return Framing(self.tokenizer, same, shape, self.template, self.close_policy, self.chat_template_kwargs,
                       tokenizer)

    def _own_tokenizer(self) -> Tokenizer | None:
        """The reward model's: given, its directory's, or of one in memory that of the directory it is from."""
        if self.tokenizer is None and not hasattr(self.model, "forward"):
            self.tokenizer = own_tokenizer(self.model)
        own: Tokenizer | None = self.tokenizer
        return own

    def _slab_length(self, framing: Framing, config: EngineConfig) -> int:
        return slab_length(config, framing.encoder is not None, framing.closing_room)


def _settings(given: dict[str, Any] | None) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in (given or {}).items())
