"""Tokenizers that could run without bound run elsewhere, with a deadline; the usual ones run here, as before."""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from stars.errors import TokenizerError
from stars.model import tokenizer_limits
from stars.model.tokenizer import load_tokenizer
from stars.model.tokenizer_limits import ConfinedBackend
from test_bad_input import one_sentence
from tiny_models import write_tokenizer

ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = (ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
USUAL = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": LLAMA3,
    "qwen2": LLAMA3.replace("{1,3}", ""),
    "qwen3.5": LLAMA3.replace("{1,3}", "").replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]",
                                                                                     r"[^\s\p{L}\p{M}\p{N}]"),
    "o200k": (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + ENDINGS + "?"
              r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + ENDINGS + "?"
              r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
    "deepseek": ("[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
                 "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"),
}
TEXT = "The dog's naïve FAÇADE, 1592  東京 🙂\n\n  and so on. "
ODD = r"[a-m]+|[n-z]+|\s+"


@pytest.fixture()
def saved(tmp_path) -> Callable[..., Path]:
    """saved(pre_tokenizer=…): a directory with a byte-level tokenizer of those parts."""

    def save(**parts: object) -> Path:
        write_tokenizer(tmp_path)
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        for name, part in parts.items():
            setattr(tokenizer, name, part)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        return tmp_path

    return save


def split(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def confined(tokenizer) -> bool:
    return isinstance(tokenizer._backend, ConfinedBackend)


@pytest.mark.parametrize("name", USUAL)
def test_usual_expressions_run_here(name, saved):
    directory = saved(pre_tokenizer=split(USUAL[name]))
    tokenizer = load_tokenizer(directory)
    assert not confined(tokenizer)
    reference = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.encode(TEXT) == reference.encode(TEXT).ids


def test_the_check_is_quick(saved):
    """At the load, for the usual tokenizers: some tenths of a millisecond, 20 at most on a busy machine."""
    backend = Tokenizer.from_file(str(saved(pre_tokenizer=split(USUAL["o200k"])) / "tokenizer.json"))
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        assert tokenizer_limits._is_bounded(backend)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.02


SENTENCEPIECE = dict(
    normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), pre_tokenizer=None,
    decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                               decoders.Strip(" ", 1, 0)]))


@pytest.mark.parametrize("parts", [
    SENTENCEPIECE, {"pre_tokenizer": pre_tokenizers.Metaspace()}, {"normalizer": normalizers.NFC()},
    {"normalizer": normalizers.BertNormalizer(), "pre_tokenizer": pre_tokenizers.BertPreTokenizer()},
    {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.Punctuation(),
                                               pre_tokenizers.ByteLevel()])},
    {"normalizer": normalizers.Replace(Regex(" {2,}"), "▁")}, {"model": models.WordPiece({"[UNK]": 0})},
])
def test_usual_parts_run_here(parts, saved):
    assert not confined(load_tokenizer(saved(**parts)))


HARMFUL = {
    "an odd expression": {"pre_tokenizer": split(ODD)},
    "one odd alternative": {"pre_tokenizer": split(LLAMA3 + "|(a+)+b")},
    "an odd expression that is replaced": {"normalizer": normalizers.Replace(Regex("(a|b)+"), "c")},
    "an odd expression in the decoder": {"decoder": decoders.Replace(Regex("(a|b)+"), "c")},
    "an odd expression among others": {"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("(a|b)+"), "c")])])},
    "doubling": {"normalizer": normalizers.Sequence([normalizers.Replace("a", "aa")] * 40)},
    "folding and unfolding": {"normalizer": normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("ل", "ﷺ")] * 10)},
    "bytes of bytes": {"normalizer": normalizers.Sequence([normalizers.ByteLevel()] * 40)},
    "a long replacement": {"normalizer": normalizers.Replace("a", "b" * 1000)},
    "a template that repeats": {"post_processor": processors.Sequence(
        [processors.TemplateProcessing(single="$A $A", pair="$A $B", special_tokens=[])] * 40)},
    "a decoder that doubles": {"decoder": decoders.Sequence([decoders.Replace("a", "aa")] * 40)},
    "words without an end": {"model": models.WordPiece({"[UNK]": 0}, max_input_chars_per_word=10**9)},
}


@pytest.mark.parametrize("name", HARMFUL)
def test_what_could_grow_or_search_runs_elsewhere(name, saved):
    assert confined(load_tokenizer(saved(**HARMFUL[name])))


