"""Rows of prompts in and rows of results out: JSON, one value a line."""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

from stars.errors import RequestError
from stars.outputs import RequestOutput
from stars.trace import metrics_record, plain

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")


class Row(NamedTuple):
    """One prompt of the input, or why its line holds none."""

    index: int
    given: dict[str, Any]  # the row's keys, carried through to the output
    prompt: Any  # what the engine takes
    error: str | None = None

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
        return _parse_lines(sys.stdin.buffer, chat)
    with open(path, "rb") as file:
        return _parse_lines(file, chat)


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
    return plain({**result, "error": errors[0]} if errors else result)


def error_row(row: Row, error: str) -> dict[str, Any]:
    """The row of a prompt that could not run."""
    return plain({**row.given, "index": row.index, "outputs": [], "error": error})


def _parse_lines(lines, chat: bool) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.append(_parse_line(len(rows), number, line, chat))
    return rows


def _parse_line(index: int, number: int, line: bytes, chat: bool) -> Row:
    given: dict[str, Any] = {}
    try:
        value = json.loads(line)
        if isinstance(value, dict):
            given = value
        elif isinstance(value, str):
            given = {"prompt": value}
        return Row(index, given, _prompt_of(value, chat))
    except RequestError as error:
        return Row(index, given, None, f"line {number}: {error}")
    except (ValueError, RecursionError) as error:
        return Row(index, given, None, f"line {number} is not JSON ({error}): give a string or an object")


def _prompt_of(value: Any, chat: bool) -> Any:
    if isinstance(value, dict):
        kinds = [key for key in PROMPT_KEYS if key in value]
        if len(kinds) != 1:
            raise RequestError('a row needs exactly one of "prompt", "prompt_token_ids" and "messages"')
        value = value["prompt"] if kinds[0] == "prompt" else {kinds[0]: value[kinds[0]]}
        if kinds[0] != "prompt":
            return value
    if not isinstance(value, str):
        raise RequestError(f"a prompt is a string, not {type(value).__name__}: give a string or an object")
    return as_prompt(value, chat)
