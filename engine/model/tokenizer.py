"""Text to token ids and back, as transformers' fast tokenizers do it for the same directory, without transformers."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from stars.errors import ModelError, TokenizerError
from stars.model.chat_template import ChatTemplate
from stars.model.files import MOST_BYTES, is_file, read_json, read_text
from stars.model.tokenizer_limits import bounded, refusing

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SENTINEL = "StarsAssistantTurn7f3a9"
"""Stands for an assistant's text when a template is cut around it: no white space to trim, no markup to strip."""


class Tokenizer:
    """tokenizer.json, with the special tokens of tokenizer_config.json and a chat template where there is one.

    What is put around an encoded text (BOS, for example) is what tokenizer.json's post-processor says: the flags
    add_bos_token and add_eos_token of tokenizer_config.json do not enter, as in transformers 5.
    """

    def __init__(self, backend: Backend, special_tokens: dict[str, str], templates: dict[str, str], where: str):
        self._backend = backend
        self._special_tokens = special_tokens  # by name: "bos_token" and so on
        self._templates = {name: ChatTemplate(source, where) for name, source in templates.items()}
        self._where = where
        self.bos_token = special_tokens.get("bos_token")
        self.eos_token = special_tokens.get("eos_token")
        self.bos_token_id = None if self.bos_token is None else backend.token_to_id(self.bos_token)
        self.eos_token_id = None if self.eos_token is None else backend.token_to_id(self.eos_token)

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; a rendered chat template holds its special tokens already: encode it without.

        Raises TokenizerError for text that is no valid Unicode, and where the tokenizer cannot or takes too long.
        """
        try:
            with refusing(f"the tokenizer of {self._where} cannot encode this text"):
                return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TokenizerError as error:
            if isinstance(error.__cause__, (TypeError, UnicodeError)):
                raise TokenizerError(f"this text cannot be encoded ({error.__cause__}): give valid Unicode") from error
            raise

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Decode a whole response at once: a part's first token may lose its leading space."""
        with refusing(f"the tokenizer of {self._where} cannot decode these ids"):
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def same_vocabulary(self, other: Tokenizer) -> bool:
        """Whether every token id of this tokenizer means the same to `other`, which splits text in the same way.

        Tokens that only `other` has beside the common vocabulary, such as a pad token, do not matter.
        """
        if self is other:
            return True
        ours = self._backend.get_vocab(with_added_tokens=True)
        theirs = other._backend.get_vocab(with_added_tokens=True)
        return ours.items() <= theirs.items() and self._fingerprint == other._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        """Digest of all that decides how text is split: normaliser, pre-tokeniser and the model with its merges."""
        state = json.loads(self._backend.to_str())
        parts = {name: state.get(name) for name in ("normalizer", "pre_tokenizer", "model")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    # -- chat -----------------------------------------------------------------------------------------------------

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be rendered."""
        return bool(self._templates)

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = True, **kwargs: Any) -> str:
        """`messages` as text: to be encoded without special tokens. `kwargs` are further variables of the template.

        Raises TokenizerError without a template, and for messages that the template does not take.
        """
        if not self._templates:
            raise TokenizerError(f"{self._where} has no chat template: add chat_template.jinja, or give text")
        name = "tool_use" if kwargs.get("tools") and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise TokenizerError(
                f"{self._where} has chat templates named {', '.join(self._templates)} and none named default: "
                "save the one wanted as chat_template.jinja"
            )
        variables = {"tools": None, "documents": None, **self._special_tokens, **kwargs}
        return self._templates[name].render(messages, add_generation_prompt=add_generation_prompt, **variables)

    def split_template(self, messages: list[dict], **kwargs: Any) -> tuple[str, str]:
        """(what stands before an assistant's answer to `messages`, what the template puts behind it).

        Both are cut from a rendering with the answer in it, since that is what reward models are trained on: a template
        may open a finished turn otherwise than its generation prompt does. Where the two differ in white space at the
        end alone, the generation prompt is taken: that white space is then a part of the answer's first token.
        Raises TokenizerError where the template drops or changes the answer.
        """
        prompt = self.apply_chat_template(messages, add_generation_prompt=True, **kwargs)
        turn = {"role": "assistant", "content": SENTINEL}
        full = self.apply_chat_template([*messages, turn], add_generation_prompt=False, **kwargs)
        if full.count(SENTINEL) != 1:
            raise TokenizerError(
                f"the chat template of {self._where} does not keep an assistant's text as it is, so responses cannot "
                "be placed in it: use another template"
            )
        prefix, closing = full.split(SENTINEL)
        if prefix.startswith(prompt) and not prefix[len(prompt) :].strip():
            prefix = prompt
        return prefix, closing


def load_tokenizer(directory: str | Path) -> Tokenizer | None:
    """The tokenizer in DIRECTORY, None where it has no tokenizer.json; raises TokenizerError for broken files."""
    directory = Path(directory)
    path = directory / "tokenizer.json"
    if not is_file(path):
        return None
    if path.stat().st_size > MOST_BYTES:
        raise TokenizerError(f"{path} has more than {MOST_BYTES} bytes: copy the model again")
    with refusing(f"{path} cannot be read as a tokenizer: copy the model again"):
        backend = Backend.from_file(str(path))
    config = _read_config(directory)
    special_tokens = _special_tokens(directory, config)
    with refusing(f"the tokens that {directory} names cannot be added to its tokenizer: copy the model again"):
        _add_tokens(backend, config, special_tokens)
        # both may be left in the file from training, and would cut or stretch prompts
        backend.no_truncation()
        backend.no_padding()
        backend = bounded(backend, f"the tokenizer of {directory}")
        return Tokenizer(backend, special_tokens, _templates(directory, config), str(directory))


def has_chat_template(directory: str | Path) -> bool:
    """Whether DIRECTORY brings a chat template."""
    return bool(_templates(Path(directory), _read_config(Path(directory))))


def _read_config(directory: Path) -> dict[str, Any]:
    return _read_json(directory / "tokenizer_config.json")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file."""
    try:
        return read_json(path) if is_file(path) else {}
    except ModelError as error:
        raise TokenizerError(str(error)) from error


def _special_tokens(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """The special tokens by name. An older file beside the configuration goes before it, as in transformers."""
    named = dict(config)
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        named.update(extra)
    if "added_tokens_decoder" not in config:
        named.update(_read_json(directory / "special_tokens_map.json"))
    tokens = {}
    for name, token in named.items():
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and name.endswith("_token"):
            tokens[name] = content
    return tokens


def _add_tokens(backend: Backend, config: dict[str, Any], special_tokens: dict[str, str]) -> None:
    """Adds the tokens that the configuration knows and tokenizer.json does not."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder")
    for _, token in sorted(listed.items(), key=lambda item: int(item[0])) if isinstance(listed, dict) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and token["content"] not in known:
            flags = {name: bool(token[name]) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
                     if name in token}
            backend.add_tokens([AddedToken(token["content"], **flags)])
            known.add(token["content"])
    for name, token in special_tokens.items():
        if name in SPECIAL_TOKENS and token not in known:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
            known.add(token)


def _templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name: a file of its own goes before the configuration."""
    path = directory / "chat_template.jinja"
    if is_file(path):
        try:
            return {"default": read_text(path)}
        except ModelError as error:
            raise TokenizerError(str(error)) from error
    template = config.get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in template}
    except (TypeError, KeyError) as error:
        raise TokenizerError(
            f"{directory / 'tokenizer_config.json'} has a chat_template that is neither text nor a list of name and "
            "template: repair it"
        ) from error
