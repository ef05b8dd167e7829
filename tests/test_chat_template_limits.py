"""Chat templates that loop or grow are stopped, those of large models are not, and all render as in transformers."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
import time

import pytest

from stars.errors import RequestError, TokenizerError
from stars.model import template_limits
from stars.model.chat_template import ChatTemplate
from stars.prompt import parse_prompt
from test_bad_input import one_sentence

MESSAGES = [{"role": "user", "content": "hello there"}]
NESTED = ("{{% set ns = namespace(x=['lol'], y=['lol']) %}}{{% for i in range(60) %}}{{% set ns.x = [ns.x, ns.x] %}}"
          "{{% set ns.y = [ns.y, ns.y] %}}{{% endfor %}}{}")
DOUBLED = "{{% set ns = namespace(s='ab') %}}{{% for i in range(60) %}}{}{{% endfor %}}"

BIG = (1 << 61) - 1  # integers that differ by it have one hash

LOOPS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n > 0 %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "loop within": "{% for x in [1,1] recursive %}{% if loop.depth < 60 %}{{ loop([1,1]) }}{% endif %}{% endfor %}",
    "block": "{% block b scoped %}{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"
             "{% endblock %}",
    "long body": "{% for i in range(99999) %}{% for j in range(99) %}" + "{% set x = 1 %}" * 5000 + "{% endfor %}"
                 "{% endfor %}",
    "long list": "{% for i in range(99999) %}{% for j in range(99) %}{% set x = [" + "1," * 20000 + "] %}{% endfor %}"
                 "{% endfor %}",
    "select": "{% for i in range(99999) %}{{ range(99999)|select('odd')|list|length }}{% endfor %}",
    "in": "{% set t = 'a'*10000000 %}{% for i in range(99999) %}{{ 'b' in t }}{% endfor %}",
    "count": "{% set t = 'a'*10000000 %}{% for i in range(99999) %}{{ t.count('b') }}{% endfor %}",
    "slices": "{% set t = 'a'*10000000 %}{% for i in range(99999) %}{% set x = t[1:] %}{% endfor %}",
    "colliding": f"{{% set x = range(0, 9999 * {BIG}, {BIG}) | unique | list %}}",
    "colliding keys": f"{{% set x = {{}}.fromkeys(range(0, 9999 * {BIG}, {BIG})) %}}",
    "colliding pairs": f"{{% set x = dict(range(0, 9999 * {BIG}, {BIG}) | batch(2)) %}}",
    "data": "{% for i in range(99999) %}" + "x" * 10000 + "{% endfor %}",
}
GROWTH = {
    "tilde": DOUBLED.format("{% set ns.s = ns.s ~ ns.s %}"),
    "plus": DOUBLED.format("{% set ns.s = ns.s + ns.s %}"),
    "times": DOUBLED.format("{% set ns.s = ns.s * 2 %}"),
    "join": DOUBLED.format("{% set ns.s = [ns.s, ns.s]|join %}"),
    "format": DOUBLED.format("{% set ns.s = '{0}{0}'.format(ns.s) %}"),
    "percent": DOUBLED.format("{% set ns.s = '%s%s' % (ns.s, ns.s) %}"),
    "replace": DOUBLED.format("{% set ns.s = ns.s.replace('a', 'aa') %}"),
    "set block": DOUBLED.format("{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}"),
    "lists": DOUBLED.format("{% set ns.s = [ns.s]|list + [ns.s] * 1000000 %}"),
    "integers": DOUBLED.replace("'ab'", "7").format("{% set ns.s = ns.s * ns.s %}"),
    "escapes": "{% autoescape true %}" + DOUBLED.format("{% set ns.s = (ns.s ~ '<' ~ ns.s)|e|string %}")
               + "{% endautoescape %}",
    "constant": "{{ 'a' * 10000000000 }}", "constant list": "{% set x = [1] * 10000000000 %}",
    "power": "{% set x = 7 ** 100000000 %}",
    "width of %": "{{ '%1000000000d' % 5 }}", "precision of %": "{{ '%.1000000000f' % 5 }}",
    "argument of %": "{{ '%*d' % (1000000000, 5) }}", "name of %": "{{ '%(a(b)c)1000000000d' % {'a(b)c': 5} }}",
    "fields of %": "{{ ('%(a)s' * 100000) % {'a': 'x' * 100000} }}", "markup %": "{{ ('%1000000000d'|safe) % 5 }}",
    "width of format": "{{ '{:1000000000}'.format('x') }}", "given width": "{{ '{:{}}'.format('x', 1000000000) }}",
    "format_map": "{{ '{x:>1000000000}'.format_map({'x': 1}) }}", "format filter": "{{ '%1000000000s'|format('x') }}",
    "attr": "{{ ('{:1000000000}'|attr('format'))('x') }}", "markup": "{{ ('{:1000000000}'|safe).format('x') }}",
    "center": "{{ 'x'.center(1000000000) }}", "center filter": "{{ 'x'|center(1000000000) }}",
    "mapped center": "{{ ['x']|map('center', 1000000000)|list }}", "ljust": "{{ 'x'.ljust(1000000000) }}",
    "zfill": "{{ 'x'.zfill(1000000000) }}", "expandtabs": "{{ ('\t'*4000).expandtabs(1000000) }}",
    "indent": "{{ ('a\n'*100000)|indent(4000) }}", "indent text": "{{ ('a\n'*100000)|indent('x'*10000) }}",
    "replace filter": "{{ ('a'*100000)|replace('a', 'b'*100000) }}",
    "replace nothing": "{{ ('a'*100000).replace('', 'b'*100000) }}",
    "join filter": "{{ range(99999)|join('x'*100000) }}", "join method": "{{ ('x'*100000).join('a'*100000) }}",
    "translate": "{{ ('a'*100000).translate({97: 'b'*100000}) }}", "round": "{{ 1.5|round(1000000000) }}",
    "batch": "{{ [1]|batch(1000000000, 0)|list|length }}", "slice": "{{ [1]|slice(1000000000)|list|length }}",
    "tojson indent": "{{ [[1]]|tojson(indent=1000000000) }}", "bytes": "{{ (5).to_bytes(1000000000, 'big') }}",
    "sum of lists": "{{ ([range(1000)|list]*3000)|sum(start=[])|length }}",
    "wordwrap": "{{ ('a '*1000000)|wordwrap(1) }}", "striptags": "{{ ('<'*3000000)|striptags }}",
    "split": "{% set x = ('a '*60000000).split() %}", "list of a text": "{% set x = ('a'*60000000)|list %}",
    "lipsum": "{{ lipsum(1000000) }}",
    "rfind": "{{ ('a'*400000).rfind('ab' ~ 'a'*200000) }}", "rsplit": "{{ ('a'*400000).rsplit('ab' ~ 'a'*200000) }}",
    "rpartition": "{{ ('a'*400000).rpartition('ab' ~ 'a'*200000) }}",
    "rindex": "{{ ('a'*400000).rindex('ab' ~ 'a'*200000) }}", "strip": "{{ ('a'*1000000).strip('b'*500000 ~ 'a') }}",
    "rstrip": "{{ ('a'*1000000).rstrip('b'*500000 ~ 'a') }}", "trim": "{{ ('a'*1000000)|trim('b'*500000 ~ 'a') }}",
    "punycode": "{{ ('a'*4000).encode('punycode') }}", "punycode by name": "{{ 'a'.encode(encoding='Punycode') }}",
    "date": "{{ strftime_now('%250d'*1000000) }}", "title": "{{ ('aa-'*4000000)|title }}",
    "words": "{{ ('aa '*4000000)|wordcount }}",
    "nested text": NESTED.format("{{ ns.x }}"), "nested JSON": NESTED.format("{{ ns.x|tojson }}"),
    "nested tilde": NESTED.format("{{ ns.x ~ '' }}"), "nested %": NESTED.format("{{ '%s' % (ns.x,) }}"),
    "nested equality": NESTED.format("{{ ns.x == ns.y }}"), "nested trim": NESTED.format("{{ ns.x|trim }}"),
    "nested test": NESTED.format("{{ ns.x is eq(ns.y) }}"),
    "nested error": NESTED.format("{{ raise_exception(ns.x) }}"),
    "nested key": NESTED.replace("[ns.x, ns.x]", "(ns.x, ns.x)").format("{{ {ns.x: 1} }}"),
    "nested lookup": NESTED.replace("[ns.x, ns.x]", "(ns.x, ns.x)").format("{{ {}[ns.x] }}"),
    "nested namespace": NESTED.replace("[ns.x, ns.x]", "namespace(a=ns.x, b=ns.x)").format("{{ ns.x }}"),
    "itself": "{% set ns = namespace(x=1) %}{% set ns.x = ns %}{{ ns }}",
}
DEEP = {
    "brackets": "{{ " + "(" * 100000 + "1" + ")" * 100000 + " }}", "lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000, "sum": "{{ 1" + "+1" * 5000 + " }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "own block": "{% block b %}{{ self.b() }}{% endblock %}",
    "own loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "long": "{#" * 1000000,
    "digits": "{{ " + "9" * 10000 + " }}", "open": "{{", "import": "{% import 'x' as y %}",
}


@pytest.fixture()
def small(monkeypatch):
    """A twentieth of the steps and characters: the limits hold at any size, and the tests are sooner done."""
    monkeypatch.setattr(template_limits, "MAX_STEPS", template_limits.MAX_STEPS // 20)
    monkeypatch.setattr(template_limits, "MAX_TEXT", template_limits.MAX_TEXT // 20)


def refused(source: str) -> str:
    begin = time.monotonic()
    with pytest.raises(TokenizerError) as caught:
        ChatTemplate(source, "here").render(MESSAGES)
    assert time.monotonic() - begin < 20  # a busy machine's; a second otherwise
    one_sentence(str(caught.value))
    assert len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize("name", LOOPS)
def test_templates_that_run_on(name, small):
    what = "characters" if name in ("in", "count", "slices", "data") else "steps"
    assert f" {what})" in refused(LOOPS[name])


@pytest.mark.parametrize("name", GROWTH)
def test_templates_that_grow(name, small):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refused(GROWTH[name])
    assert any(part in message for part in (
        "it goes through more than", "it asks for a width of more than 4096", "bits", "whose names hold brackets",
        "otherwise than in utf-8", "a date of more than", "'lipsum' is undefined", "steps"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


@pytest.mark.parametrize("name", DEEP)
def test_templates_that_are_deep_or_long(name):
    refused(DEEP[name])


def test_at_the_full_limits_memory_stays_bounded():
    """A process of its own with 2 GiB of address space: the texts made are 128 million characters at most."""
    script = ("import resource, sys\nresource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
              "from stars.model.chat_template import ChatTemplate\nfrom stars.errors import TokenizerError\n"
              "for source in sys.stdin.read().split('\\0'):\n"
              "    try: ChatTemplate(source, 'here').render([])\n"
              "    except TokenizerError as error: print('MemoryError' in repr(error.__cause__))\n")
    sources = [GROWTH[name] for name in ("tilde", "times", "set block", "constant", "join method", "split", "lists")]
    done = subprocess.run([sys.executable, "-c", script], input="\0".join(sources), capture_output=True, text=True,
                          timeout=120)
    assert done.stdout.split() == ["False"] * len(sources), done.stderr[-500:]


def test_limits_hold_in_any_thread_and_for_each_rendering_apart(small):
    """No signal, no timer; what one rendering used is not counted against the next."""
    long = ChatTemplate(LOOPS["loops"], "here")
    short = ChatTemplate("{% for i in range(60000) %}{% endfor %}{{ messages[0].content }}", "here")
    results = []

    def work():
        for _ in range(12):  # together more steps than one may take
            results.append(short.render(MESSAGES))
        with pytest.raises(TokenizerError, match="more than 500000 steps"):
            long.render(MESSAGES)
        results.append("stopped")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["hello there"] * 36 + ["stopped"] * 3


# -- what templates of models in use do -------------------------------------------------------------------------------

QWEN_LIKE = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not
          (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n'
                + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

MACROS = """{%- macro kind(spec, depth=0) -%}
{%- if spec.type == 'array' -%}{{ kind(spec['items'], depth + 1) }}[]
{%- elif spec.type is iterable and spec.type is not string -%}{{ spec.type | join(' | ') }}
{%- elif spec.type == 'object' -%}{ {%- for name, part in spec.properties.items() -%}
{{ name }}{{ '' if name in (spec.required or []) else '?' }}: {{ kind(part, depth + 1) }}{{ ', ' if not loop.last }}
{%- endfor -%} }{%- else -%}{{ spec.type }}{%- if spec.enum %} {{ spec['enum']|map('tojson')|join('|') }}{%- endif -%}
{%- endif -%}{%- endmacro -%}
{%- for tool in tools or [] %}type {{ tool.function.name | upper }} = {{ kind(tool.function.parameters) }};
{{ tool.function | tojson(indent=2) | indent(4) }}
{% endfor -%}
{{ strftime_now('%Y') | length }}{% set total = namespace(n=0, roles=[]) %}
{%- for message in messages | selectattr('role', 'in', ['user', 'assistant']) | list -%}
{%- set total.n = total.n + message.content | length %}{%- set total.roles = total.roles + [message.role] -%}
{% if loop.changed(message.role) %}[{{ loop.index }}/{{ loop.length }}] {% endif -%}
{{ message.content | replace('\\n', ' ') | trim | truncate(20) | capitalize }}{{ loop.cycle(';', ',') -}}
{%- endfor %} {{ total.n }} {{ total.roles | unique | sort | join('+') }} {{ '%05.1f|%-6s|' % (2.5, 'ab') }}
{{- '{:>6}|{x!r}'.format('q', x=1) }} {{ messages[-1].content.split() | first | default('none', true) }}
{%- call(part) wrap() %}<{{ part }}>{% endcall %}{% filter upper %}end
{{ messages | map(attribute='role') | groupby('0') | length }}{% endfilter %}{% set text %}a{{ 1 }}{% endset -%}
{{ text * 3 }} {{ [3, 1, 2] | sort(reverse=true) | max }}
{{- dict(a=1, b=[1, 2]) | tojson }} {{ (7 // 2) ** 2 % 5 }} {{ -3 | abs }} {{ [1, 2, 3][::-1] }} {{ 'xyz'[1:] ~ none }}
{{- undefined_thing }} {{ {'k': 1}.items() | list }} {{ 'a-b'.title() }} {{ 'a,b' .split(',', 1) }} {{ 2.0 | int }}"""
MACROS = "{% macro wrap() %}{{ caller('in') }}{% endmacro %}" + MACROS

TOOLS = [{"type": "function", "function": {"name": "find", "description": "Finds “it”", "parameters": {
    "type": "object", "required": ["what"], "properties": {
        "what": {"type": "string", "enum": ["a", "ü"]}, "where": {"type": "array", "items": {"type": "integer"}},
        "how": {"type": ["string", "null"]}}}}}]


def conversation(count: int, characters: int) -> list[dict]:
    """`count` messages of `characters` characters, with thoughts, tool calls and their answers among them."""
    text = ("The quick brown fox jumps over the lazy dog.\n " * (characters // 45 + 1))[:characters]
    messages = [{"role": "system", "content": text}]
    while len(messages) < count:
        messages += [{"role": "user", "content": text},
                     {"role": "assistant", "content": "<think>\nso</think>\n\n" + text,
                      "tool_calls": [{"function": {"name": "find", "arguments": {"what": "a", "where": [1, 2]}}}]},
                     {"role": "tool", "content": text}, {"role": "assistant", "content": text}]
    return messages[:count]


@pytest.mark.parametrize("source", [QWEN_LIKE, MACROS], ids=["qwen", "macros"])
def test_templates_render_as_in_transformers(source):
    from transformers.utils.chat_template_utils import render_jinja_template

    for count in (1, 2, 3, 4, 5, 9, 30):
        messages = conversation(count, 90)
        for tools in (None, TOOLS):
            given = {"tools": tools, "documents": None, "bos_token": "<s>"}
            expected = render_jinja_template([messages], chat_template=source, add_generation_prompt=True, **given)
            ours = ChatTemplate(source, "here").render(messages, add_generation_prompt=True, **given)
            assert ours == expected[0][0]


@pytest.mark.parametrize("source", [QWEN_LIKE, MACROS], ids=["qwen", "macros"])
def test_long_conversations_render(source, monkeypatch):
    """1,000 messages of 1,000 characters, within a fifth of the limits."""
    monkeypatch.setattr(template_limits, "MAX_STEPS", template_limits.MAX_STEPS // 5)
    monkeypatch.setattr(template_limits, "MAX_TEXT", template_limits.MAX_TEXT // 5)
    messages = conversation(1000, 1000)
    text = ChatTemplate(source, "here").render(messages, add_generation_prompt=True, tools=TOOLS)
    assert len(text) > (900_000 if source is QWEN_LIKE else 9_000)


def test_every_message_against_every_other_renders(monkeypatch):
    """A loop over 200 messages within one over them, at a 25th of the steps: what their number is for."""
    monkeypatch.setattr(template_limits, "MAX_STEPS", template_limits.MAX_STEPS // 25)
    source = ("{% for m in messages %}{% set ns = namespace(later=0) %}{% for n in messages %}{% if n.role == 'user' %}"
              "{% set ns.later = loop.index0 %}{% endif %}{% endfor %}{{ ns.later }} {% endfor %}")
    assert ChatTemplate(source, "here").render(conversation(200, 10)).split() == ["197"] * 200


GATHERED = ("{% set ns = namespace(out='') %}{% for m in messages %}"
            "{% set ns.out = ns.out + '<|' + m.role + '|>' + m.content %}{% endfor %}{{ ns.out }}")


def test_a_text_put_together_message_by_message_renders():
    """It is copied four times for each of 1,000 messages of 1,000 characters, two thousand million in all, of which
    two million are held at a time."""
    messages = [{"role": "user", "content": "x" * 1000}] * 1000
    assert ChatTemplate(GATHERED, "here").render(messages) == ("<|user|>" + "x" * 1000) * 1000


@pytest.mark.parametrize("kept", ["{% set ns.all = ns.all + [ns.s + 'b'] %}", "{% set ns.all = [ns.all, ns.s + 'b'] %}",
                                  "{{ ns.s + 'b' }}", "{% set ns.all = {1: ns.all, 2: (ns.s + 'b',)} %}"])
def test_sums_that_are_held_count(kept, small):
    source = "{% set ns = namespace(s='a' * 100000, all=[]) %}{% for i in range(9999) %}" + kept + "{% endfor %}"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert " characters)" in refused(source)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB, of 6.7 million characters


def test_sums_that_are_not_held_end_too(small, monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SUMMED", template_limits.MAX_SUMMED // 20)
    source = "{% set t = 'a' * 1000000 %}{% for i in range(9999) %}{% set x = t + 'b' %}{% endfor %}"
    begin = time.monotonic()
    assert " characters)" in refused(source)
    assert time.monotonic() - begin < 5


def test_every_message_against_a_long_last_one_renders():
    """400 turns and a document of 400,000 characters, of which a comparison reads little or nothing."""
    source = ("{% set users = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
              "{% if m == users[-1] %}{{ loop.index }}{% endif %}{% if m in users[-1:] %}!{% endif %}{% endfor %}")
    turns = [{"role": role, "content": "y" * 50} for _ in range(400) for role in ("user", "assistant")]
    assert ChatTemplate(source, "here").render([*turns, {"role": "user", "content": "d" * 400_000}]) == "801!"


def test_long_templates_are_refused_before_they_are_compiled():
    assert len(ChatTemplate("x" * 200_000, "here").render(MESSAGES)) == 200_000
    begin = time.monotonic()
    assert "it has more than 200000 characters" in refused("{{ 1 }}" * 28_572)
    assert time.monotonic() - begin < 5


def test_messages_that_are_too_deep_are_refused():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(TokenizerError, match="must be plain JSON values"):
        ChatTemplate("{{ messages }}", "here").render([{"role": "user", "content": deep}])
    while deep:  # from the outside in, as the interpreter would free it recursively
        deep = deep[0]
    assert json.loads(ChatTemplate("{{ messages | tojson }}", "here").render(MESSAGES)) == MESSAGES


# -- contents that are lists of parts -------------------------------------------------------------------------------

PARTS = [{"role": "user", "content": [{"type": "text", "text": "one"}, "two", {"text": "three"}]}]
WITH_LOOP = [
    "{% for m in messages %}{% for c in m.content %}<{{ c if c is string else c.text }}>{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for c in m['content'] %}<{{ c if c is string else c.text }}>{% endfor %}{% endfor %}",
    "{% set x = messages[0]['content'] %}{% for c in x | list %}<{{ c if c is string else c.text }}>{% endfor %}",
    "{% macro f(content) %}{% for c in content %}<{{ c if c is string else c.text }}>{% endfor %}{% endmacro %}"
    "{{ f(messages[0].content) }}",
]


@pytest.mark.parametrize("source", WITH_LOOP)
def test_a_template_that_goes_through_parts_gets_them(source):
    assert ChatTemplate(source, "here").render(PARTS) == "<one><two><three>"


@pytest.mark.parametrize("source", [
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{% endfor %}",
    "{% for m in messages %}{{ m.role }}: {% for line in m.content.split('|') %}{{ line }}{% endfor %}{% endfor %}",
])
def test_other_templates_get_the_text_of_parts(source):
    template = ChatTemplate(source, "here")
    assert template.render(PARTS) == "user: one\ntwo\nthree" == template.render([{"role": "user", "content":
                                                                                "one\ntwo\nthree"}])
    assert PARTS[0]["content"][1] == "two"
    with pytest.raises(TokenizerError) as caught:
        template.render([*PARTS, {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}])
    one_sentence(str(caught.value))
    assert str(caught.value).startswith("messages[1] has a part that is no text, and the chat template of here takes ")


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": None},
                                     {"role": "assistant", "reasoning": "so"}])
def test_a_message_without_content_is_refused(message):
    with pytest.raises(RequestError, match=r'messages\[1\] has no "content": give its text, or "tool_calls"'):
        parse_prompt({"messages": [*MESSAGES, message]}, None, 5)


def test_ids_may_have_their_text_beside_them():
    assert parse_prompt({"prompt": "x", "prompt_token_ids": [1, 2], "messages": None}, None, 5).token_ids == [1, 2]
