"""Grammars are tried in a process of their own before they are compiled here.

llguidance bounds most of what it does, but not all: some few hundred characters of a schema keep it busy for hours, and
some thousand rules that stand on each other overflow the stack and end the process. Neither can be caught from within.
What has been compiled elsewhere, on half the stack and in bounded time, is then compiled here in as little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stars.model.confined import Broken, Confined, TooSlow

SECONDS = 5.0
"""For one grammar: those in use take some milliseconds."""
START_SECONDS = 60.0
"""Until the process has read the tokens: 0.5 s for 50,000."""
MEMORY = 4 << 30
"""Bytes of address space of the process."""

_SCRIPT = """
import json, random, resource, sys, threading
most = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (most, most))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

class Tokens:
    is_tokenizer_wrapper = True
    bos_token_id = None

texts, eos, special, limits = json.loads(sys.stdin.readline())
Tokens.tokens = [text.encode("latin-1") for text in texts]
Tokens.eos_token_id, Tokens.special_token_ids = eos[0], special
tokens = LLTokenizer(Tokens())
print("true", flush=True)

def answer(grammar):
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=LLParserLimits(**limits))
    if matcher.is_error():
        return matcher.get_error(), False
    drawn = random.Random(0)
    for step in range(8):  # whether masks can be had, too
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            return (matcher.get_error(), True) if step == 0 else None
        first = drawn.randrange(len(mask))
        places = [place for place in (*range(first, len(mask)), *range(first)) if mask[place]]
        allowed = [8 * place + bit for place in places[:1] for bit in range(8) if mask[place] >> bit & 1]
        if not allowed or allowed[0] in eos or not matcher.consume_token(allowed[0]):
            return None

def answer_all():
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)

threading.stack_size(4 << 20)
thread = threading.Thread(target=answer_all)
thread.start()
thread.join()
"""


class GrammarProcess(Confined):
    """Tries grammars. texts: of all tokens, special ones by name; limits: llguidance's, by name."""

    script = _SCRIPT

    def __init__(self, texts: Sequence[bytes], eos_token_ids: Sequence[int], special_token_ids: Sequence[int],
                 limits: dict[str, Any]):
        super().__init__()
        self._told = ([text.decode("latin-1") for text in texts], list(eos_token_ids), list(special_token_ids), limits)

    def _beginning(self) -> Any:
        return self._told

    def problem(self, grammar: str) -> tuple[str, bool] | None:
        """Why a grammar in llguidance's Lark cannot be compiled, as llguidance says it, and whether it was compiled but
        allows no first token. None where it can. OSError where no process can be started."""
        try:
            answer = self._answer(grammar, SECONDS, START_SECONDS, MEMORY)
        except TooSlow as error:
            return f"reading it takes more than {error.args[0]:g} s", False
        except Broken:
            return f"reading it takes more than {MEMORY >> 30} GiB, or breaks llguidance", False
        return None if answer is None else (answer[0], answer[1])
