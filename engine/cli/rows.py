"""Rows of prompts in and rows of results out: JSON, one value a line."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from stars.errors import RequestError
from stars.outputs import RequestOutput
from stars.prompt import OTHER_KEYS, PROMPT_KEYS, prompt_kind
from stars.trace import metrics_record
from stars.trace.json_lines import MAX_NESTING, loads, plain, too_deep

RESULT_KEYS = ("index", "outputs", "metrics", "seed", "error")  # of a row that is written; one that is read has no say


@dataclass(frozen=True)
class Row:
    """One prompt of the input, or why its line holds none."""

    index: int
    given: dict[str, Any]  # the row's keys, carried through to the output
    prompt: Any  # what the engine takes
    error: str | None = None

    @property
    def key(self) -> tuple[str, Any]:
        """What tells it from all others: its "id" where it has one, else its index."""
        return key_of(self.given, self.index)

    @property
    def label(self) -> str:
        """The prompt in a few words, for headings."""
        text = self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt, ensure_ascii=False)
        return " ".join(text.split())


def rows_of_arguments(prompts: list[str], chat: bool) -> list[Row]:
    """One row a prompt."""
    return [Row(index, {"prompt": prompt}, as_prompt(prompt, chat)) for index, prompt in enumerate(prompts)]


def rows_of_file(path: str, chat: bool) -> list[Row]:
    """One row a line, blank lines left out; "-" is stdin. OSError where the file cannot be read."""
    if path == "-":
        if sys.stdin is None:
            raise RequestError("--input - reads stdin, which is closed: give it something to read, or name a file")
        return _parse_lines(sys.stdin.buffer, "stdin", chat)
    with open(path, "rb") as file:
        return _parse_lines(file, path, chat)


def as_prompt(text: str, chat: bool) -> Any:
    """Text as the engine is to read it."""
    return {"messages": [{"role": "user", "content": text}]} if chat else text


def result_row(row: Row, output: RequestOutput) -> dict[str, Any]:
    """The row of a finished request, in strict JSON's terms."""
    errors = [completion.error for completion in output.outputs if completion.error is not None]
    result = {
        **row.given, "index": row.index,
        "outputs": [{
            "text": completion.text, "token_ids": completion.token_ids, "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason, "reward": completion.reward,
            "cumulative_logprob": completion.cumulative_logprob,
        } for completion in output.outputs],
        "metrics": metrics_record(output.metrics), "seed": output.seed,
    }
    record: dict[str, Any] = plain({**result, "error": errors[0]} if errors else result)
    return record


def error_row(row: Row, error: str) -> dict[str, Any]:
    """The row of a prompt that could not run."""
    record: dict[str, Any] = plain({**row.given, "index": row.index, "outputs": [], "error": error})
    return record


def key_of(record: dict[str, Any], index: int) -> tuple[str, Any]:
    """The key of a row, as it was given or as it was written; an id is a string or a number."""
    identity = record.get("id")
    if isinstance(identity, (str, int, float)) and not isinstance(identity, bool):
        return "id", identity
    return "index", index


def prompt_of(record: dict[str, Any]) -> dict[str, Any]:
    """What a row asks, as it was given or as it was written."""
    asked = {key: record[key] for key in PROMPT_KEYS if key in record}
    return asked | {key: record[key] for kind in asked for key in OTHER_KEYS[kind] if key in record}


def _parse_lines(lines: Iterable[bytes], name: str, chat: bool) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            rows.append(_parse_line(len(rows), f"{name}: line {number}", line, chat))
    return rows


def _parse_line(index: int, where: str, line: bytes, chat: bool) -> Row:
    given: dict[str, Any] = {}
    try:
        value = loads(line)
        if too_deep(value):
            raise ValueError(f"it is nested more than {MAX_NESTING} deep")
        if isinstance(value, dict):
            given = {key: item for key, item in value.items() if key not in RESULT_KEYS}
        elif isinstance(value, str):
            given = {"prompt": value}
        return Row(index, given, _prompt_of(value, chat))
    except RequestError as error:
        return Row(index, given, None, f"{where}: {error}")
    except ValueError as error:
        return Row(index, _identity_of(line), None,
                   f"{where} is no row of JSON ({error}): give a string or an object")


def _identity_of(line: bytes) -> dict[str, Any]:
    """The id of a row that is refused for something else in it, where it can be read all the same."""
    try:
        value = json.loads(line.decode("utf8"))  # else two ids that are no text might come out as one
    except (ValueError, RecursionError):
        return {}
    is_named = isinstance(value, dict) and key_of(value, 0)[0] == "id" and value["id"] == plain(value["id"])
    return {"id": value["id"]} if is_named else {}


def _prompt_of(value: Any, chat: bool) -> Any:
    beside: dict[str, Any] = {}
    if isinstance(value, dict):
        kind = prompt_kind(value, "a row")
        beside = {key: value[key] for key in OTHER_KEYS[kind] if value.get(key) is not None}
        if kind != "prompt":
            return {kind: value[kind], **beside}
        value = value["prompt"]
    if not isinstance(value, str):
        raise RequestError(f"a prompt is a string, not {type(value).__name__}: give a string or an object")
    prompt = as_prompt(value, chat)
    return {**(prompt if chat else {"prompt": prompt}), **beside} if beside else prompt