def test_elsewhere_the_ids_are_the_same(saved):
    """Texts and ids of all kinds, added tokens among them; and all else that is asked of a tokenizer."""
    directory = saved(pre_tokenizer=split(ODD))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "unk_token": "<new>"}))
    tokenizer = load_tokenizer(directory)
    reference = Tokenizer.from_file(str(directory / "tokenizer.json"))
    reference.add_special_tokens(["<new>"])
    assert confined(tokenizer)
    for text in ("", "a", TEXT, "<new></s> <s>x", "a\nb\r\n\x00\x1f", TEXT * 500):
        for special in (False, True):
            ids = tokenizer.encode(text, add_special_tokens=special)
            assert ids == reference.encode(text, add_special_tokens=special).ids
            for skip in (False, True):
                assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)
    assert tokenizer.vocab_size == reference.get_vocab_size() and tokenizer.eos_token_id == 2
    assert tokenizer.same_vocabulary(load_tokenizer(directory))
    with pytest.raises(TokenizerError, match="give valid Unicode|cannot encode this text"):
        tokenizer.encode("\ud800")
    assert tokenizer.encode("dog") == reference.encode("dog").ids


def test_texts_that_take_too_long_are_given_up(saved, monkeypatch):
    """Neither the library's own limit of steps back nor Python can stop these; the next text is served again."""
    monkeypatch.setattr(tokenizer_limits, "DEADLINE", 1.0)
    # 28 letters are some hundred thousand ways to split them, less than the library allows for one place
    tokenizer = load_tokenizer(saved(pre_tokenizer=split(r"(?:a|aa)+b|a|\s")))
    tokenizer.encode("start")
    process = tokenizer._backend._process
    begin = time.monotonic()
    with pytest.raises(TokenizerError, match="takes more than 1 s for one text") as caught:
        tokenizer.encode(("a" * 28 + " ") * 2000)
    assert time.monotonic() - begin < 20
    one_sentence(str(caught.value))
    assert process.poll() is not None
    assert tokenizer.decode(tokenizer.encode("a dog")) == "a dog"


def test_what_the_library_gives_up_is_an_error(saved):
    tokenizer = load_tokenizer(saved(pre_tokenizer=split("(a+)+b")))
    with pytest.raises(TokenizerError, match="cannot encode this text .*retry-limit-in-match over") as caught:
        tokenizer.encode("a" * 60)
    one_sentence(str(caught.value))
    assert tokenizer.encode("dog")


def test_growth_ends_at_the_limit_of_memory(saved, monkeypatch):
    """A letter that becomes a million million."""
    monkeypatch.setattr(tokenizer_limits, "MAX_MEMORY", 1 << 30)
    growing = normalizers.Sequence([normalizers.Replace("a", "a" * 1000)] * 4)
    tokenizer = load_tokenizer(saved(normalizer=growing))
    with pytest.raises(TokenizerError, match="cannot be run within 1 GiB") as caught:
        tokenizer.encode("a")
    one_sentence(str(caught.value))


def test_threads_take_turns_and_forks_have_their_own(saved):
    tokenizer = load_tokenizer(saved(pre_tokenizer=split(ODD)))
    texts = [f"the {'dog ' * n}sleeps" for n in range(20)]
    expected = [tokenizer.encode(text) for text in texts]
    results: list = [None] * 4

    def work(index: int) -> None:
        results[index] = [tokenizer.encode(text) for text in texts]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4
    first = tokenizer._backend._process.pid
    child = os.fork()
    if child == 0:
        good = tokenizer.encode(texts[3]) == expected[3] and tokenizer._backend._process.pid != first
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert tokenizer._backend._process.pid == first and tokenizer.encode(texts[2]) == expected[2]


