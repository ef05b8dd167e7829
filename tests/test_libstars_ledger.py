"""libstars' ledger through the C interface alone: what is refused, with which status and which words, and that nothing
has changed then. `make sanitize` runs it with a library that looks for errors of memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from stars.bindings import libstars
from stars.bindings.layouts import HEADER, STRUCTURES
from stars.bindings.library import loaded

pytestmark = pytest.mark.skipif(not libstars.available(), reason="libstars was not built")

OK, INVALID, OUT_OF_MEMORY, EXHAUSTED, CLOSED, BUSY = (
    HEADER.constants[f"STARS_{name}"] for name in ("OK", "INVALID", "OUT_OF_MEMORY", "EXHAUSTED", "CLOSED", "BUSY"))
SIZE = 2  # of a page
NEEDS_A_SIZE = {"stars_ledger_page": "stars_page", "stars_ledger_counts": "stars_page_counts",
                "stars_sequence_extend": "stars_page_copy"}


def ints(*values: int) -> ctypes.Array:
    return (ctypes.c_int32 * len(values))(*values)


def sized(name: str) -> ctypes.Structure:
    return STRUCTURES[name](ctypes.sizeof(STRUCTURES[name]))


def open_ledger(num_pages: int = 6) -> int:
    params = sized("stars_ledger_params")
    params.num_pages, params.page_size = num_pages, SIZE
    handle = loaded().stars_ledger_open(ctypes.byref(params))
    assert handle
    return handle


@pytest.fixture
def ledger() -> Iterator[int]:
    """Of six pages: 0 and 1 are published as [1, 2, 3, 4] and held, 2 is held, 3 is cached as [9, 9]."""
    handle = open_ledger()
    call, pages = loaded(), ints(0, 0, 0)
    assert call.stars_ledger_alloc(handle, 3, pages) == OK and list(pages) == [0, 1, 2]
    assert call.stars_ledger_publish(handle, 0, pages, ints(1, 2, 3, 4), 2, None) == OK
    assert call.stars_ledger_alloc(handle, 1, pages) == OK and pages[0] == 3
    assert call.stars_ledger_publish(handle, 0, pages, ints(9, 9), 1, None) == OK
    assert call.stars_ledger_release(handle, pages, 1) == OK
    yield handle
    loaded().stars_ledger_close(handle)


@pytest.fixture
def sequence(ledger: int) -> Iterator[int]:
    """Of the ledger's pages 0 and 4, three positions of [1, 2, 7]."""
    handle = loaded().stars_sequence_open(ledger, 0, ints(1, 2, 7), 3)
    copy = sized("stars_page_copy")
    assert loaded().stars_sequence_extend(handle, 1, ctypes.byref(copy)) == 0
    yield handle
    loaded().stars_sequence_close(handle, None, 0)


def counts(ledger: int) -> tuple[int, ...]:
    out = sized("stars_page_counts")
    assert loaded().stars_ledger_counts(ledger, ctypes.byref(out)) == OK
    return tuple(getattr(out, name) for name, _ in out._fields_)


def refused(name: str, *arguments: object) -> tuple[int, str]:
    """The status of a call, in whatever way the function returns it, and the text without the function's name."""
    result = getattr(loaded(), name)(*arguments)
    if HEADER.functions[name].result.endswith("*"):
        assert not result, name
        result = loaded().stars_last_status()
    text = loaded().stars_last_error().decode()
    assert text.startswith(name + ": "), text
    return abs(result), text.removeprefix(name + ": ")


FUNCTIONS = [name for name in HEADER.functions if name.startswith(("stars_ledger_", "stars_sequence_"))
             and name != "stars_ledger_open"]
PAGES = ints(0, 1, 2, 3, 4, 5)
TOKENS = ints(1, 2, 3, 4)
ARGUMENTS = {  # what is right, after the handle
    "stars_ledger_close": (), "stars_ledger_alloc": (1, PAGES), "stars_ledger_share": (PAGES, 1),
    "stars_ledger_release": (PAGES, 1), "stars_ledger_match": (0, TOKENS, 2, PAGES),
    "stars_ledger_publish": (0, PAGES, TOKENS, 1, None), "stars_ledger_forget": (PAGES, 1),
    "stars_ledger_unpublish": (3,), "stars_ledger_cost": (PAGES, 1), "stars_ledger_page": (0, None),
    "stars_ledger_counts": (None,), "stars_ledger_check": (None,), "stars_sequence_open": (0, TOKENS, 4),
    "stars_sequence_fork": (), "stars_sequence_extend": (1, None), "stars_sequence_rewind": (1,),
    "stars_sequence_publish": (TOKENS, 2), "stars_sequence_close": (None, 0), "stars_sequence_pages": (PAGES, 6),
    "stars_sequence_length": (), "stars_sequence_shared": ()}


