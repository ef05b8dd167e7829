"""Sequences of libstars' ledger: what their pages hold, as rows of numbers say, however they fork, rewind and share."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stars.bindings import libstars
from stars.errors import IntegrityError, OutOfPages

if libstars.available():
    from stars.bindings.ledger import Ledger, PageCopy, PageTable
else:
    pytest.skip("libstars was not built", allow_module_level=True)


class Text:
    """A sequence, and the tokens that its positions ought to hold."""

    def __init__(self, table: PageTable, tokens: list[int], key: int):
        self.table = table
        self.tokens = tokens
        self.key = key


class Host:
    """A cache of rows beside a ledger. A row holds what a model would compute there: a number of the key, and of all
    tokens up to its own, so that a row of another text, or of another model, is seen wherever it is read."""

    def __init__(self, num_pages: int, page_size: int):
        self.ledger = Ledger(num_pages, page_size)
        self.size = page_size
        self.rows = [[-1] * page_size for _ in range(num_pages)]
        self.texts: list[Text] = []
        self.copies = self.hits = 0

    def open(self, tokens: list[int], key: int) -> None:
        table = self.ledger.open(tokens, key)
        assert table.length == table.shared == len(table.pages) * self.size
        assert not tokens or table.length < len(tokens)  # one is left to run
        self.hits += table.length
        text = Text(table, tokens[: table.length], key)
        self.texts.append(text)
        self.holds_its_tokens(text)
        self.extend(text, tokens[table.length :])

    def extend(self, text: Text, tokens: list[int]) -> None:
        before = text.table.pages, text.table.length, self.ledger.counts()
        try:
            copied = text.table.extend(len(tokens))
        except OutOfPages as error:
            assert before == (text.table.pages, text.table.length, self.ledger.counts())
            assert error.needed > error.free == before[2].free + before[2].cached
            return
        if copied:
            self.copies += 1
            assert copied.rows == before[1] % self.size and before[0][-1] == copied.source
            self.rows[copied.target][: copied.rows] = self.rows[copied.source][: copied.rows]
        pages = text.table.pages
        for token in tokens:
            position = len(text.tokens)
            text.tokens = [*text.tokens, token]
            self.rows[pages[position // self.size]][position % self.size] = content(text.key, text.tokens)

    def fork(self, text: Text) -> None:
        table = text.table.fork()
        assert (table.pages, table.length, table.shared) == (text.table.pages, *[text.table.length] * 2)
        self.texts.append(Text(table, text.tokens, text.key))

    def rewind(self, text: Text, length: int) -> None:
        text.table.rewind(length)
        text.tokens = text.tokens[:length]

    def close(self, text: Text, published: int) -> None:
        self.texts.remove(text)
        text.table.close(text.tokens[:published])

    def holds_its_tokens(self, text: Text) -> None:
        pages = text.table.pages
        assert text.table.length == len(text.tokens) and len(pages) == -(-len(text.tokens) // self.size)
        found = [self.rows[page][row] for page in pages for row in range(self.size)][: len(text.tokens)]
        assert found == [content(text.key, text.tokens[: i + 1]) for i in range(len(text.tokens))]

    def check(self) -> None:
        for text in self.texts:
            self.holds_its_tokens(text)
        counts = self.ledger.counts()
        held = Counter(page for text in self.texts for page in text.table.pages)
        assert counts.used == len(held) and counts.sequences == len(self.texts)
        assert counts.free + counts.cached + counts.used == self.ledger.num_pages
        for page in range(self.ledger.num_pages):
            assert self.ledger.page(page).references == held[page]
        self.ledger.check_integrity(Counter())


def content(key: int, tokens: list[int]) -> int:
    return hash((key, *tokens))


KINDS = ["open", "open", "extend", "extend", "fork", "rewind", "publish", "publish", "close", "close"]
OPERATIONS = st.lists(st.tuples(
    st.sampled_from(KINDS),
    st.integers(0, 2**20), st.integers(0, 9), st.lists(st.integers(0, 1), max_size=7)), min_size=10, max_size=60)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(num_pages=st.integers(1, 30), page_size=st.integers(1, 4), operations=OPERATIONS)
def test_every_sequence_holds_its_own_text(num_pages, page_size, operations):
    play(Host(num_pages, page_size), operations)


def play(host: Host, operations: list[tuple[str, int, int, list[int]]]) -> None:
    for what, which, number, tokens in operations:
        text = host.texts[which % len(host.texts)] if host.texts else None
        if what == "open":
            begun = text.tokens if text and number % 3 else []  # mostly as another one goes
            host.open(begun + tokens, which // 64 % 2)
        elif text is None:
            continue
        elif what == "extend":
            host.extend(text, tokens)
        elif what == "fork":
            host.fork(text)
        elif what == "rewind":
            host.rewind(text, max(0, len(text.tokens) - number))
        elif what == "publish":
            text.table.publish(text.tokens[: max(0, len(text.tokens) - number // 4)])
        else:
            host.close(text, len(text.tokens) * (number % 2))
        host.check()
    while host.texts:
        host.close(host.texts[0], 0)
    host.check()
    assert host.ledger.counts().used == 0
    host.ledger.close()


def test_every_sequence_holds_its_own_text_where_much_is_shared_and_copied():
    """The same over longer random runs, that reach copies and hits, which is what such a test is worth."""
    rng, copies, hits = random.Random(5), 0, 0
    for _ in range(150):
        host = Host(rng.randrange(6, 31), rng.randrange(1, 5))
        play(host, [(rng.choice(KINDS), rng.randrange(2**10), rng.randrange(10),
                     [rng.randrange(2) for _ in range(rng.randrange(7))]) for _ in range(60)])
        copies, hits = copies + host.copies, hits + host.hits
    assert copies > 60 and hits > 900, (copies, hits)


# -- one at a time ----------------------------------------------------------------------------------------------------


def test_a_prompt_is_shared_in_whole_pages_but_for_its_last_token():
    ledger = Ledger(8, 2)
    first = ledger.open([1, 2, 3, 4])
    assert (first.length, first.pages) == (0, [])
    assert first.extend(4) is None and first.pages == [0, 1]
    first.publish([1, 2, 3, 4])
    second, third, other = ledger.open([1, 2, 3, 4]), ledger.open([1, 2, 3, 4, 5]), ledger.open([1, 2, 3, 4, 5], key=1)
    assert (second.pages, second.length, second.shared) == ([0], 2, 2)
    assert (third.pages, third.length) == ([0, 1], 4)
    assert other.pages == []
    ledger.check_integrity(Counter())


def test_a_shared_tail_is_copied_by_who_writes_first():
    ledger = Ledger(8, 4)
    first = ledger.open()
    first.extend(6)
    second = first.fork()
    assert second.extend(1) == PageCopy(1, 2, 2) and (first.pages, second.pages) == ([0, 1], [0, 2])
    assert first.extend(3) is None and first.pages == [0, 1, 3]
    third = first.fork()
    assert third.extend(5) == PageCopy(3, 4, 1) and third.pages == [0, 1, 4, 5]
    assert first.extend(0) is None and first.length == 9
    ledger.check_integrity(Counter())


def test_a_rewound_page_that_was_published_is_not_found_once_it_is_written():
    ledger = Ledger(8, 2)
    table = ledger.open()
    table.extend(4)
    table.publish([1, 2, 3, 4])
    table.rewind(3)
    assert table.pages == [0, 1] and ledger.match([1, 2, 3, 4]) == [0, 1]
    assert table.extend(1) is None and table.pages == [0, 1]
    assert ledger.match([1, 2, 3, 4]) == [0]
    table.rewind(1)
    assert (table.length, table.pages, ledger.counts().free) == (1, [0], 7)
    table.rewind(0)
    assert (table.pages, ledger.counts().cached) == ([], 1)  # what is published stays to be found


def test_closing_with_tokens_counts_published_pages_of_others_as_used_now():
    """The prefix that another one published first must not be reused before what continues it."""
    ledger = Ledger(5, 1)
    first, second = ledger.open([1]), ledger.open([1])
    first.extend(1)
    second.extend(2)
    first.close([1])
    others = ledger.open()
    others.extend(1)
    others.close([9])
    second.close([1, 2])
    assert ledger.match([1, 2]) == [0, 2] and ledger.match([9]) == [3]
    ledger.alloc(3)  # page 3, published before the prefix was used again, goes first
    assert ledger.match([9]) == [] and ledger.match([1, 2]) == [0, 2]
    ledger.check_integrity()


def test_what_is_refused_changes_nothing():
    ledger = Ledger(3, 2)
    table = ledger.open()
    table.extend(4)
    table.publish([1, 2, 3, 4])
    twin = table.fork()
    before = ledger.counts(), table.pages, table.length
    for call, words in (
        (lambda: table.rewind(5), "a sequence of 4 positions cannot be rewound to 5"),
        (lambda: table.rewind(-1), "cannot be rewound to -1"),
        (lambda: table.publish([1, 2, 3, 4, 5]), "5 tokens are more than the 4 positions"),
        (lambda: table.publish([1, 9]), "page 0 is free or published for other tokens"),
        (lambda: table.close([1, 2, 9, 9]), "page 1 is free or published for other tokens"),
        (lambda: table.extend(-1), "tokens must be >= 0"),
        (lambda: table.extend(2**46), "length at most 2\\^46"),
        (lambda: ledger.release([0]), "page 0 was released more often than it was taken"),  # the tables keep theirs
        (lambda: ledger.close(), "sequences of the ledger are open: close them first"),
    ):
        with pytest.raises(IntegrityError, match=words):
            call()
        assert (ledger.counts(), table.pages, table.length) == before
    with pytest.raises(OutOfPages, match="needs 2 pages and has 1 free"):
        table.extend(3)
    with pytest.raises(OutOfPages, match="needs 1000 pages and has 1 free"):
        table.extend(2000)
    twin.rewind(3)
    with pytest.raises(OutOfPages, match="needs 2 pages and has 1 free"):
        twin.extend(2)  # one to copy the tail to, one more
    assert ledger.counts() == before[0]
    ledger.check_integrity(Counter())
    twin.close()
    table.close()
    table.close()
    with pytest.raises(IntegrityError, match="the handle must not be null"):
        table.extend(1)
    ledger.close()
