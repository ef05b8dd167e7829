"""Grammars: which tokens may come next in a response that is to be JSON, to match a regular expression, and so on.

llguidance says so, of the bytes that each token stands for: a token is allowed where the text so far and its bytes are
the beginning of some text of the grammar. So what is drawn is the language model's own distribution, restricted to what
the grammar allows and normalised, token by token, however its texts may be split into tokens. Nothing is forced.

What a grammar allows is a function of the response's tokens alone. A `Matcher` is at some of them, and is moved to
others by taking back what they do not share: forks, take-backs, pre-emption and interrupts need nothing else. Each lane
of a draft has a matcher of its own, which is a copy of its response's (4 us; one that is rolled back instead must parse
the segment once more, which an ambiguous grammar makes slow).
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stars.errors import RequestError, TokenizerError, text_of
from stars.grammar_ends import rules_end, schema_ends
from stars.grammar_process import GrammarProcess
from stars.structured import StructuredOutputsParams

if TYPE_CHECKING:
    import llguidance

MAX_TEXT = 1 << 20
"""Characters of a grammar: far more than those in use, and compiled or refused within seconds."""
MAX_CHECKED = 1 << 15
"""Characters up to which it is asked whether a grammar ends. Longer ones end with max_tokens, if not before."""
MAX_COMPILED = 32
"""Compiled grammars that are kept for later requests."""
LIMITS: dict[str, Any] = {"max_lexer_states": 50_000, "verbose_errors": False}
"""Of one matcher, at 1 to 2 kB a state. llguidance's other limits stand as they are: they bound the time of a mask."""
NOTHING_FORCED = '%llguidance {"no_forcing": true}'
WORD = 32  # tokens of a mask's word


class Grammars:
    """The grammars of one engine's requests. tokenizer: the engine's, or None. eos_token_ids: all of the model."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._compiler: _Compiler | None = None  # made when first needed
        self._compiled: OrderedDict[tuple[str, str], Grammar] = OrderedDict()
        self._begin()

    def of(self, asked: StructuredOutputsParams) -> Grammar:
        """What `asked` allows, compiled or taken from those kept; RequestError where that is no grammar or admits
        nothing, and where this engine has none. Any thread may ask; it may wait for seconds."""
        kind, text = _text(asked)
        found = self._find(kind, text)
        if found is not None:
            return found
        with self._compiling:
            found = self._find(kind, text)  # by who was before
            if found is None:
                compiler = self._compiler = self._compiler if self._compiler is not None else self._make_compiler()
                found = Grammar(compiler.compile(kind, text), self._eos_token_ids, self._vocab_size)
                with self._lock:
                    self._compiled[kind, text] = found
                    if len(self._compiled) > MAX_COMPILED:
                        self._compiled.popitem(last=False)
        return found

    def known(self, asked: StructuredOutputsParams) -> Grammar | None:
        """What `asked` allows, where that is compiled already; waits for nobody. RequestError as of `_text`."""
        return self._find(*_text(asked))

    def _find(self, kind: str, text: str) -> Grammar | None:
        if self._process != os.getpid():
            self._begin()
        with self._lock:
            found = self._compiled.get((kind, text))
            if found is not None:
                self._compiled.move_to_end((kind, text))
        return found

    def _begin(self) -> None:
        """In a process that was forked, too: what other threads had locked stays so there."""
        self._process = os.getpid()
        self._lock = threading.Lock()  # of what is compiled, for an instant
        self._compiling = threading.Lock()  # for as long as that takes

    def _make_compiler(self) -> _Compiler:
        """Of this engine's tokens, as llguidance knows them: their bytes, and names for those that no text holds."""
        try:
            import llguidance  # noqa: F401
        except ImportError as error:
            raise RequestError('structured_outputs needs llguidance, which is not installed: pip install '
                               '"stars-engine[structured]"') from error
        if not hasattr(self._tokenizer, "token_bytes"):
            raise RequestError("structured_outputs needs a tokenizer, which the model lacks: build the engine with "
                               "tokenizer=DIR")
        if not self._eos_token_ids:
            raise RequestError("structured_outputs needs an EOS token, which the model lacks: name one in its "
                               "config.json")
        try:
            texts = self._tokenizer.token_bytes(self._vocab_size)
        except TokenizerError as error:
            raise RequestError(f"structured_outputs cannot be had of this model: {error}") from error
        names = {index: name for name, index in self._tokenizer.special_tokens.items()}
        eos = set(self._eos_token_ids)  # no part of any text, whatever they stand for
        hidden = [index for index, text in enumerate(texts) if not text or index in eos]
        for index in hidden:
            texts[index] = names.get(index, f"<[{index}]>").encode()
        return _Compiler(texts, self._eos_token_ids, hidden)


