"""Tokenizers that could run without bound are run in a process of their own, with a deadline and so much memory.

tokenizer.json may hold regular expressions, which the library matches by backtracking, and steps that make a text
longer, one after the other. Neither can be stopped from within, so a tokenizer stays in this process only if all of it
is known. Its steps are of the kinds below, and together make a text at most MAX_GROWTH times as long. The alternatives
of its regular expressions are all among those of the tokenizers in use, which never go back over a text twice. What
is not bounded is the vocabulary itself, which can be as long as its file is. The library normalises added tokens while
it reads a tokenizer, in whatever process: they may not become too long by it.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tokenizers import Tokenizer as Backend

from stars.errors import ModelError, TokenizerError, text_of
from stars.model.confined import Broken, Confined, TooSlow
from stars.model.files import read_json

MAX_GROWTH = 64
"""Times that the known steps may make a text longer, by the worst case of each."""
MAX_ENCODER_GROWTH = 1024
"""The same for encoders, which have no other process: the usual ones fold a text up to three times over."""
MAX_ADDED = 1 << 24
"""Characters that a normaliser may make of all added tokens together; they are few and short."""
MAX_WORD = 4096
"""Characters of a word that WordPiece splits in this process: its work grows with their square (100 is usual)."""
DEADLINE = 20.0
"""Seconds for one text in the other process: many times what a million characters take."""
START_DEADLINE = 120.0
"""Seconds until the other process has read the tokenizer."""
MAX_MEMORY = 4 << 30
"""Bytes of address space of the other process: a vocabulary of 256,000 tokens takes less than one."""

_GROWTH = {
    # normalisers, by the most characters that the Unicode standard makes of one
    "BertNormalizer": 6, "Lowercase": 2, "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Nmt": 1, "Strip": 1,
    "StripAccents": 1, "Prepend": 1,
    # pre-tokenisers; a character has at most four bytes, and a piece gets one sign before it
    "BertPreTokenizer": 1, "ByteLevel": 4, "CharDelimiterSplit": 1, "Digits": 1, "Metaspace": 2, "Punctuation": 1,
    "Split": 1, "UnicodeScripts": 1, "Whitespace": 1, "WhitespaceSplit": 1,
    # post-processors and decoders
    "BertProcessing": 1, "RobertaProcessing": 1, "BPEDecoder": 1, "ByteFallback": 1, "CTC": 1, "Fuse": 1,
    "WordPiece": 1,
}
_PARTS = ("normalizer", "pre_tokenizer", "post_processor")
"""Of a tokenizer, those that encode a text besides its model."""
_LISTS = ("normalizers", "pretokenizers", "processors", "decoders")
_LETTERS = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ALTERNATIVES = frozenset((
    # GPT-2, Llama 3, Qwen, o200k, Tekken, DeepSeek, Seed, BLOOM, CLIP and DeBERTa
    "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _ENDINGS, "'(?i:[sdmt]|ll|ve|re)", r" ?\p{L}+", r" ?\p{N}+", r"\p{L}+",
    r"\p{N}+", r"\p{N}", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _LETTERS + r"\p{L}+", _LETTERS + r"[\p{L}\p{M}]+",
    *(_LETTERS + case + ending for ending in ("", _ENDINGS + "?")
      for case in (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")),
    "[一-龥぀-ゟ゠-ヿ]+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
    r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", "[0-9][0-9][0-9]", r"[\p{L}]+", r"[\p{N}]", r"\p{N}{1}",
    r"[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}\r\n]+",
    r"<\|startoftext\|>", r"<\|endoftext\|>", r"\s{2,}", r"[\n\r\t]", r" ?[^(\s|[.,!?…。，、।۔،])]+",
    # the same with groups and possessive quantifiers, as tiktoken writes r50k and cl100k
    "'(?:[sdmt]|ll|ve|re)", r" ?\p{L}++", r" ?\p{N}++", r" ?[^\s\p{L}\p{N}]++", r"\p{N}{1,3}+", r"\s++$",
    *(fr"[^\r\n\p{{L}}\p{{N}}]?{more}\p{{L}}{most}" for more in ("", "+") for most in ("+", "++")),
    *(fr" ?[^\s\p{{L}}\p{{N}}]{more}[\r\n]*{most}" for more in ("+", "++") for most in ("", "+")),
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
    r" ?[\p{P}\p{S}]+[\r\n]*", r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+", r"\s", r"\d", r"\d+", r"\d{1,3}",
    "[0-9]", "[0-9]+", r"\n", r"[\r\n]", r"[\r\n]+", " ", " +", " {2,}", r"\S+", r"\w+", r"[^\w\s]+",
))


@contextmanager
def refusing(where: str) -> Iterator[None]:
    """TokenizerError, naming `where`, for whatever the library raises: plain Exceptions, and panics besides those."""
    try:
        yield
    except BaseException as error:
        refuse(error, where)


def refuse(error: BaseException, where: str) -> NoReturn:
    """Raises the TokenizerError that `refusing` raises for `error`, or `error` itself where the library did not fail.
    """
    if isinstance(error, TokenizerError) or not is_failure(error):
        raise error
    reason = text_of(error)[:300] or type(error).__name__
    raise TokenizerError(f"{where} ({reason})") from error


def bounded(backend: Backend, where: str) -> Backend | ConfinedBackend:
    """`backend` itself where it is known to be bounded, else one that runs it in a process of its own."""
    return backend if _is_bounded(backend) else ConfinedBackend(backend, where)


def is_failure(error: BaseException) -> bool:
    """Whether the library failed, and nobody asked to stop: its panics are no Exceptions."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def check_added_tokens(normalizer: dict[str, Any] | None, contents: list[str], where: str) -> None:
    """TokenizerError where a normaliser may make too much of the added tokens that it is to be run on."""
    if contents and _state_growth(normalizer) * sum(map(len, contents)) > MAX_ADDED:
        raise TokenizerError(f"{where} has added tokens to be normalised, by a normaliser that may make them too long "
                             'or search them without end: set their "normalized" to false, or use another tokenizer')


