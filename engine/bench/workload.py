"""What is asked of a server, and when: prompts of a file or made up, and traces."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from stars.arguments import shown
from stars.bench.arrivals import arrival_times
from stars.errors import RequestError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ENDPOINTS = (COMPLETIONS, CHAT)
JSON_FILES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
WORDS = tuple("""time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point home water room
mother area money story fact month lot right study book eye job word business issue side kind head house service friend
father power hour game line end member law car city community name president team minute idea body information back
parent face others level office door health person art war history party result change morning reason research girl
guy moment air teacher force education""".split())
"""What made-up prompts are drawn from: a token each, or little more, in most vocabularies."""


class Entry(NamedTuple):
    """One request of a load."""

    due: float  # seconds from the start
    prompt: Any  # a text, token ids, or a list of messages
    max_tokens: int | None
    fields: Mapping[str, Any] = MappingProxyType({})  # further ones of its body


def poisson(prompts: Sequence[Any], count: int, rate: float, burstiness: float, seed: int,
            max_tokens: int | None) -> list[Entry]:
    """`count` requests at a rate, of `prompts` in their order, from the front again where they are fewer."""
    times = arrival_times(count, rate, burstiness, seed)
    return [Entry(time, prompts[index % len(prompts)], max_tokens) for index, time in enumerate(times)]


def made_up(words: int, count: int, seed: int) -> list[str]:
    """`count` prompts of that many words."""
    draw = np.random.default_rng([seed, words])
    return [" ".join(WORDS[index] for index in draw.integers(len(WORDS), size=words)) for _ in range(count)]


def read_prompts(path: str) -> list[Any]:
    """The prompts of a file: of JSON lines a text each, or an object with "prompt", "messages" or "prompt_token_ids";
    else each line is one. Either may be gzipped. OSError, and RequestError for what is none."""
    if path.endswith(JSON_FILES):
        prompts = [_prompt_of(row, where) for where, row in _rows(path)]
    else:
        prompts = [line.strip() for _, line in _lines(path) if line.strip()]
    if not prompts:
        raise RequestError(f"{path} has no prompts: give a file of them, one a line")
    return prompts


def read_trace(path: str, max_tokens: int | None, seed: int) -> list[Entry]:
    """The requests of a file of JSON lines: objects with "timestamp" in seconds, a prompt as in `read_prompts` or
    "prompt_tokens", for which so many words are made up, and "max_tokens". The first is sent at once."""
    entries: list[Entry] = []
    for where, row in _rows(path):
        if not isinstance(row, dict):
            raise RequestError(f'{where}: give an object with "timestamp" and a prompt')
        time: Any = row.get("timestamp")
        tokens = row.get("max_tokens", max_tokens)
        if not _is_number(time) or not math.isfinite(time):
            raise RequestError(f"{where}: timestamp is {shown(time)}, it must be a number of seconds")
        if tokens is not None and not (_is_integer(tokens) and tokens >= 1):
            raise RequestError(f"{where}: max_tokens is {shown(tokens)}, it must be an integer of 1 or more")
        if "prompt_tokens" in row:
            length = row["prompt_tokens"]
            if not (_is_integer(length) and length >= 1):
                raise RequestError(f"{where}: prompt_tokens is {shown(length)}, it must be an integer of 1 or more")
            [prompt] = made_up(length, 1, seed + len(entries))
        else:
            prompt = _prompt_of(row, where)
        entries.append(Entry(float(time), prompt, tokens))
    if not entries:
        raise RequestError(f"{path} has no requests: give a file of them, one a line")
    entries.sort(key=lambda entry: entry.due)
    return [entry._replace(due=entry.due - entries[0].due) for entry in entries]


def body_of(entry: Entry, endpoint: str, model: str, common: dict[str, Any]) -> bytes:
    """The JSON of a streamed request. RequestError for messages where the endpoint takes none."""
    messages = isinstance(entry.prompt, list) and not all(map(_is_integer, entry.prompt))
    if endpoint.endswith("/chat/completions"):
        if not messages and not isinstance(entry.prompt, str):
            raise RequestError(f"a chat takes no token ids: give texts or messages, or --endpoint {COMPLETIONS}")
        asked = {"messages": entry.prompt if messages else [{"role": "user", "content": entry.prompt}]}
    elif messages:
        raise RequestError(f"messages need --endpoint {CHAT}")
    else:
        asked = {"prompt": entry.prompt}
    limit = {} if entry.max_tokens is None else {"max_tokens": entry.max_tokens}
    body = {"model": model, **asked, **limit, "stream": True, "stream_options": {"include_usage": True},
            **common, **entry.fields}
    return json.dumps(body, ensure_ascii=False).encode("utf8", "surrogatepass")


def _prompt_of(row: Any, where: str) -> Any:
    if isinstance(row, str):
        return row
    for key, kind in (("prompt", str), ("messages", list), ("prompt_token_ids", list)):
        if isinstance(row, dict) and isinstance(row.get(key), kind) and row[key] is not None:
            return row[key]
    raise RequestError(f'{where}: give a text, or an object with "prompt", "messages" or "prompt_token_ids"')


def _rows(path: str) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        if line.strip():
            try:
                yield f"{path}: line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{path}: line {number} is no JSON ({error})") from error


def _lines(path: str) -> Iterator[tuple[int, str]]:
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield from enumerate(file, 1)
    except (EOFError, UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise RequestError(f"{path} cannot be read ({error})") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
