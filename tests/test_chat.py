"""Conversations: as transformers renders them, in the reward's reading too, and prompts that are cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import stars
from editing import edit_json
from stars.cli.rows import prompt_of, rows_of_file
from stars.errors import RequestError, TokenizerError
from stars.model.tokenizer import Tokenizer, load_tokenizer
from stars.prompt import after, last_tokens, parse_prompt
from stars.reward.causal import CausalReward
from test_bad_input import one_sentence
from test_text import byte_level_tokenizer, save
from test_tokenizer import LLAMA3, MARKED, MISTRAL, QWEN3, hf
from tiny_models import CHAT_TEMPLATE, write_tokenizer
from toy import ToyModel, toy_engine

VOCAB = 1 << 20
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}")
TEMPLATES = {"tiny": CHAT_TEMPLATE, "llama3": LLAMA3, "qwen3": QWEN3, "marked": MARKED, "mistral": MISTRAL,
             "smollm2": SMOLLM2}
USER, SYSTEM = {"role": "user", "content": " Is 1 < 2? "}, {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<größer & kleiner>"}}]


def turn(content: str) -> dict:
    return {"role": "assistant", "content": content}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chat")
    write_tokenizer(path, chat_template=CHAT_TEMPLATE)
    return path


def with_template(directory: Path, template: str) -> Tokenizer:
    (directory / "chat_template.jinja").write_text(template)
    return load_tokenizer(directory)


# -- as transformers does it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_what_transformers_makes(name, written, copied):
    """apply_chat_template of the same arguments, ids and text; a final message is continued where it ends."""
    directory = copied(written)
    ours = with_template(directory, TEMPLATES[name])
    theirs = hf(directory)
    finals = ["Sure, ", "  Yes", "No.\n\n", "a\nb", "Yes is yes"]
    cases = [([USER], {}), ([USER], {"add_generation_prompt": False}), ([USER, turn("Yes é."), USER], {})]
    cases += [([USER, turn(final)], {"continue_final_message": True}) for final in finals]
    cases += [([USER], {"continue_final_message": True})]
    if name == "qwen3":
        cases += [([SYSTEM, USER], {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}),
                  ([USER, turn("x ")], {"tools": TOOLS, "continue_final_message": True})]
    for messages, options in cases:
        prompt = parse_prompt({"messages": messages, **options}, ours, VOCAB)
        more = {**options, **options.get("chat_template_kwargs", {})}
        more.pop("chat_template_kwargs", None)
        more.setdefault("add_generation_prompt", not options.get("continue_final_message", False))
        expected = theirs.apply_chat_template(messages, tokenize=False, **more)
        assert prompt.text == expected, (messages, options)
        assert prompt.token_ids == theirs(expected, add_special_tokens=False)["input_ids"]


def test_a_final_message_that_is_not_kept(written, copied):
    directory = copied(written)
    given = {"messages": [USER, turn("Sure")], "continue_final_message": True}
    for template in ("{% for m in messages %}{{ m.role }}{% endfor %}", "{{ messages[-1].content | upper }}",
                     "{{ messages[-1].content[-3:] }}"):
        with pytest.raises(TokenizerError, match="does not keep the text of the final message, so that it cannot be"):
            parse_prompt(given, with_template(directory, template), VOCAB)


TOKENIZER_ERRORS = [
    ({"tools": 3}, "tools is 3, it must be a list of JSON schemas"),
    ({"tools": [test_a_final_message_that_is_not_kept]}, r"tools\[0\] is a function: give its JSON schema"),
    ({"tools": [{}, "f"]}, r"tools\[1\] is 'f', it must be a JSON schema"),
    ({"chat_template_kwargs": [1]}, "chat_template_kwargs is .*, it must be a dictionary of the template's variables"),
    ({"chat_template_kwargs": {3: 4}}, "it must be a dictionary of the template's variables"),
    *(({"chat_template_kwargs": {name: "x"}}, f"chat_template_kwargs has '{name}', which is no variable") for name in
      ("messages", "tools", "add_generation_prompt", "continue_final_message", "bos_token", "unk_token", "self")),
    ({"add_generation_prompt": "no"}, "add_generation_prompt is 'no', it must be True or False"),
    ({"continue_final_message": 1}, "continue_final_message is 1, it must be True or False"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "are both True: .* so leave one out"),
    ({"messages": [{"role": "assistant", "tool_calls": []}], "continue_final_message": True},
     "needs a final message whose content is a text, and it is None"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "continue_final_message": True},
     "needs a final message whose content is a text"),
    *(({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]},
       r"messages\[1\] has a tool call whose arguments are .*, which is no JSON object: give one") for arguments in
      ("{", "[1]", "3", " ", "[" * 10**5)),
    ({"special_tokens": "ignore"}, "special_tokens is 'ignore', it must be \"parse\""),
    ({"special_tokens": True}, "special_tokens is True, it must be"),
    ({"special_tokens": np.array(["text", "parse"])}, "special_tokens is array.* it must be"),
    ({"messages": []}, "messages must be a non-empty list"),
    ({"messages": USER}, "messages must be a non-empty list"),
    ({"image": 1}, 'does not take "image"'),
]


@pytest.mark.parametrize(("given", "expected"), TOKENIZER_ERRORS)
def test_bad_conversations(given, expected, written):
    with pytest.raises(RequestError, match=expected) as caught:
        parse_prompt({"messages": [USER], **given}, load_tokenizer(written), VOCAB)
    one_sentence(str(caught.value))


@pytest.mark.parametrize(("given", "expected"), [
    ({"prompt": "a", "tools": TOOLS}, 'a prompt dictionary with "prompt" does not take "tools"'),
    ({"prompt_token_ids": [1], "special_tokens": "text"}, '"prompt_token_ids" does not take "special_tokens"'),
    ({"prompt_token_ids": [1], "add_generation_prompt": True}, 'does not take "add_generation_prompt"'),
])
def test_keys_that_belong_to_messages(given, expected, written):
    with pytest.raises(RequestError, match=expected) as caught:
        parse_prompt(given, load_tokenizer(written), VOCAB)
    one_sentence(str(caught.value))
    absent = {key: None for key in ("tools", "special_tokens", "chat_template_kwargs")}
    assert parse_prompt({"prompt_token_ids": [1], **absent}, load_tokenizer(written), VOCAB).token_ids == [1]


CALLS = ("{% for message in messages %}<s>{% if message.tool_calls is defined %}{% for call in message.tool_calls %}"
         "{{ call.function.arguments | tojson }}{% endfor %}{% else %}{{ message.content }}{% endif %}{% endfor %}")


@pytest.mark.parametrize("special_tokens", ["parse", "text"])
@pytest.mark.parametrize(("arguments", "expected"), [
    ({"arguments": '{"city":"Köln", "days": [1, null]}'}, '{"city": "Köln", "days": [1, null]}'),
    ({"arguments": {"city": "Köln"}}, '{"city": "Köln"}'), ({"arguments": [1]}, "[1]"),
    ({"arguments": ""}, "{}"), ({"arguments": None}, "{}"), ({}, "{}"),
])
def test_arguments_of_tool_calls_are_objects_to_a_template(written, copied, arguments, expected, special_tokens):
    """As in vLLM; what the user gave is neither changed nor shown otherwise."""
    tokenizer = with_template(copied(written), CALLS)
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "f", **arguments}}, *[{"function": {"arguments": "{}"}}] * 2]}]
    before = json.dumps(messages)
    prompt = parse_prompt({"messages": messages, "special_tokens": special_tokens}, tokenizer, VOCAB)
    assert prompt.text == f"<s>{USER['content']}<s>{expected}{{}}{{}}"
    assert json.dumps(messages) == before and prompt.asked == messages


def test_no_tool_calls_are_none(written, copied):
    tokenizer = with_template(copied(written), CALLS)
    for calls, expected in (([], "Yes"), (None, "Yes"), ([{"function": {}}], "{}")):
        prompt = parse_prompt({"messages": [{**turn("Yes"), "tool_calls": calls}]}, tokenizer, VOCAB)
        assert prompt.text == f"<s>{expected}"
    user = parse_prompt({"messages": [{**USER, "tool_calls": []}]}, tokenizer, VOCAB)
    assert user.text == "<s>"  # of an assistant's messages alone


def test_an_empty_rendering_says_what_to_do(written, copied):
    with pytest.raises(RequestError, match="to an empty prompt: change the messages to what it expects, or give"):
        parse_prompt({"messages": [USER]}, with_template(copied(written), "{% if false %}a{% endif %}"), VOCAB)


# -- whole engines ----------------------------------------------------------------------------------------------------


def engine_of(tokenizer: Tokenizer, reward=None, **options) -> stars.Engine:
    model = ToyModel(vocab=tokenizer.vocab_size, seed=3, layers=1, eos=(2,), positions=512)
    return toy_engine(model, reward, tokenizer=tokenizer, **options)


PARAMS = stars.SamplingParams(max_tokens=5, seed=1)


def test_chat_is_generate_with_messages(written, copied):
    tokenizer = with_template(copied(written), QWEN3)
    engine = engine_of(tokenizer)
    options = dict(tools=TOOLS, chat_template_kwargs={"enable_thinking": False}, special_tokens="text")
    conversation, other = [USER, turn("</s>"), USER], [SYSTEM, USER]
    outputs = engine.chat([conversation, other], PARAMS, use_tqdm=False, **options)
    expected = engine.generate([{"messages": one, **options} for one in (conversation, other)], PARAMS, use_tqdm=False)
    assert [(one.prompt_token_ids, one.outputs[0].token_ids) for one in outputs] == [
        (one.prompt_token_ids, one.outputs[0].token_ids) for one in expected]
    assert [one.prompt for one in outputs] == [conversation, other]
    [alone] = engine.chat(conversation, PARAMS, use_tqdm=False, **options)
    assert alone.prompt_token_ids == outputs[0].prompt_token_ids and 2 not in alone.prompt_token_ids
    [alone] = engine.chat(conversation, PARAMS, use_tqdm=False)
    assert alone.prompt_token_ids == tokenizer.encode(tokenizer.apply_chat_template(conversation), False)
    [opened] = engine.chat([USER], PARAMS, use_tqdm=False, add_generation_prompt=False)
    assert opened.prompt_token_ids == tokenizer.encode(tokenizer.apply_chat_template([USER], False), False)
    continued = [USER, turn("Sure,")]
    for flags in ({}, {"add_generation_prompt": False}):
        [output] = engine.chat(continued, [PARAMS], use_tqdm=False, continue_final_message=True, **flags)
        assert tokenizer.decode(output.prompt_token_ids).endswith("Sure,")
    for given, message in (
            (dict(messages=continued, continue_final_message=True, add_generation_prompt=True), "are both True"),
            (dict(), "messages must be a non-empty list"), (dict(messages=[]), "messages must be a non-empty list"),
            (dict(messages="hi"), "messages must be a non-empty list"),
            (dict(messages=[[USER], [{"role": "user"}]]), r'prompts\[1\]: messages\[0\] has no "content"'),
            (dict(messages=[USER], chat_template="x"), "no parameter 'chat_template': the template is read from"),
            (dict(messages=[USER], temperature=1), r"give SamplingParams\(temperature=...\)"),
            (dict(messages=[USER], prompt="x"), "chat has no parameter 'prompt'")):
        with pytest.raises(RequestError, match=message) as caught:
            engine.chat(use_tqdm=False, **given)
        one_sentence(str(caught.value))
    with pytest.raises(RequestError, match="generate has no parameter 'tools': give .* or call engine.chat"):
        engine.generate("a", tools=TOOLS)
    assert not engine.has_unfinished_requests()


def read_by(reward, engine: stars.Engine, prompt, params=PARAMS) -> tuple[stars.RequestOutput, list[float]]:
    """What a reward model of ToyModel gives the kept beginnings of a response."""
    policy = stars.STARS(segment_size=2, alpha=1.0, reward_threshold=-1e6, width=1)
    [output] = engine.generate(prompt, params, policy, use_tqdm=False)
    assert output.outputs[0].error is None
    return output, [segment.reward for segment in output.outputs[0].segments]


def kept(output: stars.RequestOutput) -> list[list[int]]:
    """The response after each segment, without EOS."""
    result, ids = [], []
    for segment in output.outputs[0].segments:
        ids = ids + segment.token_ids
        result.append([token for token in ids if token != 2])
    return result


CLOSED = ("{% for m in messages %}<|user|>{{ m.role }} {{ m.content }}<|end|>{% endfor %}"
          "{% if add_generation_prompt %}<|user|>assistant {% endif %}")
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}{{ documents or '' }}{{ mode or '' }}" + CLOSED


@pytest.mark.parametrize(("own", "close"), [(True, "none"), (True, "template"), (False, "none"), (False, "template")])
def test_what_a_reward_model_reads_of_a_conversation(tmp_path, own, close):
    """Its own template, tools and documents of the prompt and variables of its own; final message and response are one
    turn; control tokens of its own are text. By hand."""
    trimming = WITH_TOOLS.replace("m.content", "m.content | trim")
    tokenizer = load_tokenizer(save(byte_level_tokenizer(), tmp_path / "lm", chat_template=trimming))
    if own:
        ids = tokenizer
    else:
        write_tokenizer(tmp_path / "rm", chat_template=WITH_TOOLS.replace("<|user|>", "<s>").replace("<|end|>", "</s>"))
        ids = load_tokenizer(tmp_path / "rm")
    rm = ToyModel(vocab=ids.vocab_size, seed=9, head="reward", eos=(2,), positions=512)
    reward = CausalReward(rm.decoder(), tokenizer=ids, close=close, chat_template_kwargs={"mode": "M"})
    engine = engine_of(tokenizer, reward)
    user, end = ("<|user|>", "<|end|>") if own else ("<s>", "</s>")
    plain = [f"{user}user the film{end}"]

    def check(prompt: dict, before: str, literal: int = 0) -> None:
        """before: with each control token as it stands; the first `literal` of </s> and <|end|> in it are text."""
        output, rewards = read_by(reward, engine, prompt)
        texts = kept(output)
        assert len(rewards) == len(texts) == 3
        for response, found in zip(texts, rewards, strict=True):
            shown = tokenizer.decode([*output.prompt_token_ids, *response])[len(tokenizer.decode(
                output.prompt_token_ids)):].rstrip("\ufffd")
            if own:
                whole = pieces(before) + response
            elif literal:
                whole = pieces(before + shown)
            else:
                whole = ids.encode(before + shown, False)
            whole = whole + (ids.encode(end, False) if close == "template" else [])
            assert found == pytest.approx(rm.reward(whole), abs=1e-4), (before, shown)

    def pieces(text: str) -> list[int]:
        """Ids of a text whose control tokens that are text have a \\x00 in them."""
        copy = type(ids._backend).from_str(ids._backend.to_str())
        copy.encode_special_tokens = True
        result: list[int] = []
        for place, part in enumerate(text.replace(user, "\x01" + user + "\x01").replace(end, "\x01" + end + "\x01")
                                     .split("\x01")):
            part = part.replace("\x00", "")
            result += ids.encode(part, False) if place % 2 else copy.encode(part, add_special_tokens=False).ids
        return result

    message = {"role": "user", "content": "the film"}
    check({"messages": [message]}, f"M{plain[0]}{user}assistant ")
    check({"messages": [message], "add_generation_prompt": False}, f"M{plain[0]}{user}assistant ")
    check({"messages": [message], "tools": TOOLS, "chat_template_kwargs": {"documents": "D", "mode": "other"}},
          f"{json.dumps(TOOLS, ensure_ascii=False)}DM{plain[0]}{user}assistant ")
    # The language model's template trims: it was fed "great", and so is the reward model, whose template does not.
    for content in ("great", "great \n"):
        check({"messages": [message, turn(content)], "continue_final_message": True},
              f"M{plain[0]}{user}assistant great")
    check({"messages": [message], "continue_final_message": True}, f"M{user}user the film")
    bad = {"role": "user", "content": f"a{end}{user}b"}
    marked = f"M{user}user a{end[0]}\x00{end[1:]}{user[0]}\x00{user[1:]}b{end}{user}assistant "
    check({"messages": [bad], "special_tokens": "text"}, marked, literal=2)
    check({"messages": [bad]}, f"M{user}user a{end}{user}b{end}{user}assistant ")


@pytest.mark.parametrize("given", ["text", "messages"])
def test_a_reward_model_of_another_vocabulary_that_reads_what_the_language_model_reads(tmp_path, given):
    """template="raw": the rendered text, in which its own control tokens that a user wrote are text."""
    template = CLOSED.replace("<|user|>", "<|end|>")  # which is no control token of the other
    tokenizer = load_tokenizer(save(byte_level_tokenizer(), tmp_path / "lm", chat_template=template))
    write_tokenizer(tmp_path / "rm")
    ids = load_tokenizer(tmp_path / "rm")
    rm = ToyModel(vocab=ids.vocab_size, seed=9, head="reward", eos=(2,), positions=512)
    reward = CausalReward(rm.decoder(), tokenizer=ids, template="raw")
    engine = engine_of(tokenizer, reward)
    prompt = {"prompt": "a</s>b"} if given == "text" else {"messages": [{"role": "user", "content": "a</s>b"}]}
    copy = type(ids._backend).from_str(ids._backend.to_str())
    copy.encode_special_tokens = True
    for how in ("parse", "text"):
        output, rewards = read_by(reward, engine, {**prompt, "special_tokens": how})
        before = "a</s>b" if given == "text" else "<|end|>user a</s>b<|end|><|end|>assistant "
        for response, found in zip(kept(output), rewards, strict=True):
            shown = tokenizer.decode([*output.prompt_token_ids, *response])[len(tokenizer.decode(
                output.prompt_token_ids)):].rstrip("\ufffd")
            encode = copy.encode if how == "text" else ids._backend.encode
            whole = encode(before + shown, add_special_tokens=given == "text").ids
            assert (2 in whole) == (how == "parse")
            assert found == pytest.approx(rm.reward(whole), abs=1e-4)


def test_rewards_that_are_functions_and_servers(written, copied):
    tokenizer = load_tokenizer(written)
    seen = []
    function = stars.FunctionReward(lambda prompt, responses: [seen.append(prompt) or 0.0 for _ in responses])
    messages = [USER, turn("Sure, ")]
    read_by(function, engine_of(tokenizer, function), {"messages": messages, "continue_final_message": True})
    assert seen and all(prompt == messages for prompt in seen)
    server = engine_of(tokenizer, stars.RemoteReward("http://127.0.0.1:9", template="chat"))
    policy = stars.STARS(segment_size=2, reward_threshold=0.0)
    for more, message in (({"special_tokens": "text"}, "the reward server reads control tokens in a text as tokens"),
                          ({"tools": TOOLS}, "the prompt has tools, and the reward server is sent text alone")):
        with pytest.raises(RequestError, match=message) as caught:
            server.add_request({"messages": [USER], **more}, PARAMS, policy)
        one_sentence(str(caught.value))
    prompt = parse_prompt({"messages": messages, "continue_final_message": True}, tokenizer, VOCAB)
    session = server.reward.open(prompt, 4)
    assert session.messages == [USER] and session.continued["role"] == "assistant"


def test_scores_of_one_conversation_in_two_ways_are_not_mixed_up(written):
    from stars.reward.cached import _prompt_key

    tokenizer = load_tokenizer(written)
    ways = [{}, {"tools": TOOLS}, {"special_tokens": "text"}, {"chat_template_kwargs": {"documents": []}},
            {"add_generation_prompt": False}, {"continue_final_message": True}]
    keys = [_prompt_key(parse_prompt({"messages": [USER], **way}, tokenizer, VOCAB)) for way in ways]
    keys += [_prompt_key(parse_prompt({"prompt": "a", "special_tokens": how}, tokenizer, VOCAB))
             for how in (None, "text")]
    assert len(set(keys)) == len(keys)


def test_an_encoder_reads_control_tokens_as_text(tmp_path):
    from stars.reward.encoder import EncoderReward
    from test_encoder_rewards import write_encoder

    path = write_encoder(tmp_path / "encoder", "Bert")
    reward = EncoderReward(path)
    tokenizer = load_tokenizer(path)
    engine = engine_of(tokenizer, reward)
    engine.check_integrity()
    for how, count in (("parse", 2), ("text", 1)):
        given = {"prompt": "the </s> fox", "special_tokens": how}
        prompt = parse_prompt(given, tokenizer, VOCAB)
        assert engine.reward._read(prompt)[1]["input_ids"].count(2) == count


# -- prompts that are cut ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(written) -> Tokenizer:
    return load_tokenizer(written)


def test_the_last_tokens_of_a_prompt(tokenizer):
    seen = []
    reward = stars.FunctionReward(lambda prompt, responses: [seen.append(prompt) or 0.0 for _ in responses])
    engine = engine_of(tokenizer, reward, max_model_len=64)
    text = "The quick brown fox jumps over the lazy dog"
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id and len(ids) > 8

    def run(prompt, keep, max_tokens=5):
        seen.clear()
        params = stars.SamplingParams(max_tokens=max_tokens, seed=1, truncate_prompt_tokens=keep)
        return read_by(reward, engine, prompt, params)[0]

    output = run(text, 4)
    assert output.prompt_token_ids == ids[-4:] and output.prompt == text
    assert {*seen} == {tokenizer.decode(ids[-4:])}  # x is what the language model was fed
    given = run({"prompt_token_ids": ids[-4:]}, None)
    assert given.outputs[0].token_ids == output.outputs[0].token_ids and given.prompt is None
    assert run({"prompt_token_ids": ids}, 4).prompt is None
    for keep in (len(ids), 60):
        assert run(text, keep).prompt_token_ids == ids and {*seen} == {text}
    assert run(text, -1).prompt_token_ids == ids and {*seen} == {text}
    room = 64 - len(ids) + 3
    assert run(text, -1, room).prompt_token_ids == ids[3:]
    assert run(text * 9, -1, None).prompt_token_ids == tokenizer.encode(text * 9)[-63:]
    messages = [USER, turn("Yes"), USER]
    output = run({"messages": messages}, 6)
    whole = parse_prompt({"messages": messages}, tokenizer, VOCAB)
    assert output.prompt_token_ids == whole.token_ids[-6:] and output.prompt == messages
    assert all(prompt == messages for prompt in seen)  # what renders messages anew reads them whole
    assert last_tokens(whole, 6, tokenizer).text == tokenizer.decode(whole.token_ids[-6:], skip_special_tokens=False)
    again = last_tokens(last_tokens(whole, 6, tokenizer), 3, tokenizer)
    assert again.token_ids == whole.token_ids[-3:] and again.asked == messages
    for keep, message in ((65, "truncate_prompt_tokens is 65 and the limit of prompt and response 64"),
                          (0, "truncate_prompt_tokens is 0, which leaves no prompt")):
        with pytest.raises(RequestError, match=message) as caught:
            run(text, keep)
        one_sentence(str(caught.value))
    with pytest.raises(RequestError, match="max_tokens=64 leaves no token of the prompt"):
        run(text, -1, 64)


def test_a_reward_model_reads_a_cut_text_and_whole_messages(tokenizer, tmp_path):
    rm = ToyModel(vocab=tokenizer.vocab_size, seed=9, head="reward", eos=(2,), positions=512)
    reward = CausalReward(rm.decoder(), tokenizer=tokenizer)
    engine = engine_of(tokenizer, reward)
    params = stars.SamplingParams(max_tokens=5, seed=1, truncate_prompt_tokens=4)
    output, rewards = read_by(reward, engine, "The quick brown fox jumps", params)
    for response, found in zip(kept(output), rewards, strict=True):
        assert found == pytest.approx(rm.reward(output.prompt_token_ids + response), abs=1e-4)
    output, rewards = read_by(reward, engine, {"messages": [USER]}, params)
    before = tokenizer.encode(tokenizer.split_template([USER])[0], False)
    assert len(before) > 4 == len(output.prompt_token_ids)
    for response, found in zip(kept(output), rewards, strict=True):
        assert found == pytest.approx(rm.reward(before + response), abs=1e-4)
    write_tokenizer(tmp_path, seed=2)
    raw = CausalReward(rm.decoder(), tokenizer=load_tokenizer(tmp_path), template="raw")
    engine = engine_of(tokenizer, raw)
    policy = stars.STARS(segment_size=2, reward_threshold=0.0)
    with pytest.raises(RequestError, match="these messages were cut, and the reward model cannot tell"):
        engine.add_request({"messages": [USER], "special_tokens": "text"}, params, policy)


def test_texts_before_cut_prompts(tokenizer):
    """Persona-Judge's texts come before what is left, and -1 leaves room for them."""
    engine = engine_of(tokenizer, max_model_len=64)
    policy = stars.PersonaJudge(draft="Be kind. ", judge="Be very, very short. ", gamma=2)
    text = "The quick brown fox jumps over the lazy dog"
    ids, kind, short = tokenizer.encode(text), *(tokenizer.encode(t, False) for t in (policy.draft, policy.judge))
    params = stars.SamplingParams(max_tokens=4, seed=1, truncate_prompt_tokens=5)
    [output] = engine.generate(text, params, policy, use_tqdm=False)
    assert output.prompt_token_ids == ids[-5:]
    prompt = last_tokens(parse_prompt(text, tokenizer, VOCAB), 5, tokenizer)
    assert after(policy.draft, prompt, tokenizer, VOCAB) == kind + ids[-5:]
    params = stars.SamplingParams(max_tokens=4, seed=1, truncate_prompt_tokens=-1)
    [output] = engine.generate(text * 9, params, policy, use_tqdm=False)
    assert len(output.prompt_token_ids) == 60 - len(short)
    messages = last_tokens(parse_prompt({"messages": [USER]}, tokenizer, VOCAB), 5, tokenizer)
    own = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": "Be kind. "}]), False)
    assert after(policy.draft, messages, tokenizer, VOCAB) == own + messages.token_ids
    literal = parse_prompt({"prompt": "<s>a</s>", "special_tokens": "text"}, tokenizer, VOCAB)
    found = after(policy.draft, literal, tokenizer, VOCAB)
    assert tokenizer.decode(found) == "Be kind. <s>a</s>" and found.count(1) == 1 and 2 not in found
    literal = parse_prompt({"messages": [turn("a</s>")], "special_tokens": "text"}, tokenizer, VOCAB)
    assert after(policy.draft, literal, tokenizer, VOCAB).count(2) == len(own) - len([t for t in own if t != 2]) + 1