class Grammar:
    """A compiled grammar; `start` makes matchers of it."""

    def __init__(self, fresh: llguidance.LLMatcher, eos_token_ids: Sequence[int], vocab_size: int):
        self._fresh = fresh  # at the beginning, for ever: never moved
        self.eos_token_ids = eos_token_ids
        self._words = -(-vocab_size // WORD)

    def first(self, stop_ids: Sequence[int]) -> np.ndarray:
        """The mask of the first token, int32 [ceil(vocab / 32)]."""
        row = np.zeros(self._words, np.int32)
        self.start(stop_ids).fill(row)
        return row

    def start(self, stop_ids: Sequence[int]) -> Matcher:
        """A matcher at the beginning of a response that ends by one of `stop_ids`."""
        return Matcher(self, self.parser(), stop_ids)

    def parser(self) -> llguidance.LLMatcher:
        """A new one, at the beginning."""
        return self._fresh.deep_copy()


class Matcher:
    """A grammar's state after some tokens of a response. One thread may use it at a time.

    A stop id ends a response, and is allowed where the grammar may end. One that is no EOS is also allowed where the
    grammar has it as text: like a stop string, it may cut a text anywhere.
    """

    __slots__ = ("_grammar", "_parser", "_stop_ids", "_taken", "error")

    def __init__(self, grammar: Grammar, parser: llguidance.LLMatcher, stop_ids: Sequence[int],
                 taken: Sequence[int] = (), error: str | None = None):
        self._grammar = grammar
        self._parser = parser
        self._stop_ids = stop_ids
        self._taken = list(taken)  # that the parser is after
        self.error = error  # why nothing is allowed any more, in a sentence

    def at(self, token_ids: Sequence[int]) -> Matcher:
        """This matcher, moved to where it is after `token_ids`: all of a response that goes on."""
        if self.error is not None:
            self._parser, self._taken, self.error = self._grammar.parser(), [], None
        shared = self.shared(token_ids)
        if shared < len(self._taken):
            self._parser.rollback(len(self._taken) - shared)
            del self._taken[shared:]
        if shared < len(token_ids):
            rest = list(token_ids[shared:])
            self._parser.consume_tokens(rest)
            self._taken += rest
        self._check("the response holds what the grammar does not allow")
        return self

    def shared(self, token_ids: Sequence[int]) -> int:
        """How many of `token_ids`, from the first on, it is after."""
        taken, token_ids = self._taken, list(token_ids)
        count = min(len(taken), len(token_ids))
        if taken[:count] == token_ids[:count]:
            return count
        return next(place for place in range(count) if taken[place] != token_ids[place])

    def branch(self) -> Matcher:
        """Another one, which is where this one is."""
        return Matcher(self._grammar, self._parser.deep_copy(), self._stop_ids, self._taken, self.error)

    def accept(self, token: int) -> None:
        """Moves on by a token that its mask allowed."""
        if token in self._stop_ids or token < 0:  # nothing comes after it
            return
        self._parser.consume_token(token)
        self._taken.append(token)
        self._check("the grammar cannot be followed any further")

    def fill(self, row: np.ndarray) -> None:
        """Writes the mask of the tokens allowed next, int32 [ceil(vocab / 32)]: none where there is an `error`."""
        self._parser.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)  # without Python's lock
        self._check("the grammar allows no further token")
        if self.error is not None:
            row[:] = 0
            return
        words = row.view(np.uint32)
        for token in self._grammar.eos_token_ids:  # the request's own stop ids end it, and no others
            words[token // WORD] &= ~np.uint32(1 << token % WORD)
        if self._parser.is_accepting():
            for token in self._stop_ids:
                words[token // WORD] |= np.uint32(1 << token % WORD)
        if not words.any():
            self.error = "the grammar allows no further token here, and may not end"

    def _check(self, what: str) -> None:
        """Notes why the parser has given up, if it has."""
        if self.error is None and self._parser.is_error():
            self.error = f"{what} ({_line(self._parser.get_error())})"


class Branches:
    """The matchers of one response: one at what is committed, and those of the lanes that were last drawn."""

    def __init__(self, grammar: Grammar, stop_ids: Sequence[int]):
        self._last = [grammar.start(stop_ids)]

    def at(self, token_ids: Sequence[int], lanes: int) -> list[Matcher]:
        """One matcher for each of `lanes`, after `token_ids`.

        They are copies of the one that is nearest: that of the lane which has won, where one has.
        """
        trunk = max(self._last, key=lambda matcher: matcher.shared(token_ids)).at(token_ids)
        branches = [trunk.branch() for _ in range(lanes)]
        self._last = [trunk, *branches]
        return branches


# -- what was asked, as llguidance's dialect of Lark ------------------------------------------------------------------


def _text(asked: StructuredOutputsParams) -> tuple[str, str]:
    """The kind and the text of what was asked; RequestError for what is too long, or no JSON or valid Unicode."""
    if asked.json is not None:
        kind, text = "json", asked.json if isinstance(asked.json, str) else _dumped(asked.json)
    elif asked.regex is not None:
        kind, text = "regex", asked.regex
    elif asked.choice is not None:
        kind, text = "choice", json.dumps(asked.choice)
    elif asked.grammar is not None:
        kind, text = "grammar", asked.grammar
    else:
        kind, text = "json", '{"type": "object"}'
    if len(text) > MAX_TEXT:
        raise RequestError(f"structured_outputs.{kind} has {len(text)} characters, the most is {MAX_TEXT}: simplify it")
    try:
        "".join([text, *(asked.choice or ())]).encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"structured_outputs.{kind} is no valid Unicode ({error.reason}): give valid "
                           "text") from error
    return kind, text


def _dumped(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(schema, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"structured_outputs.json is no JSON schema ({text_of(error)}): give a dictionary of what "
                           "JSON can hold") from error


def _plain(value: Any) -> Any:
    """What the json module does not know: mappings of other kinds."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is nothing that JSON has")


def _lark(kind: str, text: str) -> str:
    """The grammar; RequestError where its text is no JSON, or is in a dialect that cannot be turned into this one."""
    if kind == "json":
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _refused(kind, f"it is no JSON: {text_of(error)}") from error
        return f"start: %json {text}"
    if kind == "regex":
        from llguidance import regex_to_lark

        if (len(text) - len(text.rstrip("\\"))) % 2:  # which it would leave out
            raise _refused(kind, "the backslash at its end escapes nothing")
        return f"start: TEXT\nTEXT: /{regex_to_lark(text, 'd')}/"
    if kind == "choice":
        return "start: TEXT\nTEXT: " + " | ".join(map(json.dumps, json.loads(text)))
    if "::=" in text:  # llama.cpp's dialect, which vLLM takes too
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            return str(any_to_lark(text))
        except Exception as error:
            raise _refused(kind, text_of(error)) from error
    return text


class _Tokens:
    """What LLTokenizer reads of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], eos_token_id: int, special_token_ids: Sequence[int]):
        self.tokens = tokens
        self.eos_token_id = eos_token_id
        self.special_token_ids = special_token_ids

    def __call__(self, text: bytes) -> list[int]:
        """Text to ids is asked for where bytes are forced, which they are not."""
        raise NotImplementedError