def test_every_function_is_tried_here():
    assert set(ARGUMENTS) == set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_handles_that_are_none(name, ledger, sequence):
    """NULL, a closed one, one of something else, and addresses that were never handles."""
    of_ledger = name == "stars_sequence_open" or name.startswith("stars_ledger_")
    before = counts(ledger)
    gone = open_ledger()
    other = sequence if of_ledger else ledger
    if not of_ledger:
        closed = loaded().stars_sequence_open(gone, 0, None, 0)
        assert loaded().stars_sequence_close(closed, None, 0) == OK
    assert loaded().stars_ledger_close(gone) == OK
    for handle, status, words in (
        (None, INVALID, "the handle must not be null"),
        (gone if of_ledger else closed, CLOSED, "the handle was closed before"),
        (other, CLOSED, "this is no handle of such an object"),
        (ctypes.addressof(PAGES) | 7, CLOSED, ""),
        (2**64 - 1, CLOSED, ""),
        (1, CLOSED, ""),
        ((gone if of_ledger else closed) + (1 << 40), CLOSED, "the handle was closed before"),
    ):
        found, text = refused(name, handle, *ARGUMENTS[name])
        assert found == status and words in text, (handle, text)
    assert counts(ledger) == before


WRONG = [  # function, what follows the handle, words. Of ledgers
    ("stars_ledger_alloc", (-1, PAGES), "count must be >= 0"),
    ("stars_ledger_alloc", (2**46 + 1, PAGES), "is too large above 2^46"),
    ("stars_ledger_alloc", (1, None), "pages must not be null where count is not 0"),
    ("stars_ledger_share", (None, 1), "pages must not be null"),
    ("stars_ledger_share", (PAGES, -1), "count must be >= 0"),
    ("stars_ledger_share", (ints(0, 6), 2), "there is no page 6: the ledger has 6, from 0 on"),
    ("stars_ledger_share", (ints(0, -1), 2), "there is no page -1"),
    ("stars_ledger_share", (ints(0, 5), 2), "page 5 is free and cannot be shared"),
    ("stars_ledger_release", (ints(0, 0), 2), "page 0 was released more often than it was taken"),
    ("stars_ledger_release", (ints(3, 0), 2), "page 3 was released more often"),
    ("stars_ledger_release", (ints(0, 2**31 - 1), 2), "there is no page 2147483647"),
    ("stars_ledger_release", (None, 2), "pages must not be null"),
    ("stars_ledger_match", (0, None, 1, PAGES), "tokens must not be null where count is not 0"),
    ("stars_ledger_match", (0, TOKENS, -1, PAGES), "count must be >= 0"),
    ("stars_ledger_match", (0, TOKENS, 2**46, PAGES), "count pages of tokens are too many"),
    ("stars_ledger_publish", (0, None, TOKENS, 1, None), "pages must not be null"),
    ("stars_ledger_publish", (0, PAGES, None, 1, None), "tokens must not be null"),
    ("stars_ledger_publish", (0, PAGES, TOKENS, 2**46, None), "count pages of tokens are too many"),
    ("stars_ledger_publish", (0, ints(2, 0), ints(7, 7, 7, 7), 2, None), "page 0 is free or published for other"),
    ("stars_ledger_publish", (0, ints(2, 2), ints(7, 7, 7, 7), 2, None), "page 2 is free or published for other"),
    ("stars_ledger_publish", (1, ints(2, 5), ints(7, 7, 7, 7), 2, None), "page 5 is free or published for other"),
    ("stars_ledger_publish", (0, ints(0, 9), TOKENS, 2, None), "there is no page 9"),
    ("stars_ledger_forget", (None, 1), "pages must not be null"),
    ("stars_ledger_forget", (ints(3, 7), 2), "there is no page 7"),
    ("stars_ledger_unpublish", (6,), "there is no page 6"),
    ("stars_ledger_unpublish", (-2**31,), "there is no page -2147483648"),
    ("stars_ledger_cost", (None, 1), "pages must not be null"),
    ("stars_ledger_cost", (ints(-1), 1), "there is no page -1"),
    ("stars_ledger_close", (), "sequences of the ledger are open: close them first"),
    ("stars_sequence_open", (0, None, 1), "tokens must not be null"),
    ("stars_sequence_open", (0, TOKENS, -1), "count must be >= 0"),
    # Of sequences.
    ("stars_sequence_rewind", (4,), "a sequence of 3 positions cannot be rewound to 4: only shorten it"),
    ("stars_sequence_rewind", (-1,), "cannot be rewound to -1"),
    ("stars_sequence_publish", (None, 2), "tokens must not be null"),
    ("stars_sequence_publish", (TOKENS, -2), "count must be >= 0"),
    ("stars_sequence_publish", (TOKENS, 4), "4 tokens are more than the 3 positions of the sequence"),
    ("stars_sequence_publish", (ints(5, 5), 2), "page 0 is free or published for other tokens"),
    ("stars_sequence_close", (None, 1), "tokens must not be null"),
    ("stars_sequence_close", (TOKENS, -1), "count must be >= 0"),
    ("stars_sequence_close", (TOKENS, 4), "4 tokens are more than the 3 positions"),
    ("stars_sequence_pages", (PAGES, 1), "more pages than capacity"),
    ("stars_sequence_pages", (PAGES, -1), "more pages than capacity"),
    ("stars_sequence_pages", (None, 2), "pages must not be null where capacity is not 0"),
]


