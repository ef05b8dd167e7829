"""Text to token ids and back, as transformers' fast tokenizers do it for the same directory, without transformers."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from stars.errors import ModelError, TokenizerError
from stars.model.bases import model_directory
from stars.model.files import MAX_BYTES, is_file, is_gguf, printed, read_json, read_text
from stars.model.tokenizer_limits import (
    ConfinedBackend,
    bounded,
    check_added_tokens,
    check_file,
    part_state,
    refuse,
    refusing,
)

if TYPE_CHECKING:
    from stars.model.chat_template import ChatTemplate
    from stars.model.control_tokens import ControlTokens

REPLACEMENT = "\ufffd"  # what a tokenizer decodes an incomplete UTF-8 sequence to
CONTEXT = 8
"""Prompt tokens decoded in front of a response: enough for a character of four byte tokens and one whole one before."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
TEMPLATE_VARIABLES = ("self", "messages", "tools", "documents", "add_generation_prompt")  # not for a token to replace
BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
SENTINEL = "StarsAssistantTurn7f3a9"
"""Stands for an assistant's text when a template is cut around it: no white space to trim, no markup to strip."""


class Tokenizer:
    """tokenizer.json, with the special tokens of tokenizer_config.json and a chat template where there is one.

    What is put around an encoded text (BOS, for example) is what tokenizer.json's post-processor says: the flags
    add_bos_token and add_eos_token of tokenizer_config.json do not enter, as in transformers 5.
    """

    def __init__(self, backend: Backend | ConfinedBackend, special_tokens: dict[str, str], templates: dict[str, str],
                 where: str):
        self._backend = backend
        self._special_tokens = special_tokens  # by name: "bos_token" and so on
        self._templates = templates  # sources by name
        self._compiled: dict[str, ChatTemplate] = {}  # those that were used
        self._where = where
        self.bos_token = special_tokens.get("bos_token")
        self.eos_token = special_tokens.get("eos_token")
        self.pad_token = special_tokens.get("pad_token")
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
        """The text of `ids`. A text's first token may lose its leading space: `Detokenizer` decodes responses.

        An invalid or unfinished sequence of bytes becomes one replacement sign and touches nothing else. (Decoders
        with byte fallback would replace every byte of its run, whole characters too.)
        """
        try:  # `refusing`, without its cost: a running engine decodes all the time
            text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except BaseException as error:
            refuse(error, f"the tokenizer of {self._where} cannot decode these ids")
        if REPLACEMENT not in text or not self._byte_fallback:
            return text
        tokens = (self._backend.id_to_token(token) for token in ids)
        hidden = self.special_tokens if skip_special_tokens else ()
        shown = [token for token in tokens if token is not None and token not in hidden]
        join = self._backend.join if isinstance(self._backend, ConfinedBackend) else self._backend.decoder.decode
        with refusing(f"the tokenizer of {self._where} cannot decode these ids"):
            text = join(_replace_invalid_bytes(shown))
        return text

    def tokens(self, ids: Sequence[int]) -> list[str | None]:
        """Each of `ids` as tokenizer.json writes it: "Ġfilm" of byte-level ones, for example. None for unknown ids."""
        return [self._backend.id_to_token(token) for token in ids]

    @cached_property
    def _byte_fallback(self) -> bool:
        """Whether tokens such as <0xE4> are decoded to bytes."""
        decoder = self._backend.decoder
        return decoder is not None and b"ByteFallback" in decoder.__getstate__()

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens, by content: what texts leave out."""
        return {token.content: index for index, token in self._backend.get_added_tokens_decoder().items()
                if token.special and token.content}

    @cached_property
    def control_tokens(self) -> ControlTokens:
        """The same, for texts in which they are no tokens."""
        from stars.model.control_tokens import ControlTokens  # here, as few want it

        return ControlTokens(self._backend, self._where)

    @property
    def named_tokens(self) -> frozenset[str]:
        """Names of special tokens that chat templates know: "bos_token" and so on."""
        return frozenset((*self._special_tokens, *SPECIAL_TOKENS))

    def token_bytes(self, vocab_size: int) -> list[bytes | None]:
        """What each id below `vocab_size` adds to a text; None where that is nothing. Raises TokenizerError where it
        depends on the tokens beside it."""
        from stars.model.token_bytes import token_bytes  # here, as only grammars need it

        return token_bytes(self._backend, set(self.special_tokens.values()), self.decode, vocab_size, self._where)

    def same_vocabulary(self, other: Tokenizer) -> bool:
        """Whether every token id of this tokenizer means the same to `other`, which splits text in the same way.

        Tokens that only `other` has besides the common vocabulary, such as a pad token, do not matter.
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

    def apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True,
                            continue_final_message: bool = False, **kwargs: Any) -> str:
        """`messages` as text: to be encoded without special tokens. `kwargs` are further variables of the template.

        continue_final_message: the text ends with the content of the last message, which is text, less the white space
        at its end where the template trims it; then there is no generation prompt.
        Raises TokenizerError without a template, and for messages that the template does not take.
        """
        if not continue_final_message:
            return self._render(messages, add_generation_prompt, kwargs)
        content = messages[-1]["content"]
        text = self._render(_with_content(messages, content + SENTINEL + " "), False, kwargs)
        end = text.rfind(SENTINEL)
        if end < 0 or content.strip() not in text[:end]:
            raise TokenizerError(f"the chat template of {self._where} does not keep the text of the final message, so "
                                 "that it cannot be continued: leave continue_final_message out")
        kept = text[:end]
        return kept if text.startswith(" ", end + len(SENTINEL)) else kept.rstrip()

    def split_template(self, messages: list[dict[str, Any]], continue_final_message: bool = False,
                       **kwargs: Any) -> tuple[str, str]:
        """(what stands before an assistant's answer to `messages`, what the template puts after it).

        Both are cut from a rendering with the answer in it, since that is what reward models are trained on: a template
        may open a finished turn otherwise than its generation prompt does. Where the two differ in white space at the
        end alone, the generation prompt is taken: that white space is then a part of the answer's first token.
        continue_final_message: the answer continues the last message, whose text is the end of what stands before.
        Raises TokenizerError where the template drops or changes the answer.
        """
        if continue_final_message:
            answered = _with_content(messages, messages[-1]["content"] + SENTINEL)
        else:
            prompt = self._render(messages, True, kwargs)
            answered = [*messages, {"role": "assistant", "content": SENTINEL}]
        full = self._render(answered, False, kwargs)
        if full.count(SENTINEL) != 1:
            raise TokenizerError(
                f"the chat template of {self._where} does not keep an assistant's text as it is, so responses cannot "
                "be placed in it: use another template"
            )
        prefix, closing = full.split(SENTINEL)
        if not continue_final_message and prefix.startswith(prompt) and not prefix[len(prompt) :].strip():
            prefix = prompt
        return prefix, closing

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool, kwargs: dict[str, Any]) -> str:
        if not self._templates:
            raise TokenizerError(f"{self._where} has no chat template: add chat_template.jinja, or give text")
        name = "tool_use" if kwargs.get("tools") and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise TokenizerError(
                f"{self._where} has chat templates named {', '.join(self._templates)} and none named default: "
                "save the one wanted as chat_template.jinja"
            )
        variables = {"tools": None, "documents": None, **self._special_tokens, **kwargs}
        if name not in self._compiled:
            from stars.model.chat_template import ChatTemplate  # here, as Jinja is slow to import

            self._compiled[name] = ChatTemplate(self._templates[name], self._where)
        return self._compiled[name].render(messages, add_generation_prompt=add_generation_prompt, **variables)