class _Compiler:
    """Compiles grammars for the tokens of one model."""

    def __init__(self, texts: Sequence[bytes], eos_token_ids: Sequence[int], special_token_ids: Sequence[int]):
        from llguidance import LLParserLimits, LLTokenizer

        tokens: Any = _Tokens(texts, eos_token_ids[0], special_token_ids)
        self._tokens = LLTokenizer(tokens)
        self._limits = LLParserLimits(**LIMITS)
        self._process = GrammarProcess(texts, eos_token_ids, special_token_ids, LIMITS)

    def compile(self, kind: str, text: str) -> llguidance.LLMatcher:
        """A matcher at the beginning; RequestError where there is no such grammar, or no text of it."""
        from llguidance import LLMatcher

        lark = _lark(kind, text)
        grammar = f"{lark}\n{NOTHING_FORCED}\n"
        try:
            problem = self._process.problem(grammar)
        except OSError as error:
            raise RequestError(f"structured_outputs needs a process of its own, which cannot be started ({error}): "
                               "free memory or processes") from error
        if problem is not None:
            message, nothing = problem
            raise _refused(kind, "no text matches it" if nothing and "NoExtension" in message else message)
        if len(lark) <= MAX_CHECKED and not (schema_ends(json.loads(text)) if kind == "json" else rules_end(lark)):
            raise _refused(kind, "it never comes to an end")
        matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise _refused(kind, matcher.get_error())
        return matcher


WHAT = {"json": "JSON schema", "regex": "regular expression", "choice": "list of choices", "grammar": "grammar"}


def _refused(kind: str, why: str) -> RequestError:
    """What is said of a grammar that is none. why: llguidance's message, or a reason of our own."""
    why = _line(why)
    if kind != "grammar":  # whose lines the user has not written
        why = re.sub(r"^line \d+, column \d+: ", "", why)
    return RequestError(f"structured_outputs.{kind} is no {WHAT[kind]} that can be followed ({why}): mend it")


def _line(message: str) -> str:
    """The reason in one of llguidance's messages, which show what was read on further lines."""
    message = message.split("\n<", 1)[0]
    error = re.search(r"^error: (.*)", message, re.MULTILINE)
    line = error.group(1) if error else message.split("\n", 1)[0]
    line = re.sub(r"^(at )?(\d+)\((\d+)\): ", r"line \2, column \3: ", line.strip())
    line = re.sub(r'failed to (compile JSON schema|parse "%json"): ', "", line)
    return " ".join(line.split())[:200].rstrip(".:")