@pytest.mark.parametrize("name, arguments, words", WRONG)
def test_what_is_refused_has_changed_nothing(name, arguments, words, ledger, sequence):
    before = counts(ledger)
    of_ledger = name == "stars_sequence_open" or name.startswith("stars_ledger_")
    status, text = refused(name, ledger if of_ledger else sequence, *arguments)
    assert status == INVALID and words in text
    assert counts(ledger) == before and loaded().stars_sequence_length(sequence) == 3
    holders = (ctypes.c_int64 * 6)(1, 1, 1)
    assert loaded().stars_ledger_check(ledger, holders) == OK


@pytest.mark.parametrize("name", NEEDS_A_SIZE)
def test_structs_of_other_sizes(name, ledger, sequence):
    of, before = NEEDS_A_SIZE[name], counts(ledger)
    first = () if name == "stars_ledger_counts" else (1,)
    handle = sequence if name == "stars_sequence_extend" else ledger
    right = ctypes.sizeof(STRUCTURES[of])
    for size in (0, -1, right - 8, right + 8, right + 1, 2**62):
        out = STRUCTURES[of](size)
        status, text = refused(name, handle, *first, ctypes.byref(out))
        assert status == INVALID and "size must be the sizeof" in text
        assert bytes(out)[8:] == bytes(right - 8)
    status, text = refused(name, handle, *first, None)
    assert status == INVALID and "the struct must not be null" in text
    assert counts(ledger) == before


@pytest.mark.parametrize("field, value, words", [
    ("size", 0, "size must be the sizeof"), ("size", 32, "size must be the sizeof"),
    ("num_pages", -1, "num_pages must be >= 0"), ("num_pages", 2**31, "below 2^31"),
    ("num_pages", -(2**63), "num_pages must be >= 0"), ("page_size", 0, "page_size must be positive"),
    ("page_size", -4, "page_size must be positive"), ("page_size", 2**31, "page_size must be positive and below 2^31"),
])
def test_ledgers_that_cannot_be(field, value, words):
    params = sized("stars_ledger_params")
    params.num_pages, params.page_size = 4, 2
    setattr(params, field, value)
    status, text = refused("stars_ledger_open", ctypes.byref(params))
    assert status == INVALID and words in text


def test_other_ledgers_that_cannot_be():
    assert refused("stars_ledger_open", None) == (INVALID, "the struct must not be null")
    params = sized("stars_ledger_params")
    params.num_pages, params.page_size = 2**31 - 1, 2**31 - 1
    assert refused("stars_ledger_open", ctypes.byref(params)) == (INVALID, "num_pages * page_size is too large")


def test_more_pages_than_there_are(ledger, sequence):
    before = counts(ledger)
    assert refused("stars_ledger_alloc", ledger, 3, PAGES) == (
        EXHAUSTED, "3 pages are needed and 2 are free: release some, or open the ledger with more")
    copy = sized("stars_page_copy")
    status, text = refused("stars_sequence_extend", sequence, 6, ctypes.byref(copy))
    assert status == EXHAUSTED and "3 pages are needed and 2 are free" in text
    status, text = refused("stars_sequence_extend", sequence, 2**46 - 3, ctypes.byref(copy))
    assert status == EXHAUSTED and "are needed and 2 are free" in text
    for tokens in (-1, 2**46, -(2**63)):
        status, text = refused("stars_sequence_extend", sequence, tokens, ctypes.byref(copy))
        assert status == INVALID and "tokens must be >= 0" in text
    assert counts(ledger) == before


