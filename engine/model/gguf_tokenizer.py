"""Tokenizers and chat templates rebuilt from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from stars.errors import TokenizerError
from stars.model.files import shown
from stars.model.gguf_config import CONTROL, USER_DEFINED, architecture_of
from stars.model.gguf_header import Header, read_header
from stars.model.tokenizer_limits import refusing

GGML = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "seperator": "sep_token",
           "padding": "pad_token", "cls": "cls_token", "mask": "mask_token"}
"""Names of the metadata, spelled as they are there, and of Hugging Face."""
SPACE = "\u2581"  # how sentencepiece writes it


class Splitting(NamedTuple):
    """How a byte-level vocabulary takes a text apart before its merges: what tokenizer.ggml.pre names."""

    regex: str | None = None  # None: as GPT-2
    digits: bool = False  # each digit is a piece of its own, split off before
    whole: bool = False  # pieces that are a token are that token, whatever the merges make of them
    bos: bool = False  # a text begins with BOS where the file does not say


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _ENDS
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _ENDS
_TEKKEN = "|".join((*_CASED, r"\p{N}", _SIGNS))
_O200K = "|".join((*(case + _CONTRACTIONS + "?" for case in _CASED), r"\p{N}{1,3}", _SIGNS))
SPLITTINGS = {
    **dict.fromkeys(("default", "gpt2", "gpt-2", "phi-2", "olmo"), Splitting()),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), Splitting(digits=True)),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2"),
                    Splitting(_LLAMA3, whole=True, bos=True)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Splitting(_LLAMA3)),
    "tekken": Splitting(_TEKKEN, whole=True, bos=True),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "kormo"), Splitting(_QWEN2)),
    **dict.fromkeys(("gpt-4o", "llama4"), Splitting(_O200K)),
}
"""By the names that llama.cpp gives them."""


def has_gguf_tokenizer(path: Path) -> bool:
    """Whether the file holds a vocabulary. Raises ModelError for a file that cannot be read."""
    return GGML + "model" in read_header(path).metadata


def gguf_templates(path: Path) -> dict[str, str]:
    """Chat templates by name: the one without is "default". Raises ModelError."""
    header = read_header(path)
    names = [key for key in header.metadata if key == TEMPLATE or key.startswith(TEMPLATE + ".")]
    return {key[len(TEMPLATE) + 1 :] or "default": header.get(key, str) for key in names}


def read_gguf_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer that the file describes, and its special tokens by name ("bos_token" and so on).

    Two kinds: byte-level BPE ("gpt2"), split by what tokenizer.ggml.pre names, and sentencepiece's ("llama"), whose
    merges follow from its vocabulary. Raises TokenizerError for any other and for what does not go together, ModelError
    for a damaged file.
    """
    header = read_header(path)
    architecture = architecture_of(header)
    kind = header.get(GGML + "model", str)
    tokens = header.strings(GGML + "tokens")
    kinds = _numbers(header, "token_type", tokens, optional=True)
    special = {name: _token(header, key, tokens) for key, name in SPECIAL.items()}
    special_tokens = {name: token for name, token in special.items() if token is not None}
    splitting = None
    if kind == "gpt2":
        name = header.get(GGML + "pre", str, "default")
        splitting = SPLITTINGS.get(name)
        if splitting is None:
            raise TokenizerError(f"{path} splits texts as {shown(name)}, which is not known: use a file with one of "
                                 f"{', '.join(SPLITTINGS)}, or give tokenizer=DIR with its tokenizer.json")
    elif kind != "llama":
        raise TokenizerError(f"{path} has a tokenizer of kind {shown(kind)}, and gpt2 and llama are rebuilt: give "
                             "tokenizer=DIR with its tokenizer.json")
    with refusing(f"the tokenizer of {path} cannot be rebuilt: copy the file again, or give tokenizer=DIR"):
        if splitting is not None:
            backend = _byte_level(header, tokens, kinds, splitting)
        else:
            backend = _sentencepiece(header, tokens, architecture, special_tokens.get("unk_token"))
        for wanted in (CONTROL, USER_DEFINED):
            # What the vocabulary spells otherwise, spaces of gemma's, is in it and needs no second id.
            backend.add_tokens([AddedToken(token, normalized=False, special=wanted == CONTROL)
                                for token, one in zip(tokens, kinds, strict=True)
                                if one == wanted and token and backend.token_to_id(token) is not None])
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True)
                                    for token in special_tokens.values() if token])
        backend.post_processor = _post_processor(header, tokens, splitting.bos if splitting is not None else True)
    return backend, special_tokens