# -- the command line -------------------------------------------------------------------------------------------------


def test_rows_of_conversations(tmp_path):
    """A row's keys that belong to its prompt reach the engine; others, and those of another kind, are carried along."""
    rows = [{"messages": [USER], "tools": TOOLS, "chat_template_kwargs": {"a": 1}, "add_generation_prompt": False,
             "continue_final_message": None, "special_tokens": "text", "id": "x", "label": 3},
            {"prompt": "a", "tools": TOOLS, "special_tokens": "text"}, {"prompt": "b", "special_tokens": None}, "c"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = rows_of_file(str(tmp_path / "in.jsonl"), False)
    expected = {key: rows[0][key] for key in ("messages", "tools", "chat_template_kwargs", "add_generation_prompt",
                                              "special_tokens")}
    assert [row.prompt for row in read] == [expected, {"prompt": "a", "special_tokens": "text"}, "b", "c"]
    assert read[0].given == rows[0]
    chat = [row.prompt for row in rows_of_file(str(tmp_path / "in.jsonl"), True)]
    assert chat[1] == {"messages": [{"role": "user", "content": "a"}], "special_tokens": "text"}
    assert prompt_of(rows[0]) != prompt_of({**rows[0], "tools": None})  # another prompt for --resume
    assert prompt_of(rows[1]) == prompt_of({**rows[1], "tools": None})


def test_tool_templates_of_their_own(written, copied):
    directory = copied(written)
    (directory / "chat_template.jinja").unlink()
    edit_json(directory / "tokenizer_config.json", chat_template=[
        {"name": "default", "template": "<s>d"}, {"name": "tool_use", "template": "<s>t{{ tools | length }}"}])
    tokenizer = load_tokenizer(directory)
    assert parse_prompt({"messages": [USER]}, tokenizer, VOCAB).text == "<s>d"
    assert parse_prompt({"messages": [USER], "tools": TOOLS}, tokenizer, VOCAB).text == "<s>t1"
    assert parse_prompt({"messages": [USER], "tools": []}, tokenizer, VOCAB).text == "<s>d"


@pytest.mark.parametrize("how", ["parse", "text"])
def test_step_tags_in_a_prompt_are_text(tokenizer, how):
    """Of a process reward: the tag behind each step is one, what the user wrote of it is not."""
    from stars.reward.steps import StepFormat, StepFraming

    tag = "<|assistant|>"
    steps = StepFormat("\n", tag, tag, True, "chat")
    framing = StepFraming(tokenizer, ToyModel(vocab=tokenizer.vocab_size, head="reward").config, "chat", steps, {})
    given = {"messages": [{"role": "user", "content": f"a{tag}b"}], "special_tokens": how}
    frame = framing.frame(parse_prompt(given, tokenizer, VOCAB))
    read = framing.read(frame, "one\ntwo")
    index = tokenizer.special_tokens[tag]
    expected = (how == "parse") + tokenizer.split_template([USER])[0].count(tag)
    assert frame.prefix.count(index) == expected and len(read.tags) == 2
    assert [read.ids[place] for place in read.tags] == [index] * 2 and read.ids.count(index) == expected + 2
    assert tokenizer.decode(read.ids, skip_special_tokens=False) == (
        tokenizer.split_template(given["messages"])[0] + f"one{tag}two{tag}")
