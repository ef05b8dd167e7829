"""Models and tokenizers that transformers has loaded, taken as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

import stars
from stars.errors import TokenizerError
from stars.model.tokenizer import from_transformers, load_tokenizer
from tiny_models import CHAT_TEMPLATE, SENTENCES, write_tokenizer

DEMO = Path(stars.__file__).parent / "demo_models" / "lm"
TEXTS = (*SENTENCES, "", " ", "  two  spaces ", "</s>", "a</s> b<s>", "<|user|>hi", "<think>x</think>", "🙂🇩🇪", "\ufeff")
MESSAGES = [{"role": "user", "content": " Hello. "}, {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "Go on"}]


def assert_same(ours, loaded) -> None:
    """The two tokenizers of ours differ in nothing that is seen of them."""
    assert ours.vocab_size == loaded.vocab_size
    assert ours.same_vocabulary(loaded) and loaded.same_vocabulary(ours)
    for name in ("bos_token", "eos_token", "pad_token", "bos_token_id", "eos_token_id", "special_tokens",
                 "named_tokens", "has_chat_template"):
        assert getattr(ours, name) == getattr(loaded, name), name
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == loaded.encode(text, add_special_tokens=special), text
            assert ours.decode(ids, skip_special_tokens=special) == loaded.decode(ids, skip_special_tokens=special)
    if ours.has_chat_template:
        assert ours.apply_chat_template(MESSAGES) == loaded.apply_chat_template(MESSAGES)


# -- tokenizers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """fast(name): a tokenizer that transformers loads from a directory, and that directory."""
    import transformers

    base = tmp_path_factory.mktemp("tokenizers")
    write_tokenizer(base / "plain")
    write_tokenizer(base / "chat", seed=2, chat_template=CHAT_TEMPLATE)
    places = {"plain": base / "plain", "chat": base / "chat", "demo": DEMO}
    return lambda name: (transformers.AutoTokenizer.from_pretrained(places[name]), places[name])


@pytest.mark.parametrize("name", ["plain", "chat", "demo"])
def test_a_fast_tokenizer_is_what_its_directory_is(fast, name, tmp_path):
    theirs, directory = fast(name)
    ours = from_transformers(theirs)
    assert_same(ours, load_tokenizer(directory))
    theirs.save_pretrained(tmp_path)
    assert_same(ours, load_tokenizer(tmp_path))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)


def test_tokens_that_were_added_in_memory(fast):
    theirs, directory = fast("plain")
    theirs.add_special_tokens({"additional_special_tokens": ["<think>"], "eos_token": "<|user|>"})
    ours = from_transformers(theirs)
    assert ours.encode("<think>", add_special_tokens=False) == [len(theirs) - 1]
    assert ours.vocab_size == len(theirs) == load_tokenizer(directory).vocab_size + 1
    assert ours.eos_token_id == theirs.eos_token_id != load_tokenizer(directory).eos_token_id
    theirs.add_tokens(["later"])
    assert ours.vocab_size == len(theirs) - 1


def test_chat_templates_by_name(fast):
    theirs, _ = fast("chat")
    theirs.chat_template = {"default": "D{{ messages[0]['content'] }}", "tool_use": "T{{ messages[0]['content'] }}"}
    ours = from_transformers(theirs)
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        assert ours.apply_chat_template(MESSAGES[1:2], tools=tools) == theirs.apply_chat_template(
            MESSAGES[1:2], tools=tools, tokenize=False)
    theirs.chat_template = None
    assert not from_transformers(theirs).has_chat_template


def test_what_is_left_of_training_does_not_cut(fast):
    theirs, _ = fast("plain")
    theirs.backend_tokenizer.enable_truncation(2)
    theirs.backend_tokenizer.enable_padding(length=50)
    assert len(from_transformers(theirs).encode(SENTENCES[0])) > 10
    assert theirs.backend_tokenizer.truncation is not None, "the user's tokenizer is the user's"


def test_a_tokenizer_that_cannot_be_taken(fast):
    from transformers import ByT5Tokenizer

    with pytest.raises(TokenizerError, match=r"ByT5Tokenizer, a slow one, it must be a fast tokenizer of"):
        from_transformers(ByT5Tokenizer())
    with pytest.raises(TokenizerError, match=r"tokenizer is str, it must be a fast tokenizer of"):
        from_transformers("somewhere")


def test_errors_name_where_it_is_from_and_no_temporary_directory(fast):
    theirs, directory = fast("plain")
    with pytest.raises(TokenizerError, match=f"{directory} has no chat template"):
        from_transformers(theirs).apply_chat_template(MESSAGES)