def check_file(path: Path, encoder: bool = False) -> None:
    """TokenizerError for a tokenizer.json that the library could not read in bounded time and memory.

    To be called before the library reads it. `encoder`: whether texts, too, are to be encoded in this process.
    """
    try:
        state = read_json(path)
    except ModelError as error:
        raise TokenizerError(str(error)) from error
    with refusing(f"{path} cannot be read as a tokenizer: copy the model again"):
        contents = [token["content"] for token in state.get("added_tokens") or [] if token.get("normalized", True)]
        check_added_tokens(state.get("normalizer"), contents, str(path))
        if encoder:
            word = (state.get("model") or {}).get("max_input_chars_per_word", 0)
            _check_encoder_parts([state.get(name) for name in _PARTS], word, str(path))


def check_encoder(backend: Backend, where: str) -> None:
    """TokenizerError for a tokenizer that may not encode texts in this process."""
    word = getattr(backend.model, "max_input_chars_per_word", 0)
    _check_encoder_parts([part_state(getattr(backend, name)) for name in _PARTS], word, where)


def _check_encoder_parts(parts: list[Any], word: int, where: str) -> None:
    """The same for the states of its _PARTS, and the longest word that WordPiece splits."""
    if word > MAX_WORD or math.prod(map(_state_growth, parts)) > MAX_ENCODER_GROWTH:
        raise TokenizerError(f"{where} has regular expressions of its own, or steps that may make a text too long for "
                             "an encoder reward model: use a reward model with a tokenizer of a usual kind")


def _is_bounded(backend: Backend) -> bool:
    if getattr(backend.model, "max_input_chars_per_word", 0) > MAX_WORD:
        return False
    encoding = math.prod(_state_growth(part_state(getattr(backend, name))) for name in _PARTS)
    return max(encoding, _state_growth(part_state(backend.decoder))) <= MAX_GROWTH


def part_state(part: Any) -> dict[str, Any] | None:
    """What tokenizer.json holds of a part of a tokenizer."""
    return None if part is None else json.loads(part.__getstate__())


