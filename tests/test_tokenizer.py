"""Text to ids and back, chat templates: as transformers does it for the same directory."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stars
from editing import edit_json
from stars.errors import TokenizerError
from stars.model.tokenizer import Tokenizer, load_tokenizer
from tiny_models import CHAT_TEMPLATE, SENTENCES, SPECIAL_TOKENS, write_tokenizer

TEXTS = SENTENCES + (
    "", " ", "\n\n", "  two  spaces ", "</s>", "a</s> b<s>", "<|user|>hi", "\u0000\u200b\ufeff", "e\u0301 \u00e9 ﬁ",
    "🙂🇩🇪👩‍👩‍👧", "x" * 300,
)
DEMO = Path(stars.__file__).parent / "demo_models" / "lm"


def hf(directory: Path):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(directory)


def write_metaspace_tokenizer(directory: Path) -> None:
    """Like Llama 2's: words begin with ▁, bytes for what is unknown, a decoder that drops the first space."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)
    ])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([sentence.replace(" ", "▁") for sentence in SENTENCES[:3]], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # the bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True, "add_eos_token": True, "clean_up_tokenization_spaces": True,
    }))


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("tokenizers")
    write_tokenizer(base / "bytes", chat_template=CHAT_TEMPLATE)
    write_tokenizer(base / "other", seed=2, chat_template=CHAT_TEMPLATE)
    write_metaspace_tokenizer(base / "metaspace")
    return {"bytes": base / "bytes", "other": base / "other", "metaspace": base / "metaspace", "demo": DEMO}


@pytest.fixture
def copy(directories, copied):
    """A copy of the byte-level tokenizer's directory to change."""
    return copied(directories["bytes"])


def assert_same(ours: Tokenizer, theirs, texts=TEXTS) -> None:
    assert (ours.bos_token, ours.bos_token_id) == (theirs.bos_token, theirs.bos_token_id)
    assert (ours.eos_token, ours.eos_token_id) == (theirs.eos_token, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    for text in texts:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), text
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), text


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bytes", "metaspace", "demo"])
def test_parity(name, directories):
    assert_same(load_tokenizer(directories[name]), hf(directories[name]))


def test_parity_on_any_text(directories):
    pairs = [(load_tokenizer(directories[name]), hf(directories[name])) for name in ("bytes", "metaspace")]

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.text(max_size=40))
    def check(text):
        for ours, theirs in pairs:
            assert_same(ours, theirs, [text])

    check()


def test_no_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_bos_is_what_the_post_processor_says(copy):
    """add_bos_token and add_eos_token of the configuration do not enter, with or without a post-processor."""
    edit_json(copy / "tokenizer_config.json", add_bos_token=False, add_eos_token=True)
    assert_same(load_tokenizer(copy), hf(copy))
    assert load_tokenizer(copy).encode("a")[0] == 1
    edit_json(copy / "tokenizer_config.json", add_bos_token=True)
    edit_json(copy / "tokenizer.json", post_processor=None)
    assert_same(load_tokenizer(copy), hf(copy))
    assert load_tokenizer(copy).encode("a")[0] != 1


def test_tokens_that_only_the_configuration_knows(copy):
    edit_json(
        copy / "tokenizer_config.json", eos_token="<|end|>",
        added_tokens_decoder={"321": {"content": "<|tool|>", "special": False, "normalized": False, "lstrip": True},
                              "320": {"content": "<|think|>", "special": True}},
    )
    ours = load_tokenizer(copy)
    assert_same(ours, hf(copy), [*TEXTS, "a <|tool|>b<|think|>c<|end|>", "<|end|>"])
    assert ours.eos_token_id is not None and ours.encode("<|end|>", add_special_tokens=False) == [ours.eos_token_id]


def test_special_tokens_of_an_older_file(copy):
    edit_json(copy / "tokenizer_config.json", bos_token=..., eos_token=...)
    assert load_tokenizer(copy).eos_token_id is None
    edit_json(copy / "special_tokens_map.json", bos_token="<s>",
              eos_token={"content": "<|assistant|>", "lstrip": False})
    assert_same(load_tokenizer(copy), hf(copy))
    assert load_tokenizer(copy).eos_token == "<|assistant|>"