class Detokenizer:
    """Text of the responses to one prompt, as it stands after that prompt.

    Many decoders treat the first token of a text in their own way: those of Llama 2's kind take its space off. So a
    response is decoded after the prompt's last tokens, whose text is then cut off. A character that the prompt leaves
    unfinished belongs to the response that completes it.

    skip_special_tokens: False shows special tokens.
    """

    def __init__(self, tokenizer: Any, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._options = {} if skip_special_tokens else {"skip_special_tokens": False}
        count = CONTEXT
        while True:
            self._context = list(prompt_token_ids[-count:])
            self._text: str = tokenizer.decode(self._context, **self._options)
            # Special tokens decode to nothing and a lone space may be taken off. After a character that shows, the
            # rest is decoded as it is in the whole text.
            if count >= len(prompt_token_ids) or self._text.strip(" " + REPLACEMENT):
                break
            count *= 2

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a response or of its beginning."""
        text: str = self._tokenizer.decode([*self._context, *token_ids], **self._options)
        if text.startswith(self._text):
            return text[len(self._text) :]
        return text[len(os.path.commonprefix([self._text, text])) :]


def finished(text: str) -> str:
    """`text` without the character at its end that lacks bytes: the sign for it may change with the next token."""
    return text.removesuffix(REPLACEMENT)


def _with_content(messages: list[dict[str, Any]], content: str) -> list[dict[str, Any]]:
    """`messages` with another content of the last one."""
    return [*messages[:-1], {**messages[-1], "content": content}]


def _replace_invalid_bytes(tokens: list[str]) -> list[str]:
    """`tokens` with a replacement sign for each invalid or unfinished sequence of byte tokens."""
    result: list[str] = []
    run = bytearray()  # of the byte tokens at the end of what was read
    for token in [*tokens, ""]:
        if BYTE_TOKEN.fullmatch(token):
            run.append(int(token[3:5], 16))
            continue
        for character in run.decode(errors="replace"):
            result += [character] if character == REPLACEMENT else [f"<0x{byte:02X}>" for byte in character.encode()]
        run.clear()
        result.append(token)
    return result[:-1]


def load_tokenizer(directory: str | Path) -> Tokenizer | None:
    """The tokenizer in DIRECTORY or in a GGUF file, of an adapter without one its base's; None where there is none.
    Raises TokenizerError for broken files.
    """
    directory = tokenizer_directory(directory)
    if is_gguf(directory):
        return _load_gguf(directory)
    return _load_directory(directory, str(directory))


def from_transformers(tokenizer: Any) -> Tokenizer:
    """A fast tokenizer of transformers as one of ours: what `load_tokenizer` makes of the directory that it saves, with
    all of its chat templates. A copy: what is added to the one given later does not enter.

    Raises TokenizerError for a slow one and for anything else, and where `load_tokenizer` does.
    """
    kind = type(tokenizer).__name__
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Backend):
        slow = ", a slow one" if hasattr(tokenizer, "save_pretrained") else ""
        raise TokenizerError(f"tokenizer is {kind}{slow}, it must be a fast tokenizer of transformers: give one that "
                             "AutoTokenizer.from_pretrained(NAME) has loaded from a tokenizer.json")
    name = getattr(tokenizer, "name_or_path", None)
    where = printed(name) if isinstance(name, str) and name else f"a {kind}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            with refusing(f"the tokenizer of {where} cannot be saved"):
                tokenizer.save_pretrained(folder, legacy_format=False)
            made = _load_directory(Path(folder), where)
        except TokenizerError as error:
            raise TokenizerError(str(error).replace(folder, where)) from error
    assert made is not None, "save_pretrained has written no tokenizer.json"
    # Older and newer files have places of their own for several templates.
    templates = getattr(tokenizer, "chat_template", None)
    made._templates = dict(templates) if isinstance(templates, dict) else (
        {} if templates is None else {"default": str(templates)})
    return made


def _load_directory(directory: Path, where: str) -> Tokenizer | None:
    """As `load_tokenizer`, of a directory that has its own; its errors, once it is loaded, name `where`."""
    path = directory / "tokenizer.json"
    if not is_file(path):
        return None
    if path.stat().st_size > MAX_BYTES:
        raise TokenizerError(f"{path} has more than {MAX_BYTES} bytes: copy the model again")
    check_file(path)
    with refusing(f"{path} cannot be read as a tokenizer: copy the model again"):
        backend = Backend.from_file(str(path))
    config = _read_config(directory)
    with refusing(f"the tokens that {directory} names cannot be added to its tokenizer: copy the model again"):
        special_tokens = _add_tokens(backend, directory, config)
        # both may be left in the file from training, and would cut or stretch prompts
        backend.no_truncation()
        backend.no_padding()
        return Tokenizer(bounded(backend, f"the tokenizer of {where}"), special_tokens,
                         _templates(directory, config), where)


def _load_gguf(path: Path) -> Tokenizer | None:
    try:
        from stars.model.gguf_tokenizer import (  # here, as it imports torch
            gguf_templates,
            has_gguf_tokenizer,
            read_gguf_tokenizer,
        )

        if not has_gguf_tokenizer(path):
            return None
        backend, special_tokens = read_gguf_tokenizer(path)
        return Tokenizer(bounded(backend, f"the tokenizer of {path}"), special_tokens, gguf_templates(path), str(path))
    except ModelError as error:
        raise TokenizerError(str(error)) from error


def has_tokenizer(directory: str | Path) -> bool:
    """Whether DIRECTORY, or a GGUF file, brings a tokenizer."""
    directory = tokenizer_directory(directory)
    if is_gguf(directory):
        from stars.model.gguf_tokenizer import has_gguf_tokenizer  # here, as it imports torch

        return has_gguf_tokenizer(directory)
    return is_file(directory / "tokenizer.json")


def tokenizer_directory(directory: str | Path) -> Path:
    """Where the tokenizer of DIRECTORY lies: there, or where it is an adapter without one, with its base: a directory
    or a GGUF file."""
    directory = Path(directory)
    return directory if is_file(directory / "tokenizer.json") else model_directory(directory)


def has_chat_template(directory: str | Path) -> bool:
    """Whether DIRECTORY, or a GGUF file, brings a chat template."""
    directory = tokenizer_directory(directory)
    if is_gguf(directory):
        from stars.model.gguf_tokenizer import gguf_templates  # here, as it imports torch

        return bool(gguf_templates(directory))
    return bool(_templates(directory, _read_config(directory)))


def _read_config(directory: Path) -> dict[str, Any]:
    return _read_json(directory / "tokenizer_config.json")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file."""
    try:
        return read_json(path) if is_file(path) else {}
    except ModelError as error:
        raise TokenizerError(str(error)) from error


def _add_tokens(backend: Backend, directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Adds the tokens that other files than tokenizer.json know; returns the special tokens by name.

    Order and ids are those of transformers 5, quirks included: models were trained with these ids.
    """
    # Three kinds: the seven names of all models, tokens that this one names in its own way, and a list without names,
    # which goes by two names itself.
    named: dict[str, Any] = {name: config.get(name) for name in SPECIAL_TOKENS}
    own = {name: token for name, token in config.items() if _own_name(name) and isinstance(token, str)}
    late: dict[str, Any] = {name: token for name, token in config.items()
            if _own_name(name) and isinstance(token, dict) and "content" in token}
    listed, additional = config.get("extra_special_tokens"), config.get("additional_special_tokens")
    if not listed and additional is not None:
        listed, additional = additional, None
    if isinstance(listed, dict):
        own, listed = {**own, **listed}, None
    by_content: dict[str, AddedToken] = {}
    if "added_tokens_decoder" in config:
        added = {_index(index): _added(token) for index, token in dict(config["added_tokens_decoder"]).items()}
    else:
        # Files of older versions, which a configuration with added_tokens_decoder replaces.
        older = _read_json(directory / "special_tokens_map.json")
        for name, token in older.items():
            if isinstance(token, dict) and name != "extra_special_tokens":
                token = _added({**token, "special": True})
            if name in SPECIAL_TOKENS:
                named[name] = token
            elif _own_name(name) and isinstance(token, (str, AddedToken)):
                late[name] = token
        additional = older.get("additional_special_tokens", additional)
        more = older.get("extra_special_tokens")
        if isinstance(more, dict):
            own, listed = {**own, **more}, None
        elif more is not None:
            more = [_added({**token, "special": True}) if isinstance(token, dict) else token for token in _list(more)]
            listed = [*_list(listed), *(token for token in more if token not in _list(listed))]
        special = {_content(token) for token in [*named.values(), *_list(listed)]
                   if isinstance(token, (str, AddedToken))}
        added = {_index(index): AddedToken(content, special=content in special, normalized=content not in special)
                 for content, index in _read_json(directory / "added_tokens.json").items()}
        by_content = {token.content: token for token in added.values()}
        added.update(backend.get_added_tokens_decoder())  # which may take an id from a token that added_tokens.json has
    if listed is None:
        listed = additional
    by_content.update((token.content, token) for token in added.values())
    names = {name: by_content.get(_content(token), token) for name, token in named.items() if token is not None}
    names |= {**late, **own}
    contents = {name: _content(token) for name, token in names.items()}
    tokens = [token for _, token in sorted(added.items())]
    known = {token.content for token in [*backend.get_added_tokens_decoder().values(), *tokens]}
    new: list[str | AddedToken] = []
    for token in [*names.values(), *_list(listed)]:
        token = token if isinstance(token, str) else _added(token)
        if _content(token) not in known and token not in new:  # the same text with other flags comes in its turn, too
            new.append(token)
    tokens += map(_added, new)
    for token in tokens:
        token.special = token.special or token.content in contents.values()
    check_added_tokens(part_state(backend.normalizer), [token.content for token in tokens if token.normalized],
                       f"the tokenizer of {directory}")
    backend.add_tokens(tokens)
    return {name: content for name, content in contents.items() if name not in TEMPLATE_VARIABLES}


def _own_name(name: str) -> bool:
    return name.endswith("_token") and name not in SPECIAL_TOKENS


def _content(token: Any) -> str:
    """The text of a special token, as a file gives it: bare, or with its flags."""
    content = token.get("content") if isinstance(token, dict) else getattr(token, "content", token)
    if not isinstance(content, str):
        raise ValueError(f"{token!r} is neither text nor an object with content")
    return content


def _list(tokens: Any) -> list[Any]:
    if tokens is not None and not isinstance(tokens, list):
        raise ValueError(f"{tokens!r} is no list")
    return tokens or []


def _index(index: Any) -> int:
    if isinstance(index, (str, int)) and str(index).isdecimal():
        return int(index)
    raise ValueError(f"{index!r} is no token id")


def _added(token: Any) -> AddedToken:
    """A token with the flags it has; a bare one is special."""
    content = _content(token)
    if not isinstance(token, dict):
        return token if isinstance(token, AddedToken) else AddedToken(content, special=True)
    return AddedToken(content, **{name: bool(token[name]) for name in FLAGS if name in token})


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
