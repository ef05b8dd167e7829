"""A reward that is a LoRA adapter with a head, over the language model that it scores: one model's weights do both."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from stars.arguments import shown
from stars.config import EngineConfig
from stars.errors import RewardError
from stars.kernels.quant import Rounded
from stars.model.bases import CONFIG, is_adapter, is_of_own_model, model_directory
from stars.model.config import ModelConfig, load_config
from stars.model.head_files import VALUE_HEAD_FILE, HeadChoice, has_head, head_choice
from stars.model.loader import adapted_config, check, open_checkpoint
from stars.model.sharing import own_directory
from stars.model.tokenizer import Tokenizer
from stars.reward.base import Held
from stars.reward.causal import CausalReward
from stars.reward.framing import Framing


class LoraReward(CausalReward):
    """A LoRA adapter with a reward head, as peft saves it for sequence classification, over the engine's own model.

    The base's weights are held once, for the language model and for the reward; keys and values are held by each, as
    they differ. So a reward of the model's own size costs no more memory than its low-rank matrices and its cache.

    adapter: a directory with adapter_config.json and adapter_model.safetensors. The base is the engine's own model,
    whatever its format; base_model_name_or_path may name it or be no directory here. Where the engine's model is an
    adapter itself, both have one base. head, template, close and chat_template_kwargs: as `CausalReward`'s. Prompts
    are rendered and encoded by the engine's tokenizer, so the adapter needs none.

    Where the engine is built, before any weight is read: RewardError for an engine that was given a Decoder, for an
    adapter of another base that is here, and for one without a head; ModelError where names or shapes do not fit.
    """

    def __init__(self, adapter: Any, *, head: Any = "auto", template: Literal["auto", "chat", "raw"] = "auto",
                 close: Literal["none", "template", "eos"] = "none",
                 chat_template_kwargs: dict[str, Any] | None = None):
        if not isinstance(adapter, (str, Path)) or not is_adapter(Path(adapter)):
            raise RewardError(f"LoraReward.adapter is {shown(adapter)}, it must be a directory with {CONFIG}: a whole "
                              "model is stars.CausalReward(DIR)")
        super().__init__(adapter, head=head, template=template, close=close, chat_template_kwargs=chat_template_kwargs)

    def __repr__(self) -> str:
        return f"LoraReward({str(self.model)!r})"

    def holds(self, tokenizer: Tokenizer | None, vocab_size: int, config: EngineConfig) -> Held:
        """As a causal reward's, once it is known that the adapter is one of the engine's own model and has a head."""
        adapter, own = Path(self.model), own_directory()
        if own is None:
            raise RewardError(f"LoraReward reads {adapter} over the engine's own model, which is a Decoder whose files "
                              "are not known: build the engine with the model's directory")
        if not is_of_own_model(adapter):
            raise RewardError(f"{adapter} is an adapter of {model_directory(adapter)} and the engine's own model is "
                              f"{own}: give stars.CausalReward(DIR), which loads that base besides")
        choice, checkpoint = head_choice(self.head), open_checkpoint(adapter, VALUE_HEAD_FILE)
        if choice == HeadChoice() and not has_head(checkpoint):
            raise RewardError(f"{adapter} has low-rank matrices and no reward head: train it with peft's task_type "
                              "SEQ_CLS, which saves the head with them")
        check(checkpoint, adapted_config(load_config(adapter), checkpoint), "reward", choice)
        return super().holds(tokenizer, vocab_size, config)

    def _rounding(self, config: EngineConfig) -> Rounded | None:
        """As the engine's own model, whose weights these are."""
        if config.reward_quantization not in (None, config.quantization):
            raise RewardError(f'reward_quantization is "{config.reward_quantization}", and a LoraReward reads the '
                              "weights of the engine's own model: leave it out and give quantization")
        return config.quantization

    def _framing(self, tokenizer: Tokenizer | None, vocab_size: int, shape: ModelConfig) -> Framing:
        """With the engine's tokenizer, which is that of the base."""
        self.tokenizer = tokenizer
        return super()._framing(tokenizer, vocab_size, shape)