def test_an_interrupt_leaves_no_answer_behind(saved, monkeypatch):
    """The answer to the interrupted question is never taken for the next one's."""
    tokenizer = load_tokenizer(saved(pre_tokenizer=split(ODD)))
    expected = tokenizer.encode("the dog")
    original = os.write

    def interrupted(descriptor: int, data) -> int:
        original(descriptor, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("something else")
    monkeypatch.setattr(os, "write", original)
    assert tokenizer.encode("the dog") == expected


def test_the_process_ends_with_the_tokenizer(saved):
    tokenizer = load_tokenizer(saved(pre_tokenizer=split(ODD)))
    tokenizer.encode("x")
    process = tokenizer._backend._process
    del tokenizer
    assert process.poll() is not None


GROWING = normalizers.Sequence([normalizers.Replace("a", "a" * 16)] * 7)  # of one letter 268 million
ADDED = {"content": "a", "single_word": False, "lstrip": False, "rstrip": False, "special": False}


@pytest.mark.parametrize("normalizer", [GROWING, normalizers.Replace(Regex("(a|b)+c"), "d")])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_added_tokens_are_not_normalised_without_bound(normalizer, file, saved):
    """The library would do so while it reads the tokenizer or takes the token, in this process."""
    directory = saved(normalizer=normalizer)

    def write(**flags) -> None:
        state = json.loads((directory / "tokenizer.json").read_text())
        first = max(state["model"]["vocab"].values()) + 1
        if file == "tokenizer.json":
            state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "a"]
            state["added_tokens"].append({"id": first, **ADDED, **flags})
            (directory / file).write_text(json.dumps(state))
        else:
            (directory / file).write_text(json.dumps({"added_tokens_decoder": {str(first): {**ADDED, **flags}}}))

    write(normalized=True)
    begin = time.monotonic()
    with pytest.raises(TokenizerError, match="added tokens to be normalised") as caught:
        load_tokenizer(directory)
    assert time.monotonic() - begin < 20
    one_sentence(str(caught.value))
    write(normalized=False)
    assert confined(load_tokenizer(directory))


def test_lists_of_another_kind_do_not_hide_steps(saved):
    """A sequence of pre-tokenisers that has an empty list of normalisers beside its own."""
    directory = saved(pre_tokenizer=split(ODD))
    state = json.loads((directory / "tokenizer.json").read_text())
    state["pre_tokenizer"]["normalizers"] = []
    assert tokenizer_limits._state_growth(state["pre_tokenizer"]) == float("inf")


def test_known_expressions_take_at_least_one_character():
    """Else they would insert a replacement between all characters."""
    for alternative in tokenizer_limits._ALTERNATIVES:
        replace = normalizers.Replace(Regex(alternative), "\x01\x01")
        for text in ("", "a", "A", "1", " ", "\n", "!", "東", "'", "\u0301"):
            assert len(replace.normalize_str(text)) <= 2 * len(text), alternative


CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
          r"|\s+(?!\S)|\s")
R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


@pytest.mark.parametrize("regex", [
    CL100K, R50K, CL100K.replace("]*+", "]*").replace("{1,3}+", "{1,3}"), R50K.replace("++", "+").replace(r"|\s+$", ""),
    LLAMA3.replace("{1,3}", "{1}").replace(r"[^\s\p{L}\p{N}]+[\r\n]*", "[^\\s\\p{L}\\p{N}\r\n]+"),
    r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", "[0-9][0-9][0-9]", r" ?[^(\s|[.,!?…。，、।۔،])]+"])
def test_more_expressions_in_use_run_here(regex, saved):
    assert not confined(load_tokenizer(saved(pre_tokenizer=split(regex))))


def charsmap(*texts: str) -> str:
    return base64.b64encode((4).to_bytes(4, "little") + bytes(4) + "\0".join(texts).encode() + b"\0").decode()


def test_tables_grow_a_text_by_their_longest_entry():
    state = {"type": "Precompiled", "precompiled_charsmap": charsmap("a", "ﷺﷺ", "ffi")}
    assert tokenizer_limits._state_growth(state) == 3
    assert tokenizer_limits._state_growth({**state, "precompiled_charsmap": charsmap()}) == 1


def test_invalid_bytes_are_replaced_elsewhere_too(saved, monkeypatch):
    """The decoder runs a second time for them: in the process of its own, where it is not bounded."""
    directory = saved(model=models.BPE({"<0xC3>": 0, "<0xA4>": 1, "x": 2}, [], byte_fallback=True),
                      decoder=decoders.Sequence([decoders.Replace(Regex("(q|r)+"), "s"), decoders.ByteFallback(),
                                                 decoders.Fuse()]))
    tokenizer = load_tokenizer(directory)
    assert confined(tokenizer)
    asked = []
    ask = ConfinedBackend._ask
    monkeypatch.setattr(ConfinedBackend, "_ask",
                        lambda self, *question: asked.append(question[0]) or ask(self, *question))
    assert tokenizer.decode([0, 1, 2, 0]) == "äx\ufffd"
    assert asked == ["decode", "join"]
