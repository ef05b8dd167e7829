"""Tokenizers rebuilt from GGUF files: ids and texts are those that transformers rebuilds from the same files."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="the gguf package writes the files of these tests: pip install gguf==0.19.0")

from gguf_files import byte_level_fields, sentencepiece_fields, write_vocabulary  # noqa: E402
from stars.errors import TokenizerError  # noqa: E402
from stars.model.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from tiny_models import SENTENCES  # noqa: E402

TEXTS = (
    "Hello world", "  two  spaces   three", "tabs\t\tand\nnew\n\nlines\r\n", "1234 56 7,890.12", " leading", "trailing ",
    "é è naïve façade Größe 東京 🙂 👩‍👩‍👧", "don't won't I'LL we've", "<|eot_id|>user\nhi</s>\n", "<bos>a<end_of_turn>b<think>c",
    "x=1;\n\tif (a<=b) { return; }", "", "   ", "\u00a0\u2003x", "e\u0301 combining", "aaaaaaaaaaaaaaaaaaaaaaaaa",
    "▁already ▁▁", "<0x41> <unk> [multimodal]", "\x00\x01\x7f", "camelCase HTTPServer", "\n\n\n", "  \n  a", "Numbers 3, 14",
    "the dog and the fox", "Once upon a time",
)
LEARNT = [*SENTENCES, *TEXTS]


def transformers_own(path: Path):
    """transformers' tokenizer of a file."""
    from transformers import AutoTokenizer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def agree(ours: Tokenizer, theirs, texts=TEXTS) -> None:
    """Ids with and without what is put around a text, and their text with and without special tokens."""
    for text in texts:
        for around in (True, False):
            assert ours.encode(text, around) == theirs.encode(text, add_special_tokens=around), text
        ids = theirs.encode(text)
        for hidden in (True, False):
            assert ours.decode(ids, hidden) == theirs.decode(ids, skip_special_tokens=hidden), text


@pytest.mark.parametrize("pre", ["gpt-2", "default", "qwen2", "llama-bpe", "tekken", "gpt-4o"])
def test_byte_level(tmp_path, pre):
    """Texts are split as the name says; the vocabulary's merges go across every boundary, so that it shows."""
    fields = byte_level_fields(pre, LEARNT, add_bos_token=pre == "qwen2", add_eos_token=pre == "tekken")
    path = write_vocabulary(tmp_path / "model.gguf", "qwen2", fields)
    texts = TEXTS
    if pre in ("llama-bpe", "tekken"):  # a piece that is a token is that token, which transformers leaves to merges
        texts = tuple(text for text in TEXTS if text not in ("Once upon a time",))
    agree(load_tokenizer(path), transformers_own(path), texts)


def test_smollm_splits_off_digits(tmp_path):
    """As its name says in llama.cpp, and as its own tokenizer.json does; transformers splits as GPT-2 does."""
    fields = byte_level_fields("smollm", ["a 12 34", "  12 34 56 12 34", *SENTENCES])
    ours = load_tokenizer(write_vocabulary(tmp_path / "a.gguf", "llama", fields))
    pieces = [ours.decode([token]) for token in ours.encode("  12 34")]
    assert pieces == ["  ", "1", "2", " ", "3", "4"]
    plain = load_tokenizer(write_vocabulary(tmp_path / "b.gguf", "llama", fields | {"pre": "gpt-2"}))
    assert [plain.decode([token]) for token in plain.encode("  12 34")] == [" ", " 1", "2", " ", "34"]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3", "phi3"])
def test_sentencepiece(tmp_path, architecture):
    """Merges are found again by scores, of gemma by the order of its tokens; BOS is put in front unless asked not to."""
    path = write_vocabulary(tmp_path / "model.gguf", architecture, sentencepiece_fields(LEARNT))
    ours = load_tokenizer(path)
    # transformers gives </s> an id beyond the vocabulary where a llama file has none
    agree(ours, transformers_own(path), [text for text in TEXTS if "</s>" not in text])
    assert ours.encode("a")[0] == ours.bos_token_id == 2
    silent = write_vocabulary(tmp_path / "silent.gguf", architecture, sentencepiece_fields(LEARNT, add_bos_token=False))
    assert load_tokenizer(silent).encode("a")[0] != 2


def test_a_prefix_is_put_before_texts_unless_the_file_says_no(tmp_path):
    fields = sentencepiece_fields(LEARNT)
    ours = load_tokenizer(write_vocabulary(tmp_path / "a.gguf", "llama", fields | {"add_space_prefix": False}))
    with_prefix = load_tokenizer(write_vocabulary(tmp_path / "b.gguf", "llama", fields))
    assert ours.encode(" the dog") == with_prefix.encode("the dog")
    assert ours.decode(ours.encode(" the dog")) == " the dog"


def test_special_tokens_and_templates(tmp_path):
    fields = byte_level_fields("qwen2", LEARNT) | {
        "tokenizer.chat_template": "{{ messages[0]['content'] }}{{ bos_token }}",
        "tokenizer.chat_template.tool_use": "{{ tools }}"}
    ours = load_tokenizer(write_vocabulary(tmp_path / "model.gguf", "qwen2", fields))
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<s>", "</s>", "<pad>")
    assert ours.special_tokens == {"<pad>": 0, "<s>": 1, "</s>": 2, "<|eot_id|>": 3}
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi<s>"
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}], tools=[1]) == "[1]"


@pytest.mark.parametrize(("change", "said"), [
    ({"pre": "of-my-own"}, "splits texts as 'of-my-own', which is not known: use a file with one of default, "),
    ({"model": "rwkv"}, "has a tokenizer of kind 'rwkv', and gpt2 and llama are rebuilt: give tokenizer=DIR"),
    ({"token_type": [1]}, r"has 1 token_types of \d+ tokens: copy the file again"),
    ({"eos_token_id": 100000}, r"has eos_token_id = 100000 and \d+ tokens: copy the file again"),
    ({"merges": ["a"]}, "cannot be rebuilt: copy the file again, or give tokenizer=DIR .'a' is no pair of tokens"),
    ({"merges": ["qqq www"]}, "cannot be rebuilt: copy the file again, or give tokenizer=DIR"),
    ({"tokens": [1, 2]}, "has tokenizer.ggml.tokens of numbers where strings are needed: use another file"),
    ({"add_bos_token": "yes"}, "has tokenizer.ggml.add_bos_token = 'yes' where bool is needed: use another file"),
])
def test_what_cannot_be_rebuilt_is_said(tmp_path, change, said):
    path = write_vocabulary(tmp_path / "model.gguf", "llama", byte_level_fields("gpt-2", LEARNT[:3]) | change)
    with pytest.raises(TokenizerError, match=said) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