def _numbers(header: Header, name: str, tokens: Sequence[str], optional: bool = False) -> list[float]:
    """A number of each token; of an array that may be missing zeros."""
    if optional and GGML + name not in header.metadata:
        return [0] * len(tokens)
    numbers: list[float] = header.numbers(GGML + name).tolist()
    if len(numbers) != len(tokens):
        raise TokenizerError(f"{header.path} has {len(numbers)} {name}s of {len(tokens)} tokens: copy the file again")
    return numbers


def _token(header: Header, name: str, tokens: Sequence[str]) -> str | None:
    index = header.integer(f"{GGML}{name}_token_id")
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise TokenizerError(f"{header.path} has {name}_token_id = {index} and {len(tokens)} tokens: copy the file "
                             "again")
    return tokens[index]


def _byte_level(header: Header, tokens: Sequence[str], kinds: Sequence[float], splitting: Splitting) -> Tokenizer:
    spelling = _byte_alphabet()
    alphabet = set(spelling)
    # What stands in the file as text, and is neither a control token nor never split, is meant as those bytes.
    vocab = {token if one in (CONTROL, USER_DEFINED) or alphabet.issuperset(token)
             else "".join(spelling[byte] for byte in token.encode()): index
             for index, (token, one) in enumerate(zip(tokens, kinds, strict=True))}
    merges = [_pair(merge) for merge in header.strings(GGML + "merges")]
    backend = Tokenizer(BPE(vocab, merges, ignore_merges=splitting.whole))
    byte_level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.regex is None)
    if splitting.regex is not None:
        byte_level = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(splitting.regex), "isolated"), byte_level])
    elif splitting.digits:
        byte_level = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte: itself where it shows, else one of those from 256 on, in order."""
    shows = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = iter(range(256, 512))
    return [chr(byte if byte in shows else next(hidden)) for byte in range(256)]


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right:
        raise ValueError(f"{shown(merge)} is no pair of tokens")
    return left, right


def _sentencepiece(header: Header, tokens: Sequence[str], architecture: str, unknown: str | None) -> Tokenizer:
    gemma = architecture.startswith("gemma")
    if gemma:  # its tokens of nothing but spaces are stored as spaces
        tokens = [SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
    vocab = {token: index for index, token in enumerate(tokens)}
    if GGML + "merges" in header.metadata:
        merges = [_pair(merge) for merge in header.strings(GGML + "merges")]
    else:
        # Gemma's scores say nothing of the order of its merges: that is the order of its tokens.
        merges = _implied_merges(vocab, None if gemma else _numbers(header, "scores", tokens))
    if gemma:
        backend = Tokenizer(BPE(vocab, merges, fuse_unk=True, byte_fallback=True, unk_token=unknown))
        backend.normalizer = normalizers.Replace(" ", SPACE)
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        prefix = False
    else:
        backend = Tokenizer(BPE(vocab, merges, fuse_unk=True, byte_fallback=True))
        prefix = header.get(GGML + "add_space_prefix", bool, True)
        if architecture == "phi3" and prefix:
            backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first" if prefix else "never", split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _implied_merges(vocab: dict[str, int], scores: Sequence[float] | None) -> list[tuple[str, str]]:
    """Every pair of tokens that make a third, the third's of the highest score first; None: of the earliest.

    Of pairs that make the same token those with the longer first part come first.
    """
    merges = []
    for token, index in vocab.items():
        score = -index if scores is None else scores[index]
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                merges.append((score, left, right))
    if scores is not None:
        merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in merges]


def _post_processor(header: Header, tokens: Sequence[str], default_bos: bool) -> Any:
    """BOS before and EOS after a text, as the file asks for it."""
    ids = {name: header.integer(f"{GGML}{name}_token_id") for name in ("bos", "eos")}
    wanted = {"bos": header.get(GGML + "add_bos_token", bool, default_bos),
              "eos": header.get(GGML + "add_eos_token", bool, False)}
    put = {name: (tokens[index], index) for name, index in ids.items() if index is not None and wanted[name]}
    before, after = ([f"{name}:0"] if name in put else [] for name in ("bos", "eos"))
    return processors.TemplateProcessing(
        single=[*before, "$A:0", *after], pair=[*before, "$A:0", *after, *[b.replace(":0", ":1") for b in before],
                                              "$B:1", *[a.replace(":0", ":1") for a in after]],
        special_tokens=[{"id": name, "ids": [index], "tokens": [token]} for name, (token, index) in put.items()])
