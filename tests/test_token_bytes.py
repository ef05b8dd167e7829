"""The bytes of tokens, against what tokenizers decode whole texts to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

import stars
from stars.errors import TokenizerError
from stars.model.tokenizer import load_tokenizer
from test_bad_input import one_sentence
from tiny_models import write_tokenizer

TEXTS = ["The dog sleeps. ", "naïve FAÇADE, 1592  東京 🙂\n\n  and so on.", '{"a": [1, 2], "b": "é\\n"}', "a", " a",
         "dog's <think>x</think>", "\x00\x7f\u2028"]


def saved(directory, tokenizer: Tokenizer, eos: str | None = None):
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({} if eos is None else {"eos_token": eos}))
    return load_tokenizer(directory)


def sentencepiece_bpe() -> Tokenizer:
    """As Llama 2's: bytes of what is unknown, a sign for spaces, one taken off in front."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    for text in ("▁", "d", "o", "g", "do", "dog", "▁dog", "s", "▁s", ".", "a", "▁a", "▁▁"):
        vocab[text] = len(vocab)
    merges = [("d", "o"), ("do", "g"), ("▁", "dog"), ("▁", "s"), ("▁", "a"), ("▁", "▁")]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(["</s>"])
    made.add_tokens([AddedToken("<think>", normalized=False)])
    return made


def unigram() -> Tokenizer:
    """As T5's: pieces with scores and no bytes."""
    pieces = [("<unk>", 0.0), *((piece, -float(index)) for index, piece in enumerate(
        ["▁", "▁dog", "dog", "s", "▁s", "a", "▁a", ".", "l", "e", "p", "é", "東", *"0123456789"], 1))]
    made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<unk>", "</s>"])
    return made


def bytewise(directory) -> Tokenizer:
    write_tokenizer(directory)
    made = Tokenizer.from_file(str(directory / "tokenizer.json"))
    made.add_tokens([AddedToken("<think>", normalized=False), AddedToken("日本", normalized=False)])
    return made


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "unigram"])
def test_the_bytes_of_a_text_are_those_of_its_tokens(kind, tmp_path):
    made = {"byte-level": lambda: bytewise(tmp_path), "byte fallback": sentencepiece_bpe, "unigram": unigram}[kind]()
    tokenizer = saved(tmp_path, made, "</s>")
    size = tokenizer.vocab_size + 3
    found = tokenizer.token_bytes(size)
    assert len(found) == size and found[-3:] == [None] * 3 and found[tokenizer.eos_token_id] is None
    before = tokenizer.encode("dog", add_special_tokens=False)
    texts = TEXTS if kind != "unigram" else ["dogs sleep", " a1é東 .", "a"]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        own = b"".join(found[token] or b"" for token in ids)
        assert tokenizer.decode([*before, *ids]) == tokenizer.decode(before) + own.decode()
    if kind == "byte-level":
        assert len({text for text in found if text is not None and len(text) == 1}) == 256
        assert "日本".encode() in found


def test_as_the_shipped_models_have_them():
    """Every token of the shipped language model, after one that shows."""
    tokenizer = load_tokenizer(Path(stars.__file__).parent / "demo_models" / "lm")
    found = tokenizer.token_bytes(tokenizer.vocab_size)
    [anchor] = [index for index, text in enumerate(found) if text == b"a"][:1]
    for index, text in enumerate(found):
        shown = tokenizer.decode([anchor, index])
        assert shown == "a" + (text or b"").decode(errors="replace"), index


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.CTC(), None,
                                     decoders.Sequence([decoders.Replace("a", "b"), decoders.BPEDecoder()])])
def test_texts_that_depend_on_neighbours_are_refused(decoder, tmp_path):
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}))
    if decoder is not None:
        made.decoder = decoder
    with pytest.raises(TokenizerError, match="depends? on their neighbours") as caught:
        saved(tmp_path, made).token_bytes(3)
    one_sentence(str(caught.value))


def test_what_is_decoded_otherwise_is_refused(tmp_path):
    """A decoder of known steps that take letters off."""
    made = Tokenizer(models.BPE({"a": 0, "bx": 1, "c": 2}, []))
    made.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip("x", 0, 1)])
    with pytest.raises(TokenizerError, match="decodes token 1 to something else") as caught:
        saved(tmp_path, made).token_bytes(3)
    one_sentence(str(caught.value))