def test_the_check_compares_what_is_held(ledger, sequence):
    check, corrupt = loaded().stars_ledger_check, HEADER.constants["STARS_CORRUPT"]
    assert check(ledger, None) == OK
    assert check(ledger, (ctypes.c_int64 * 6)(1, 1, 1)) == OK  # the sequence's references are its own
    assert refused("stars_ledger_check", ledger, (ctypes.c_int64 * 6)(1, 1, 1, 0, 1)) == (
        corrupt, "page 4 has 0 references and 1 holders: 1 free + 1 cached + 4 in use of 6 pages")
    assert refused("stars_ledger_check", ledger, (ctypes.c_int64 * 6)(2, 1, 1))[0] == corrupt


def test_pages_whose_tokens_have_one_hash_are_told_apart():
    """Two tokens that the index cannot tell apart by their hashes, as page_ledger.cpp makes them of pages of one."""
    odd = np.uint64(0x9E3779B97F4A7C15)
    tokens = np.arange(2**19, dtype=np.uint64)
    mixed = (odd ^ np.uint64(2**32 - 1) ^ tokens) * odd
    hashes = (mixed ^ mixed >> np.uint64(32)).astype(np.uint32)
    order = np.argsort(hashes, kind="stable")
    places = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    pairs = [(int(order[place]), int(order[place + 1])) for place in places]
    assert len(pairs) > 10  # some 32 are to be expected of 2^19 tokens and 32 bits
    params = STRUCTURES["stars_ledger_params"](ctypes.sizeof(STRUCTURES["stars_ledger_params"]), 8, 1)
    handle, call, pages = loaded().stars_ledger_open(ctypes.byref(params)), loaded(), ints(0, 0)
    for first, second in pairs:
        assert call.stars_ledger_alloc(handle, 2, pages) == OK
        assert call.stars_ledger_publish(handle, 0, pages, ints(first), 1, None) == OK
        assert call.stars_ledger_match(handle, 0, ints(second), 1, None) == 0
        assert call.stars_ledger_publish(handle, 0, ints(pages[1]), ints(second), 1, None) == OK
        for token, page in ((first, pages[0]), (second, pages[1])):
            found = ints(-1)
            assert call.stars_ledger_match(handle, 0, ints(token), 1, found) == 1 and found[0] == page
        assert call.stars_ledger_unpublish(handle, pages[0]) == OK  # of two in one bucket
        assert call.stars_ledger_match(handle, 0, ints(second), 1, None) == 1
        assert call.stars_ledger_unpublish(handle, pages[1]) == OK
        assert call.stars_ledger_release(handle, pages, 2) == OK
    assert call.stars_ledger_close(handle) == OK


def test_closing_twice():
    handle = open_ledger()
    sequence = loaded().stars_sequence_open(handle, 0, None, 0)
    fork = loaded().stars_sequence_fork(sequence)
    for open_one in (sequence, fork):
        assert loaded().stars_sequence_close(open_one, None, 0) == OK
        assert refused("stars_sequence_close", open_one, None, 0) == (CLOSED, "the handle was closed before")
    assert loaded().stars_ledger_close(handle) == OK
    assert refused("stars_ledger_close", handle) == (CLOSED, "the handle was closed before")
    again = open_ledger()  # in the same slot, most likely: the old handle stays one of the past
    assert again != handle and refused("stars_ledger_check", handle, None)[0] == CLOSED
    assert loaded().stars_ledger_close(again) == OK


def test_two_threads_at_once_are_told_and_break_nothing():
    """Each call either has the ledger to itself, or is told that another one has it. Whichever it is, all adds up."""
    handle, rounds, others = open_ledger(64), 3000, set[int]()

    def alone(call: Callable[..., int], *arguments: object) -> int:
        """A call until it has the ledger to itself."""
        while abs(result := call(*arguments)) == BUSY:
            others.add(loaded().stars_last_status())
        return result

    def work(key: int) -> None:
        library, tokens, copy = loaded(), ints(*range(key, key + 8)), sized("stars_page_copy")
        for _ in range(rounds):
            while not (made := library.stars_sequence_open(handle, key, tokens, 8)):
                others.add(library.stars_last_status())
            missing = 8 - alone(library.stars_sequence_shared, made)
            assert missing in (2, 8) and alone(library.stars_sequence_extend, made, missing, ctypes.byref(copy)) == 0
            assert alone(library.stars_sequence_close, made, tokens, 8) == OK

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(work, (1, 2)))
    assert others <= {BUSY}
    size, free, cached, used, published, sequences = counts(handle)
    assert (free + cached, used, published, sequences) == (64, 0, 8, 0)
    assert loaded().stars_ledger_check(handle, (ctypes.c_int64 * 64)()) == OK
    assert loaded().stars_ledger_close(handle) == OK
