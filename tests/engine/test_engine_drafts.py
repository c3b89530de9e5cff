"""Steps that yield several tokens of a sequence: proposed, accepted in part, and rolled back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_device import END, SIZE, Engine, numbers, shape

from engine.scheduler.page_pool import PagePool, extend_keys
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.sequence import Sequence

MOST = 8  # tokens that a step yields
STEPS = st.lists(st.integers(1, MOST).flatmap(lambda k: st.tuples(st.just(k), st.integers(1, k))), max_size=6)


def begin(prompt: int, page_size: int = SIZE) -> tuple[Scheduler, Sequence]:
    """A sequence whose prompt has been computed, and its first token chosen."""
    scheduler = Scheduler(PagePool(96, page_size), 2, 64, 100)
    sequence = Sequence("a", numbers(prompt, 100), 90)
    scheduler.add(sequence)
    scheduler.schedule()
    assert scheduler.append(sequence, [1])
    return scheduler, sequence


def books(scheduler: Scheduler, sequence: Sequence) -> tuple[Any, ...]:
    """What is known of a sequence, and of its pages in the prefix cache."""
    keys: list[bytes] = []
    extend_keys(keys, sequence.tokens, scheduler.pool.page_size)
    places = [sequence.pages.index(page) for page in scheduler.pool.find(keys)]
    counts = sequence.length, sequence.computed, sequence.expected, sequence.registered, sequence.state
    return list(sequence.tokens), counts, places


@given(st.integers(1, 9), st.integers(1, 5), STEPS, st.integers(0, 2))
@settings(max_examples=300)
def test_chains_equal_tokens_one_by_one(prompt: int, page_size: int, steps: list[tuple[int, int]], ahead: int):
    """Of each step k tokens proposed and some accepted, up to two steps ahead, against single tokens."""
    chained, sequence = begin(prompt, page_size)
    single, other = begin(prompt, page_size)
    token, on_their_way = 2, []
    for k, accepted in [*steps, *[(0, 0)] * ahead]:
        if k:
            sequence.drafts = k - 1
            (chunk,) = chained.schedule().chunks
            assert (chunk.begin, chunk.count) == (sequence.length - k - 1, k)
            on_their_way.append(accepted)
        if on_their_way and (len(on_their_way) > ahead or not k):
            accepted = on_their_way.pop(0)
            tokens = list(range(token, token + accepted))
            token += accepted
            assert chained.append(sequence, tokens)
            for one in tokens:
                single.schedule()
                assert single.append(other, [one])
            assert sequence.tokens == other.tokens and sequence.registered >= other.registered
    assert books(chained, sequence) == books(single, other)
    for scheduler in (chained, single):
        scheduler.abort("a")
        assert scheduler.pool.used == 0
    assert chained.pool.cached == single.pool.cached  # the same pages are found again


@pytest.mark.parametrize("k", range(1, MOST + 1))
@pytest.mark.parametrize("offset", range(SIZE))
def test_every_place_of_rejection_at_every_place_of_a_page(k: int, offset: int):
    for accepted in range(1, k + 1):
        scheduler, sequence = begin(SIZE + offset)
        known = len(sequence.tokens)
        sequence.drafts = k - 1
        scheduler.schedule()
        assert sequence.computed == known + k - 1 and len(sequence.pages) == scheduler.pool.pages_for(known + k - 1)
        assert scheduler.append(sequence, range(2, 2 + accepted))
        assert (sequence.length, sequence.computed) == (known + accepted, known + accepted - 1)
        # Pages of accepted tokens alone are found, and none beyond: the last token is not computed yet.
        keys: list[bytes] = []
        extend_keys(keys, [*sequence.tokens, *range(50, 60)], SIZE)
        assert scheduler.pool.find(keys) == sequence.pages[: (known + accepted - 1) // SIZE]


def test_the_next_step_is_scheduled_before_drafts_are_verified():
    scheduler, sequence = begin(2)
    sequence.drafts = 3
    assert shape(scheduler.schedule()) == [("a", 2, 4, True)]
    assert shape(scheduler.schedule()) == [("a", 6, 4, True)]  # where it is if all are accepted
    assert len(sequence.pages) == 3 and sequence.length == 11
    assert scheduler.append(sequence, [2, 3])
    assert (sequence.length, sequence.computed, len(sequence.pages)) == (9, 8, 3)
    assert scheduler.append(sequence, [4])
    assert (sequence.length, sequence.computed, len(sequence.pages)) == (6, 5, 3)
    sequence.drafts = 0
    assert shape(scheduler.schedule()) == [("a", 5, 1, True)]


def test_no_step_goes_beyond_the_limit():
    """Drafts end there, and what may be there waits until it is known not to be."""
    engine = Engine(ahead=1, accepted=0)
    sequence = engine.add("a", numbers(3), new=6, drafts=7)
    assert shape(engine.step()) == [("a", 0, 3, True)]
    assert shape(engine.step()) == [("a", 3, 5, True)] and sequence.length == sequence.limit
    assert shape(engine.step()) == [] and len(sequence.tokens) == 5  # of five one was chosen
    assert shape(engine.step()) == [("a", 4, 4, True)]
    engine.drain()
    assert engine.finished == [sequence]
    engine.check_empty()


def test_a_sequence_at_its_limit_for_certain_gives_its_pages_back():
    scheduler, sequence = begin(2)
    sequence.limit, sequence.drafts = 8, 3
    for begins, count in ((2, 4), (6, 1)):
        assert shape(scheduler.schedule()) == [("a", begins, count, True)]
    assert scheduler.schedule().chunks == [] and sequence.state == "running"
    assert scheduler.append(sequence, [2, 3, 4, 5])
    assert scheduler.schedule().chunks == [] and sequence.state == "drained" and scheduler.pool.used == 0
    assert scheduler.append(sequence, [6]) and len(sequence.tokens) == sequence.limit


def test_prompts_come_before_drafts():
    engine = Engine(step_tokens=10)
    engine.add("a", numbers(2), new=40, drafts=7)
    engine.add("b", numbers(2, 50), new=40, drafts=7)
    engine.step()
    engine.add("c", numbers(5, 100))
    step = engine.step()
    assert [chunk.count for chunk in step.chunks] == [4, 1, 5] and step.decodes == 2 and step.tokens == 10


def test_drafts_leave_a_page_to_grow_for_each_that_runs():
    scheduler = Scheduler(PagePool(5, SIZE), 2, 64, 64)
    sequences = [Sequence(id, numbers(SIZE, first), 20) for id, first in (("a", 100), ("b", 200))]
    for sequence in sequences:
        sequence.drafts = 7
        scheduler.add(sequence)
    scheduler.schedule()
    # Each has a second page now, of which it may fill the rest; the last page of the pool is not for drafts.
    assert [chunk.count for chunk in scheduler.schedule().chunks] == [SIZE, SIZE]
    assert scheduler.pool.available == 1 and [len(sequence.pages) for sequence in sequences] == [2, 2]


def test_preempted_while_drafts_are_verified():
    """It waits until they are known, and computes what was accepted of them again."""
    scheduler = Scheduler(PagePool(4, SIZE, prefix_cache=False), 2, 64, 64)
    old, young = Sequence("old", numbers(SIZE, 100), 14), Sequence("young", numbers(1, 200), 14)
    for sequence in (old, young):
        scheduler.add(sequence)
    scheduler.schedule()
    for sequence in (old, young):
        assert scheduler.append(sequence, [1])
    young.drafts = 2
    assert shape(scheduler.schedule()) == [("old", 4, 1, True), ("young", 1, 3, True)]
    for token in range(2, 5):
        assert scheduler.append(old, [token])
        young.drafts = 0
        assert not scheduler.schedule().preempted
    assert scheduler.append(old, [5])
    assert scheduler.schedule().preempted == [young] and (young.computed, young.pages) == (0, [])
    assert scheduler.append(young, [2]) and young.length == 2 + 4 and young.computed == 0
    for token in range(3, 6):
        assert scheduler.schedule().preempted == [] and young.state == "waiting"
        assert scheduler.append(young, [token])
    assert young.tokens == [200, 1, 2, 3, 4, 5] and young.length == 6
    scheduler.abort("old")
    assert shape(scheduler.schedule()) == [("young", 0, 6, True)]


def test_aborted_while_drafts_are_verified():
    engine = Engine(ahead=1, accepted=3)
    sequence = engine.add("a", numbers(3), new=30, drafts=7)
    other = engine.add("b", numbers(3, 50), new=30, drafts=7)
    for _ in range(3):
        engine.step()
    assert engine.scheduler.abort("a") is sequence and sequence.expected
    known = list(sequence.tokens)
    engine.drain()
    assert sequence.tokens == known and engine.finished == [other]
    engine.check_empty()


def test_what_follows_the_end_in_a_chain_is_not_found():
    """Tokens after the one that ends a sequence were computed, but belong to nothing."""
    scheduler, sequence = begin(SIZE - 1)
    sequence.drafts = 7
    scheduler.schedule()
    assert scheduler.append(sequence, [2, 3, END])  # of 2, 3, END, 4, 5, 6, 7, 8
    scheduler.finish(sequence)
    keys: list[bytes] = []
    extend_keys(keys, [*sequence.tokens, 4, 5, 6, 7, 8], SIZE)
    assert len(scheduler.pool.find(keys)) == 1 and scheduler.pool.cached == 1


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([2, 3, 4], "sequence 'a' is given 3 tokens of a step; it chose 1 to 2"),
        ([], "sequence 'a' is given 0 tokens of a step; it chose 1 to 2"),
    ],
)
def test_more_tokens_than_proposed_are_refused(tokens: list[int], message: str):
    scheduler, sequence = begin(2)
    sequence.drafts = 1
    scheduler.schedule()
    with pytest.raises(ValueError, match=message):
        scheduler.append(sequence, tokens)
    assert scheduler.append(sequence, [2, 3])
    with pytest.raises(ValueError, match="sequence 'a' expects no token"):
        scheduler.append(sequence, [4])
