"""The scheduler: each sequence gets the tokens it would get alone, in bounded time, and every page is accounted for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulated_device import END, SIZE, Engine, numbers, shape

from engine.scheduler.page_pool import PagePool
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.sequence import Sequence, Step


def test_decodes_come_first_then_prompts_in_order_within_the_budget():
    engine = Engine(max_running=3, step_tokens=10)
    engine.add("a", numbers(4, 100))
    engine.add("b", numbers(11, 200))
    engine.add("c", numbers(2, 300))
    engine.add("d", numbers(1, 400))
    assert shape(engine.step()) == [("a", 0, 4, True), ("b", 0, 6, False)]
    step = engine.step()
    assert shape(step) == [("a", 4, 1, True), ("b", 6, 5, True), ("c", 0, 2, True)]
    assert step.decodes == 1 and step.tokens == 8
    assert shape(engine.step()) == [("a", 5, 1, True), ("b", 11, 1, True), ("c", 2, 1, True)]
    assert [sequence.id for sequence in engine.scheduler.waiting] == ["d"]  # three run
    engine.drain()
    assert [sequence.id for sequence in engine.finished] == ["a", "b", "c", "d"]
    engine.check_empty()


def test_a_cached_prompt_computes_its_last_token():
    engine = Engine()
    prompt = numbers(2 * SIZE)
    engine.add("first", prompt)
    engine.drain()
    again = engine.add("again", prompt)
    longer = engine.add("longer", [*prompt, 7])
    assert shape(engine.step()) == [("again", SIZE, SIZE, True), ("longer", 2 * SIZE, 1, True)]
    assert again.pages[0] == longer.pages[0]
    assert (engine.pool.hits.asked, engine.pool.hits.found) == (8 + 8 + 9, 4 + 8)
    engine.drain()
    engine.check_empty()


def test_salts_share_nothing():
    engine = Engine(step_tokens=64)
    prompts = [numbers(2), numbers(2 * SIZE)]
    mine = [engine.add(f"mine {index}", prompt, new=2 * SIZE, salt=b"mine") for index, prompt in enumerate(prompts)]
    engine.drain()
    for sequence in mine:
        engine.add(f"theirs {sequence.id}", sequence.tokens, salt=b"theirs")
        engine.add(f"again {sequence.id}", sequence.tokens, salt=b"mine")
    assert [chunk.begin > 0 for chunk in engine.step().chunks] == [False, True, False, True]
    engine.drain()


def test_a_prompt_is_shared_in_the_step_that_computes_it():
    engine = Engine(max_running=8, step_tokens=64)
    for id in range(8):
        engine.add(f"{id}", [*numbers(3 * SIZE), 50 + id])
    assert [chunk.count for chunk in engine.step().chunks] == [3 * SIZE + 1] + [1] * 7
    assert engine.pool.used == 3 + 8
    engine.drain()
    engine.check_empty()


def test_generated_pages_are_found_again():
    engine = Engine(ahead=1)
    first = engine.add("first", numbers(2), new=3 * SIZE)
    engine.drain()
    engine.add("next turn", [*first.tokens, 9])
    assert engine.step().chunks[0].begin == 3 * SIZE
    engine.drain()


def test_memory_is_used_to_the_last_page_before_the_last_in_rank_is_preempted():
    engine = Engine(pages=5, max_running=2)
    old = engine.add("old", numbers(SIZE), new=2 * SIZE + 1)  # 3 pages at its end
    young = engine.add("young", numbers(SIZE, 50), new=4 * SIZE + 1)  # 5
    for _ in range(SIZE + 1):
        assert engine.step().preempted == []
    assert engine.pool.available == 1  # both have begun their second page
    step = engine.step()
    assert step.preempted == [young] and shape(step) == [("old", 2 * SIZE, 1, True)]
    assert (young.computed, young.pages, young.slot) == (0, [], -1) and engine.scheduler.waiting == [young]
    engine.drain()
    assert (old.preemptions, young.preemptions) == (0, 1)
    assert engine.pool.hits.asked == 2 * SIZE  # not again for what was preempted
    engine.check_empty()


def test_a_sequence_is_let_in_with_a_page_to_grow_for_each_that_runs():
    engine = Engine(pages=5)
    engine.add("runs", numbers(SIZE), new=2 * SIZE)
    engine.add("fits", numbers(2 * SIZE, 50))
    engine.add("does not", numbers(1, 90))
    assert [chunk.sequence.id for chunk in engine.step().chunks] == ["runs", "fits"]
    assert engine.pool.available == 2
    steps = engine.drain()
    assert not any(step.preempted for step in steps)
    engine.check_empty()


def test_the_preempted_go_back_before_those_that_came_later():
    engine = Engine(pages=5, max_running=2)
    engine.add("old", numbers(SIZE), new=2 * SIZE + 1)
    engine.add("young", numbers(SIZE, 50), new=2 * SIZE + 1)
    engine.add("later", numbers(1, 90))
    while not (step := engine.step()).preempted:
        pass
    assert [sequence.id for sequence in step.preempted] == ["young"]
    assert [sequence.id for sequence in engine.scheduler.waiting] == ["young", "later"]
    low = engine.add("low", numbers(1, 95), priority=1)
    assert engine.scheduler.waiting[-1] is low
    engine.drain()
    assert [sequence.id for sequence in engine.finished] == ["old", "young", "later", "low"]


def test_priorities():
    engine = Engine(max_running=1)
    for id, priority in (("low", 2), ("high", 0), ("middle", 1), ("high too", 0)):
        engine.add(id, numbers(3), priority=priority)
    engine.drain()
    assert [sequence.id for sequence in engine.finished] == ["high", "high too", "middle", "low"]


def test_nothing_overtakes_a_sequence_that_waits_for_pages():
    engine = Engine(pages=8, max_running=4)
    engine.add("first", numbers(3 * SIZE), new=8)
    large = engine.add("large", numbers(6 * SIZE, 50), new=1)
    admitted = False
    for id in range(100, 140):  # there are always pages for one of these
        if not admitted:
            engine.add(f"{id}", numbers(2, id), new=1)
        step = engine.step()
        admitted = admitted or any(chunk.sequence is large for chunk in step.chunks)
        assert admitted or {chunk.sequence.id for chunk in step.chunks} == {"first"}
    assert admitted
    engine.drain()
    engine.check_empty()


@pytest.mark.parametrize("priority", [0, 1, 3])
def test_low_priorities_wait_a_bounded_time_under_a_flood_of_high_ones(priority: int):
    engine = Engine(max_running=2, ageing=10)
    low = engine.add("low", numbers(3), priority=priority)
    first_chunk = None
    while first_chunk is None:
        for flood in range(2):  # twice what can be served
            engine.add(f"{engine.scheduler.steps}.{flood}", numbers(2, 100), new=2)
        if any(chunk.sequence is low for chunk in engine.step().chunks):
            first_chunk = engine.scheduler.steps
        assert engine.scheduler.steps < 1000
    # Of the flood, what came in the first 10 steps of each level: twice 10 sequences that take two steps, two at once.
    assert first_chunk <= 1 + priority * 10 * 2 + 2
    assert first_chunk > priority * 10


def test_a_step_is_scheduled_before_the_results_of_the_one_before():
    engine = Engine()
    scheduler = engine.scheduler
    a = engine.add("a", numbers(3), new=3)
    b = engine.add("b", numbers(5), new=9)
    steps = [scheduler.schedule() for _ in range(3)]
    assert [shape(step) for step in steps] == [
        [("a", 0, 3, True), ("b", 0, 5, True)],
        [("a", 3, 1, True), ("b", 5, 1, True)],
        [("a", 4, 1, True), ("b", 6, 1, True)],
    ]
    assert len(a.tokens) == 3 and a.length == 6 == a.limit and len(a.pages) == 2
    assert shape(scheduler.schedule()) == [("b", 7, 1, True)]
    assert a.state == "drained" and a.pages == [] and len(scheduler) == 2  # nothing of it is left to schedule
    assert scheduler.append(b, [30]) and scheduler.append(b, [END])
    scheduler.finish(b)
    assert not scheduler.append(b, [31]) and not scheduler.append(b, [32])  # were on their way
    assert b.tokens == [*numbers(5), 30, END]
    assert scheduler.schedule().chunks == []
    for token in (40, 41, 42):
        assert scheduler.append(a, [token])
    with pytest.raises(ValueError, match="sequence 'a' expects no token"):
        scheduler.append(a, [43])
    scheduler.finish(a)
    assert a.tokens == [*numbers(3), 40, 41, 42]
    engine.check_empty()


def test_a_preempted_sequence_waits_for_the_tokens_on_their_way():
    engine = Engine(pages=3, max_running=2)
    scheduler = engine.scheduler
    engine.add("old", numbers(SIZE), new=SIZE + 1)
    young = engine.add("young", numbers(1, 50), new=6)
    while not (step := scheduler.schedule()).preempted:
        pass
    assert step.preempted == [young] and len(young.tokens) == 1 and young.length == SIZE + 1
    assert scheduler.schedule().chunks == [] and scheduler.running == []
    for token in (60, 61, 62, 63):
        assert scheduler.schedule().chunks == []
        assert scheduler.append(young, [token])
    assert shape(scheduler.schedule()) == [("young", 0, SIZE + 1, True)]


def test_forks_share_the_prompt_and_copy_its_last_page():
    engine = Engine(max_running=4)
    parent = engine.add("1", numbers(2 * SIZE + 3), new=6)
    forks = [engine.add(id, numbers(2 * SIZE + 3), new=6, parent=parent) for id in ("2", "3")]
    assert shape(engine.step()) == [("1", 0, 11, True)]
    step = engine.step()
    assert shape(step)[1:] == [("2", 10, 1, True), ("3", 10, 1, True)]
    assert step.copies == [(parent.pages[2], fork.pages[2]) for fork in forks]
    assert len({sequence.pages[2] for sequence in (parent, *forks)}) == 3
    assert all(fork.pages[:2] == parent.pages[:2] for fork in forks)
    assert [engine.pool.owners(page) for page in parent.pages] == [3, 3, 1]
    engine.drain()
    engine.check_empty()
    assert len({tuple(sequence.tokens) for sequence in engine.finished}) == 3


def test_forks_without_a_page_to_copy_or_a_parent():
    engine = Engine(max_running=4)
    parent = engine.add("parent", numbers(SIZE + 1), new=4)
    engine.add("at a page's end", numbers(SIZE + 1), new=4, parent=parent)
    assert [chunk.count for chunk in engine.step().chunks] == [SIZE + 1, 1]  # by the prefix cache, in the same step
    engine.drain()
    engine.add("late", numbers(SIZE + 1), parent=parent)
    step = engine.step()
    assert shape(step) == [("late", SIZE, 1, True)] and not step.copies
    engine.drain()


def test_forks_need_no_prefix_cache():
    pool = PagePool(16, SIZE, prefix_cache=False)
    scheduler = Scheduler(pool, 4, 16, 64)
    parent = Sequence("parent", numbers(SIZE + 2), 10)
    scheduler.add(parent)
    scheduler.add(Sequence("fork", numbers(SIZE + 2), 10, parent=parent))
    scheduler.add(Sequence("other", numbers(SIZE + 2), 10))
    assert shape(scheduler.schedule()) == [("parent", 0, 6, True)]
    step = scheduler.schedule()
    assert shape(step)[1:] == [("fork", 5, 1, True), ("other", 0, 6, True)] and len(step.copies) == 1
    for id in ("parent", "fork", "other"):
        scheduler.abort(id)
    assert pool.free == pool.pages


def test_deadlines():
    engine = Engine(max_running=1)
    running = engine.add("running", numbers(3), new=20, deadline=2.0)
    waiting = [engine.add(f"waiting {deadline}", numbers(3), deadline=deadline) for deadline in (1.0, 0.8)]
    engine.add("patient", numbers(3))
    never = engine.add("aborted", numbers(3), deadline=0.5)
    assert engine.scheduler.abort("aborted") is never
    assert engine.step().timed_out == []
    engine.now = 1.0
    assert engine.step().timed_out == waiting[::-1]
    engine.now = 2.5
    step = engine.step()
    assert step.timed_out == [running] and shape(step) == [("patient", 0, 3, True)]
    assert running.state == "ended" and running.pages == []
    engine.drain()
    engine.check_empty()


OTHER = Sequence("other", [5, 6], 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": []}, "'x' has no tokens"),
        ({"limit": 3}, "'x' has 3 tokens and a limit of 3: none is new"),
        ({"limit": 66}, "'x' takes 65 positions, above max_len = 64"),
        ({"tokens": numbers(65), "limit": 66}, "'x' takes 65 positions, above max_len = 64"),
        ({"limit": 26}, "'x' takes 7 pages for 26 tokens; the pool has 6"),
        ({"priority": -1}, "'x' has priority -1; it must be at least 0"),
        ({"id": "live"}, "'live' is live already"),
        ({"parent": OTHER}, "'x' and its parent 'other' differ in prompt or salt"),
        ({"tokens": [5, 6], "parent": OTHER, "salt": b"x"}, "'x' and its parent 'other' differ in prompt or salt"),
    ],
)
def test_what_can_never_run_is_refused(arguments: dict[str, Any], message: str):
    engine = Engine(pages=6)
    live = engine.add("live", numbers(3))
    sequence = Sequence(**{"id": "x", "tokens": [1, 2, 3], "limit": 5, **arguments})
    with pytest.raises(ValueError, match=f"sequence {message}"):
        engine.scheduler.add(sequence)
    assert len(engine.scheduler) == 1 and sequence.state == "new"
    engine.drain()
    assert engine.finished == [live]
    with pytest.raises(ValueError, match="'live' was added before"):
        engine.scheduler.add(live)
    engine.add("live", numbers(24), new=1)  # an id again, and every page
    engine.drain()
    engine.check_empty()


def test_ending_what_is_not_live():
    engine = Engine()
    sequence = engine.add("a", numbers(3), new=1)
    engine.drain()
    for id in ("a", "unknown"):
        with pytest.raises(KeyError, match=f"no live sequence has the id '{id}'"):
            engine.scheduler.abort(id)
    with pytest.raises(KeyError, match="sequence 'a' is not live"):
        engine.scheduler.finish(sequence)
    engine.add("a", numbers(3))
    with pytest.raises(KeyError, match="sequence 'a' is not live"):  # another one has its id now
        engine.scheduler.finish(sequence)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_running": 0}, "max_running = 0; it must be at least 1"),
        ({"step_tokens": 3}, "step_tokens = 3; it must be at least 4"),
        ({"max_len": 0}, "max_len = 0; it must be at least 1"),
        ({"ageing": -1}, "ageing = -1; it must be at least 0"),
    ],
)
def test_settings_are_checked(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Scheduler(PagePool(4, SIZE), **{"max_running": 4, "step_tokens": 8, "max_len": 64, **arguments})


PRIORITY = st.sampled_from([0, 0, 0, 1, 2])
PATIENCE = st.integers(1, 40)


class Traces(RuleBasedStateMachine):
    """Any order of arrivals, steps, drafts, aborts and deadlines, with results up to two steps late."""

    @initialize(
        pages=st.integers(12, 18), max_running=st.integers(1, 5), spare=st.integers(0, 16), ahead=st.integers(0, 2),
        drafts=st.sampled_from([0, 1, 3, 7]), accepted=st.integers(0, 5),
    )  # fmt: skip
    def start(self, pages: int, max_running: int, spare: int, ahead: int, drafts: int, accepted: int) -> None:
        self.engine = Engine(pages, max_running, max_running + spare, ahead, page_size=2, accepted=accepted, ageing=5)
        self.scheduler, self.pool, self.drafts = self.engine.scheduler, self.engine.pool, drafts
        self.live: list[Sequence] = []
        self.bounds: dict[int, int] = {}  # arrival → the step by which the sequence has ended
        self.arrived: dict[int, int] = {}  # arrival → steps scheduled before it

    @rule(prompt=st.lists(st.integers(1, 2), min_size=1, max_size=12), new=st.integers(1, 12), priority=PRIORITY)
    def add(self, prompt: list[int], new: int, priority: int) -> None:
        self.add_one(prompt, new, priority=priority)

    @rule(prompt=st.lists(st.integers(1, 2), min_size=1, max_size=12), new=st.integers(1, 12), patience=PATIENCE)
    def add_with_deadline(self, prompt: list[int], new: int, patience: int) -> None:
        self.add_one(prompt, new, deadline=self.engine.now + patience)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), new=st.integers(1, 12), priority=PRIORITY)
    def fork(self, data: st.DataObject, new: int, priority: int) -> None:
        parent = self.one_of_live(data)
        self.add_one(parent.tokens[: parent.prompt_length], new, priority=priority, parent=parent)

    def add_one(self, prompt: list[int], new: int, **arguments: Any) -> None:
        steps = self.scheduler.steps
        sequence = self.engine.add(len(self.arrived), prompt, new, self.drafts, **arguments)
        self.live.append(sequence)
        self.arrived[sequence.arrival] = steps
        self.bound_waiting()

    @precondition(lambda self: self.live and self.drafts)
    @rule(data=st.data(), drafts=st.integers(0, 7))
    def propose(self, data: st.DataObject, drafts: int) -> None:
        self.one_of_live(data).drafts = drafts

    @rule(count=st.integers(1, 5))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = self.one_of_live(data)
        assert self.scheduler.abort(sequence.id) is sequence
        self.forget_ended()

    def one_of_live(self, data: st.DataObject) -> Sequence:
        return self.live[data.draw(st.integers(0, len(self.live) - 1))]

    def bound_waiting(self) -> None:
        """The bound that the Scheduler documents, of those for whom it begins to hold."""
        share = self.scheduler.step_tokens - self.scheduler.max_running + 1
        for sequence in self.live:
            aged = self.arrived[sequence.arrival] + sequence.priority * self.scheduler.ageing
            if sequence.arrival in self.bounds or self.scheduler.steps < aged:
                continue
            ahead = [x for x in self.live if x.rank <= sequence.rank or x.state == "running"]
            costs = [x.limit - x.prompt_length + -(-x.limit // share) + 2 for x in ahead]
            self.bounds[sequence.arrival] = self.scheduler.steps + 2 * sum(costs)

    def forget_ended(self) -> None:
        self.live = [sequence for sequence in self.live if sequence.state != "ended"]

    def step(self) -> None:
        scheduler, engine = self.scheduler, self.engine
        decoding = [x for x in scheduler.running if x.decoding and x.length < x.limit]
        waited = list(scheduler.waiting)
        full = {x.id: set(x.pages[: x.registered]) for x in scheduler.running}
        engine.now += 1
        run = engine.device.run
        engine.device.run = lambda step: (self.check(step, decoding, waited, full), run(step))[1]
        engine.step()
        engine.device.run = run
        self.bound_waiting()
        self.forget_ended()
        for sequence in self.live:
            engine.check_prefix_cache(sequence)
            if engine.ahead <= 1 and sequence.arrival in self.bounds:
                assert scheduler.steps <= self.bounds[sequence.arrival], f"{sequence} has not ended in time"

    def check(self, step: Step, decoding: list[Sequence], waited: list[Sequence], full: dict[Any, set[int]]) -> None:
        """What a step does, given who decoded and who waited before it, and the full pages that each one held."""
        scheduler = self.scheduler
        assert step.tokens == sum(chunk.count for chunk in step.chunks) <= scheduler.step_tokens
        decodes = [chunk.sequence for chunk in step.chunks[: step.decodes]]
        gone = [*step.preempted, *step.timed_out]
        # Decoding is starved neither by prompts nor by pages that a lower rank holds, nor by others' drafts.
        assert decodes == [x for x in decoding if x not in gone and x.state == "running"]
        for sequence, _, count, samples in step.chunks[: step.decodes]:
            assert samples and 1 <= count <= 1 + sequence.drafts and sequence.expected[-1] == count
        if scheduler.running:
            first = scheduler.running[0]
            at_limit = first.decoding and first not in decoding
            assert at_limit or any(chunk.sequence is first for chunk in step.chunks), "the first in rank moves on"
        assert sum(not sequence.decoding for sequence in scheduler.running) <= 1, "one prompt is unfinished"
        if step.preempted:
            assert all(x.state == "waiting" for x in step.preempted)
            assert min(x.rank for x in step.preempted) > max(x.rank for x in scheduler.running)
        admitted = [x for x in waited if x.state == "running"]
        if admitted:
            assert max(x.rank for x in admitted) < min([x.rank for x in scheduler.waiting], default=(10**9, 0))
        sealed = {page for x in scheduler.running for page in full.get(x.id, set()).intersection(x.pages)}
        for number, (sequence, begin, count, _) in enumerate(step.chunks):
            begin = self.engine.device.positions[sequence.slot] if number < step.decodes else begin
            pages = sequence.pages[begin // self.pool.page_size : (begin + count - 1) // self.pool.page_size + 1]
            assert not sealed.intersection(pages), "a page that was full is written again"
        assert not sealed.intersection(target for _, target in step.copies)

    @invariant()
    def accounts_are_exact(self) -> None:
        pool, scheduler = self.pool, self.scheduler
        assert pool.free + pool.cached + pool.used == pool.pages
        owners = Counter(page for sequence in self.live for page in sequence.pages)
        assert [pool.owners(page) for page in range(pool.pages)] == [owners[page] for page in range(pool.pages)]
        assert pool.used == len(owners)
        assert len(scheduler) == len(self.live) and len(scheduler.running) <= scheduler.max_running
        slots = {sequence.slot for sequence in scheduler.running}
        assert len(slots) == len(scheduler.running) and slots <= set(range(scheduler.max_running))
        for sequences in (scheduler.waiting, scheduler.running):
            assert sequences == sorted(sequences, key=lambda sequence: sequence.rank)
        for sequence in self.live:
            rejected = 7 * (self.engine.ahead + 1)  # at most, and its pages are kept
            least, most = pool.pages_for(sequence.computed), pool.pages_for(sequence.computed + rejected)
            assert least <= len(set(sequence.pages)) == len(sequence.pages) <= most
            assert len(sequence.pages) <= pool.pages_for(sequence.positions)
            assert len(sequence.tokens) + sum(sequence.expected) == sequence.length <= sequence.limit
            assert sequence.computed < sequence.length
            assert sequence.registered <= len(sequence.pages)
            if sequence.state != "running":
                assert sequence.slot == -1 and not sequence.pages
            for index, page in enumerate(sequence.pages):
                full = (index + 1) * pool.page_size <= min(sequence.computed, len(sequence.tokens))
                assert full or pool.owners(page) == 1, "a page that is not full has one owner"

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while self.live:
            self.step()
        self.engine.check_empty()


TestTraces = Traces.TestCase
# Without Phase.explain, whose tracing makes the search for the shortest failing trace take minutes.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
TestTraces.settings = settings(max_examples=300, stateful_step_count=40, deadline=None, phases=PHASES)