def _state_growth(state: Any) -> float:
    """Times that a part of a tokenizer makes a text longer at most; infinite for what is not known."""
    if state is None:
        return 1.0
    kind = state.get("type") if isinstance(state, dict) else None
    if kind == "Sequence":
        product = 1.0
        for child in (child for name in _LISTS for child in state.get(name, ())):
            product *= _state_growth(child)
        return product
    pattern: Any = state.get("pattern") if kind in ("Replace", "Split") else None
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if regex is not None and not _is_known(regex):
        return float("inf")
    if kind == "Replace":
        content = len(state["content"])
        if regex is not None:
            return max(1.0, content)  # none of those known matches nothing
        return max(1.0, content / len(pattern["String"])) if pattern["String"] else 1.0 + content
    if kind == "Precompiled":
        return _charsmap_growth(base64.b64decode(state["precompiled_charsmap"]))
    if kind == "TemplateProcessing":
        return max(1.0, *(float(sum("Sequence" in piece for piece in state[name])) for name in ("single", "pair")))
    return float(_GROWTH.get(kind, "inf")) if isinstance(kind, str) else float("inf")


def _charsmap_growth(charsmap: bytes) -> float:
    """The longest text that SentencePiece's table puts in the place of a character: it follows a trie of given size."""
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :].split(b"\0")
    return max(1.0, *(len(text.decode(errors="replace")) for text in texts))


def _is_known(regex: str) -> bool:
    """Whether all alternatives of a regular expression are among those in use."""
    regex = regex.replace("\r", r"\r").replace("\n", r"\n")  # files hold either
    alternatives, depth, inside, begin, index = [], 0, False, 0, 0
    while index < len(regex):
        sign = regex[index]
        if sign == "\\":
            index += 1
        elif inside:
            inside = sign != "]"
        elif sign == "[":
            inside = True
        elif sign in "()":
            depth += 1 if sign == "(" else -1
        elif sign == "|" and depth == 0:
            alternatives.append(regex[begin:index])
            begin = index + 1
        index += 1
    alternatives.append(regex[begin:])
    return _ALTERNATIVES.issuperset(alternatives)


class _Encoding(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]  # of each in the text, in characters


_CHILD = """
import json, resource, sys
most = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (most, most))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_str(json.loads(sys.stdin.readline()))
print("true", flush=True)
for line in sys.stdin:
    name, given, special = json.loads(line)
    try:
        if name == "encode":
            encoding = tokenizer.encode(given, add_special_tokens=special)
            answer = [encoding.ids, encoding.offsets]
        elif name == "join":
            answer = tokenizer.decoder.decode(given)
        else:
            answer = tokenizer.decode(given, skip_special_tokens=special)
    except BaseException as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""


class ConfinedBackend(Confined):
    """A tokenizer whose encoding and decoding are done by a process of its own; all else is the library's, here.

    A text that takes it longer than DEADLINE ends the process, with a TokenizerError; the next text starts another.
    """

    script = _CHILD

    def __init__(self, backend: Backend, where: str):
        super().__init__()
        self._backend = backend
        self._where = where

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._backend, name)

    def encode(self, text: str, add_special_tokens: bool = True) -> _Encoding:
        """As the library's, token ids and where they stand in the text."""
        return _Encoding(*self._ask("encode", text, add_special_tokens))

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """As the library's."""
        text: str = self._ask("decode", [int(token) for token in ids], skip_special_tokens)
        return text

    def join(self, tokens: list[str]) -> str:
        """The text of `tokens`, as the library's decoder makes it."""
        text: str = self._ask("join", tokens, False)
        return text

    def _beginning(self) -> str:
        return self._backend.to_str()

    def _ask(self, *question: Any) -> Any:
        try:
            answer = self._answer(question, DEADLINE, START_DEADLINE, MAX_MEMORY)
        except TooSlow as error:
            raise TokenizerError(
                f"{self._where} takes more than {error.args[0]:g} s for one text, which its regular expressions or "
                "normaliser make too much of: use another tokenizer, or shorter texts") from error
        except Broken as error:
            raise TokenizerError(
                f"{self._where} cannot be run within {MAX_MEMORY >> 30} GiB, or breaks the library: use "
                "another tokenizer, or shorter texts") from error
        except OSError as error:
            raise TokenizerError(f"{self._where} needs a process of its own, which cannot be started ({error}): use a "
                                 "tokenizer without regular expressions of its own") from error
        if isinstance(answer, dict):
            raise ValueError(answer["error"])
        return answer
