"""The page pool: exact accounts, contents found again and in the right order forgotten."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.scheduler.page_pool import OutOfPages, PagePool, extend_keys

SIZE = 2  # tokens a page


def keys_of(tokens: list[int], salt: bytes = b"", size: int = SIZE) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, tokens, size, salt)
    return keys


def counts(pool: PagePool) -> tuple[int, int, int]:
    return pool.free, pool.cached, pool.used


def held(pool: PagePool, tokens: list[int]) -> list[int]:
    """Pages for `tokens`, all computed and registered."""
    pages = pool.take(pool.pages_for(len(tokens)))
    for page, key in zip(pages, keys_of(tokens), strict=False):
        assert pool.register(page, key)
    return pages


def test_keys_are_of_all_tokens_up_to_the_page():
    whole = keys_of([1, 2, 3, 4, 5])
    assert len(whole) == 2 and len(set(whole)) == 2
    assert keys_of([1, 2, 3, 4]) == whole and keys_of([1, 2, 9, 9])[0] == whole[0]
    assert keys_of([9, 2, 3, 4])[1] != whole[1]  # the same page after another beginning
    assert not set(keys_of([1, 2, 3, 4, 5], b"tenant")) & set(whole)
    assert keys_of([1]) == []
    grown = whole[:1]
    extend_keys(grown, [1, 2, 3, 4, 5], SIZE)
    assert grown == whole
    for wrong in (2**32, -1):
        with pytest.raises(OverflowError):
            keys_of([1, wrong])


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20), st.integers(1, 4), st.data())
def test_keys_as_tokens_become_known(tokens: list[int], size: int, data: st.DataObject):
    """In any pieces the keys of all at once, which differ where a token up to the page's end does."""
    whole, grown = keys_of(tokens, size=size), []
    for end in [*sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=4))), len(tokens)]:
        extend_keys(grown, tokens[:end], size)
    assert grown == whole and len(set(whole)) == len(whole) == len(tokens) // size
    if tokens:
        place = data.draw(st.integers(0, len(tokens) - 1))
        other = keys_of([*tokens[:place], tokens[place] ^ 1, *tokens[place + 1 :]], size=size)
        same = [a == b for a, b in zip(whole, other, strict=True)]
        assert same == [index < place // size for index in range(len(whole))]


def test_pages_go_from_free_to_used_to_cached_and_back():
    pool = PagePool(4, SIZE)
    pages = held(pool, [1, 2, 3, 4, 5])
    assert counts(pool) == (1, 0, 3) and pool.available == 1
    pool.release(pages)
    assert counts(pool) == (2, 2, 0)  # the third was not full
    found = pool.find(keys_of([1, 2, 3, 4, 9, 9]))
    assert found == pages[:2] and counts(pool) == (2, 2, 0)
    pool.share(found)
    pool.share(found[:1])
    assert counts(pool) == (2, 0, 2) and [pool.owners(page) for page in found] == [2, 1]
    pool.release(found)
    assert counts(pool) == (2, 1, 1)
    pool.release(found[:1])
    assert counts(pool) == (2, 2, 0)


def test_beginnings_outlive_their_ends_and_the_recently_used_the_others():
    pool = PagePool(4, SIZE)
    old, new = held(pool, [1, 2, 3, 4]), held(pool, [5, 6, 7, 8])
    pool.release(old)
    pool.release(new)
    pool.share(old[:1])  # used again, and so the last to go
    pool.release(old[:1])
    assert [pool.take(1)[0] for _ in range(4)] == [old[1], new[1], new[0], old[0]]
    assert pool.find(keys_of([1, 2])) == []


def test_a_page_is_found_behind_all_before_it_alone():
    pool, keys = PagePool(3, SIZE), keys_of([1, 2, 3, 4])
    pages = pool.take(2)
    for page, key in zip(pages, keys, strict=True):
        pool.register(page, key)
    pool.release(pages[:1], "older")
    pool.release(pages[1:], "newer")
    assert pool.find(keys) == pages
    pool.take(2)
    assert pool.cached == 1 and pool.find(keys) == []


def test_out_of_pages_changes_nothing():
    pool = PagePool(3, SIZE)
    pages = held(pool, [1, 2, 3, 4])
    pool.release(pages[1:])
    with pytest.raises(OutOfPages, match="3 pages were asked for; of 3, 1 are free and 1 cached"):
        pool.take(3)
    assert counts(pool) == (1, 1, 1) and pool.find(keys_of([1, 2, 3, 4])) == pages
    assert len(pool.take(2)) == 2 and pool.take(0) == []


def test_a_content_has_one_page():
    pool = PagePool(4, SIZE)
    key = keys_of([1, 2])[0]
    first, second = pool.take(2)
    assert pool.register(first, key) and pool.register(first, key)
    assert not pool.register(second, key)
    pool.release([second])
    assert counts(pool) == (3, 0, 1) and pool.find([key]) == [first]
    with pytest.raises(ValueError, match=f"page {first} is registered under another key"):
        pool.register(first, keys_of([3, 4])[0])


def test_without_a_prefix_cache_nothing_is_kept():
    pool = PagePool(2, SIZE, prefix_cache=False)
    (page,) = pool.take(1)
    assert not pool.register(page, keys_of([1, 2])[0])
    pool.release([page])
    assert counts(pool) == (2, 0, 0) and pool.find(keys_of([1, 2])) == []


def test_misuse_is_refused():
    pool = PagePool(2, SIZE)
    with pytest.raises(ValueError, match="page 1 has no owner to release"):
        pool.release([1])
    with pytest.raises(ValueError, match="page 1 is free"):
        pool.share([1])
    with pytest.raises(ValueError, match="page 1 has no owner to register"):
        pool.register(1, keys_of([1, 2])[0])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"pages": 0, "page_size": 1}, "pages = 0; it must be at least 1"),
        ({"pages": 1, "page_size": 0}, "page_size = 0; it must be at least 1"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            PagePool(**arguments)


def test_hit_statistics():
    pool = PagePool(1, SIZE)
    assert pool.hits.rate == 0
    pool.hits.record(asked=10, found=4)
    pool.hits.record(asked=10, found=0)
    assert (pool.hits.asked, pool.hits.found, pool.hits.rate) == (20, 4, 0.2)


class Pool(RuleBasedStateMachine):
    """A pool beside a model of it that knows contents by their tokens and looks for them one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(6, SIZE)
        self.tables: list[list[int]] = []  # of the sequences that hold pages
        self.contents: dict[tuple[int, ...], int] = {}  # all tokens up to a page's end → that page
        self.unused: list[int] = []  # without owners, of known content, least recently used first

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def begin(self, tokens: list[int]) -> None:
        """A sequence takes its pages as a prompt does, and registers those that it fills."""
        keys = keys_of(tokens)
        prefixes = [tuple(tokens[: end * SIZE]) for end in range(1, len(keys) + 1)]
        known = 0
        while known < len(prefixes) and prefixes[known] in self.contents:
            known += 1
        found = self.pool.find(keys)
        assert found == [self.contents[prefix] for prefix in prefixes[:known]]
        self.pool.share(found)
        self.unused = [page for page in self.unused if page not in found]
        count = self.pool.pages_for(len(tokens)) - known
        before = counts(self.pool)
        if count > self.pool.available:
            with pytest.raises(OutOfPages):
                self.pool.take(count)
            assert counts(self.pool) == before
            self.tables.append(found)
            return
        taken = self.pool.take(count)
        evicted = max(0, count - before[0])
        assert taken[count - evicted :] == self.unused[:evicted]
        self.contents = {prefix: page for prefix, page in self.contents.items() if page not in taken}
        self.unused = self.unused[evicted:]
        self.tables.append(found + taken)
        for page, key, prefix in zip(taken, keys[known:], prefixes[known:], strict=False):
            # A page after one that was forgotten may be known still.
            assert self.pool.register(page, key) == (prefix not in self.contents)
            self.contents.setdefault(prefix, page)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        held = {page for other in self.tables for page in other}
        self.unused += [page for page in reversed(table) if page not in held and page in self.contents.values()]

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.pool.share(table)
        self.tables.append(list(table))

    @invariant()
    def accounts_are_exact(self) -> None:
        assert sum(counts(self.pool)) == self.pool.pages
        assert self.pool.used + self.pool.available == self.pool.pages
        owners = Counter(page for table in self.tables for page in table)
        assert all(self.pool.owners(page) == owners[page] for page in range(self.pool.pages))
        assert self.pool.used == len(owners) and self.pool.cached == len(self.unused)

    def teardown(self) -> None:
        for table in self.tables:
            self.pool.release(table)
        assert self.pool.used == 0 and len(self.pool.take(self.pool.pages)) == self.pool.pages
        assert counts(self.pool) == (0, 0, self.pool.pages)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_sessions_are_forgotten_whole_the_longest_unused_first():
    pool = PagePool(6, 4)
    first, second = pool.take(3), pool.take(3)
    for number, page in enumerate([*first, *second]):
        pool.register(page, bytes([number]))
    pool.release(first, "a")
    pool.release(second, "b")
    # Session a is used again: one of its pages is shared and given back.
    pool.share(first[:1])
    pool.release(first[:1], "a")
    assert pool.take(3) == second[::-1]  # all of b's, the end first
    assert pool.find([bytes([n]) for n in range(3)]) == first and pool.find([bytes([3])]) == []
    assert pool.take(2) == [first[2], first[1]] and pool.cached == 1
    pool.forget()
    assert (pool.cached, pool.free) == (0, 1)