def test_truncation_and_padding_left_in_the_file_do_not_apply(copy):
    before = load_tokenizer(copy).encode(SENTENCES[0])
    edit_json(copy / "tokenizer.json", truncation={"max_length": 3, "strategy": "LongestFirst", "stride": 0,
                                                   "direction": "Right"},
              padding={"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                       "pad_type_id": 0, "pad_token": "<pad>"})
    assert load_tokenizer(copy).encode(SENTENCES[0]) == before


def test_broken_files(copy):
    with pytest.raises(TokenizerError, match="cannot be encoded .*: give valid Unicode"):
        load_tokenizer(copy).encode("\ud800")
    (copy / "tokenizer_config.json").write_text("[")
    with pytest.raises(TokenizerError, match="tokenizer_config.json cannot be read as JSON"):
        load_tokenizer(copy)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="tokenizer.json cannot be read as a tokenizer"):
        load_tokenizer(copy)


def test_decoding_a_whole_response_keeps_spaces(directories):
    """Each longer decode begins with the shorter one, while single tokens lose their leading space."""
    tokenizer = load_tokenizer(directories["metaspace"])
    ids = tokenizer.encode(SENTENCES[1], add_special_tokens=False)
    assert "".join(tokenizer.decode([token]) for token in ids) != SENTENCES[1]
    texts = [tokenizer.decode(ids[:count]) for count in range(1, len(ids) + 1)]
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(texts))
    assert texts[-1] == SENTENCES[1]


def test_same_vocabulary(directories, copy):
    tokenizer, other = load_tokenizer(directories["bytes"]), load_tokenizer(directories["other"])
    assert tokenizer.same_vocabulary(tokenizer)
    assert not tokenizer.same_vocabulary(other) and not other.same_vocabulary(tokenizer)
    assert not tokenizer.same_vocabulary(load_tokenizer(directories["metaspace"]))
    state = json.loads((copy / "tokenizer.json").read_text())
    # the same content written otherwise: merges as text, another post-processor, a template, padding
    state["model"]["merges"] = [" ".join(merge) for merge in state["model"]["merges"]]
    edit_json(copy / "tokenizer.json", model=state["model"], post_processor=None)
    (copy / "chat_template.jinja").write_text("x")
    again = load_tokenizer(copy)
    assert tokenizer.same_vocabulary(again) and again.same_vocabulary(tokenizer)
    # a pad token that the reward model has on top: ids of the language model still mean the same to it
    edit_json(copy / "tokenizer_config.json", pad_token="[PAD]")
    padded = load_tokenizer(copy)
    assert tokenizer.same_vocabulary(padded) and not padded.same_vocabulary(tokenizer)
    # one merge less splits text differently
    edit_json(copy / "tokenizer.json", model={**state["model"], "merges": state["model"]["merges"][:-1]})
    assert not tokenizer.same_vocabulary(load_tokenizer(copy))
    edit_json(copy / "tokenizer.json", model=state["model"], normalizer={"type": "Lowercase"})
    assert not tokenizer.same_vocabulary(load_tokenizer(copy))
    # two ids exchanged
    model = json.loads(json.dumps(state["model"]))
    model["vocab"]["a"], model["vocab"]["b"] = model["vocab"]["b"], model["vocab"]["a"]
    edit_json(copy / "tokenizer.json", model=model, normalizer=None)
    assert not tokenizer.same_vocabulary(load_tokenizer(copy))


# -- chat -------------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": ' Is 1 < 2 & "so"? '}
MESSAGES = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Yes é."}, USER]

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.tool_calls is defined %}{{- message.tool_calls | length }}{%- endif %}
    {%- if message.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for message in messages %}\n    {% if message.role == 'assistant' %}\n"
    "A:{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}\n    {% else %}\n"
    "{{ message.role }}:{{ message.content }}\n    {% endif %}\n{% endfor %}\n"
)


def with_template(directory: Path, template) -> Tokenizer:
    (directory / "chat_template.jinja").write_text(template)
    return load_tokenizer(directory)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, LLAMA3, QWEN3, MARKED])
@pytest.mark.parametrize("generate", [True, False])
def test_templates_render_as_in_transformers(template, generate, copy):
    ours = with_template(copy, template)
    theirs = hf(copy)
    tools = [{"type": "function", "function": {"name": "f", "description": "<größer & kleiner>"}}]
    for messages, options in ((MESSAGES, {}), ([USER], {}), (MESSAGES, {"tools": tools, "enable_thinking": False})):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate, **options)
        assert ours.apply_chat_template(messages, add_generation_prompt=generate, **options) == expected
    # A field of None is one that is not there, as in transformers 5.24; 5.20 gives templates the None.
    with_none = [{**USER, "tool_calls": None}]
    expected = theirs.apply_chat_template([USER], tokenize=False, add_generation_prompt=generate)
    assert ours.apply_chat_template(with_none, add_generation_prompt=generate) == expected


def test_where_templates_come_from(copy):
    (copy / "chat_template.jinja").unlink()
    assert not load_tokenizer(copy).has_chat_template
    with pytest.raises(TokenizerError, match="has no chat template: add chat_template.jinja, or give text"):
        load_tokenizer(copy).apply_chat_template([USER])
    edit_json(copy / "tokenizer_config.json", chat_template="one")
    assert load_tokenizer(copy).apply_chat_template([USER]) == "one"
    named = [{"name": "default", "template": "two"}, {"name": "tool_use", "template": "three"}]
    edit_json(copy / "tokenizer_config.json", chat_template=named)
    assert load_tokenizer(copy).apply_chat_template([USER]) == "two"
    assert load_tokenizer(copy).apply_chat_template([USER], tools=[{}]) == "three"
    edit_json(copy / "tokenizer_config.json", chat_template=[{"name": "rag", "template": "x"}])
    with pytest.raises(TokenizerError, match="has chat templates named rag and none named default"):
        load_tokenizer(copy).apply_chat_template([USER])
    edit_json(copy / "tokenizer_config.json", chat_template=[1])
    with pytest.raises(TokenizerError, match="neither text nor a list"):
        load_tokenizer(copy)
    edit_json(copy / "tokenizer_config.json", chat_template=named)
    assert with_template(copy, "four {{ bos_token }}{{ eos_token }}").apply_chat_template([USER]) == "four <s></s>"


@pytest.mark.parametrize(("template", "prefix", "closing"), [
    (CHAT_TEMPLATE, "<s><|user|>hi</s>\n<|assistant|>", "</s>\n"),
    (LLAMA3, (
        "<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ), "<|eot_id|>"),
    # a finished turn opens otherwise than the generation prompt: what reward models saw in training is the former
    (QWEN3, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>\n"),
    # the space in front belongs to the answer's first token
    (MISTRAL, "<s>[INST] hi [/INST]", "</s>"),
    # no generation prompt at all
    (MARKED, "user:hi\nA:", "</s>"),
])
def test_split_template(template, prefix, closing, copy):
    tokenizer = with_template(copy, template)
    assert tokenizer.split_template([{"role": "user", "content": "hi"}]) == (prefix, closing)


def test_split_with_variables(copy):
    tokenizer = with_template(copy, QWEN3)
    prefix, _ = tokenizer.split_template([USER], tools=[{"name": "f"}])
    assert '{"name": "f"}' in prefix


@pytest.mark.parametrize("template", [
    "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
])
def test_templates_that_do_not_keep_the_answer(template, copy):
    with pytest.raises(TokenizerError, match="does not keep an assistant's text as it is"):
        with_template(copy, template).split_template([USER])


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}{{ messages.__class__.__base__ }}",
    "{{ messages.append({}) }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ '{0.__class__.__name__}'.format(1) }}",
    "{{ (messages | attr('__class__')).__name__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns }}",
    "{{ namespace(__class__=1) }}",
    "{% for i in range(10000000) %}{% endfor %}",
    "{% include '/etc/passwd' %}",
])
def test_malicious_templates(template, copy):
    with pytest.raises(TokenizerError, match="does not render these messages"):
        with_template(copy, template).apply_chat_template([USER])


def test_templates_that_refuse_or_break(copy):
    messages = [USER, USER]
    with pytest.raises(TokenizerError, match="does not render these messages .Conversation roles must alternate"):
        with_template(copy, MISTRAL).apply_chat_template(messages)
    with pytest.raises(TokenizerError, match=r"the chat template of .* is not valid .*: repair it"):
        with_template(copy, "{% for %}").apply_chat_template(messages)
    with pytest.raises(TokenizerError, match="does not render these messages"):
        with_template(copy, "{{ messages[0].nothing.more }}").apply_chat_template(messages)
    with pytest.raises(TokenizerError, match="must be plain JSON values"):
        with_template(copy, "x").apply_chat_template([{"role": "user", "content": object()}])
    with pytest.raises(TokenizerError, match="must be plain JSON values"):
        with_template(copy, "x").apply_chat_template(messages, tools=[print])


def test_dates(copy):
    text = with_template(copy, "{{ strftime_now('%Y') }}").apply_chat_template([USER])
    assert text.isdigit() and len(text) == 4


def test_transformers_is_not_imported():
    code = (
        "import sys, stars.model.loader, stars.model.tokenizer as t; t.load_tokenizer(sys.argv[1]).encode('a'); "
        "sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(DEMO)], check=True)


def test_special_tokens_are_single_ids(directories):
    tokenizer = load_tokenizer(directories["bytes"])
    assert [tokenizer.encode(token, add_special_tokens=False) for token in SPECIAL_TOKENS] == [[i] for i in range(5)]
