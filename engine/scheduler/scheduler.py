"""Scheduler: which tokens the next step computes, and on which pages.

The scheduler knows a sequence's tokens by count before it knows them by value: a step that computes a sequence's last
token will choose one more. So the next step can be scheduled, and enqueued, while the GPU is still at this one:

    while len(scheduler):
        step = scheduler.schedule()
        enqueue(step)                                 # its results are not waited for
        for chunk, tokens in results(step_before):    # of the chunks that sample
            if scheduler.append(chunk.sequence, tokens) and is_last(tokens[-1]):
                scheduler.finish(chunk.sequence)
        step_before = step

A step of a sequence that decodes may verify drafts, tokens proposed to follow its last one. It chooses a token after
each of them, and yields those up to the first that differs from the draft: one to drafts + 1 tokens. Until they are
appended the scheduler counts with the most, and reserves pages for them; then it rolls back to what was accepted.

Steps run in the order in which they were scheduled. That makes pages safe: one that is released may still be read or
written by a step on its way, and whoever takes it next does so in a later step.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Hashable
from operator import attrgetter

from engine.scheduler.page_pool import PagePool, extend_keys
from engine.scheduler.sequence import ScheduledChunk, Sequence, Step

_by_rank = attrgetter("rank")


class Scheduler:
    """Sequences that wait and that run, by rank: (priority, order of arrival), with ageing.

    A step has one token of each running sequence that decodes, then prompts as far as `step_tokens` go: the one that
    the step before has left unfinished, and those that wait, in order; and drafts in the room that is left. Nothing
    overtakes a sequence for which a slot or pages are missing. It is let in when there are pages for all its tokens and
    one to grow for each that runs, and takes those that the step writes. When a running sequence finds no page, the
    last in rank is preempted: it loses its pages, and computes its tokens again later (those that the prefix cache has
    not kept). The first in rank never is.

    Waiting is bounded. One level of priority is worth `ageing` steps, so a sequence of priority p is overtaken only by
    those that arrive less than p × ageing steps after it. Call S the sequences that are live at that moment, itself
    included, which rank before it or run. Then it ends within

        2 × sum over S of (new tokens + ceil(limit / (step_tokens - max_running + 1)) + 2)

    more steps, where `new tokens` is limit - prompt, and the results of a step are known when the second step after it
    is scheduled. (In every step the first in rank moves on, or what it waits for: by a token that it decodes, or by
    step_tokens - max_running + 1 tokens of its prompt at least. Where drafts on their way may bring it to its limit, it
    does so in every second step.)

    Args:
        pool: The pages.
        max_running: Sequences that run together.
        step_tokens: Tokens of a step, at most.
        max_len: Positions of a sequence, at most (see Sequence.positions).
        ageing: Steps of waiting that make up for one level of priority.
        clock: Seconds, for deadlines.
        mixed: Whether a step may have both tokens that decode and prompts; else it has prompts wherever there are some,
            and sequences that decode wait (the bound above is of mixed steps).
        recompute: Whether a sequence's tokens are all computed again for each new one, as where nothing is kept. The
            results of a step must then be known before the next one is scheduled.

    Raises:
        ValueError: `max_running` or `max_len` is below 1, `ageing` is below 0, or `step_tokens` is below `max_running`.
    """

    def __init__(
        self,
        pool: PagePool,
        max_running: int,
        step_tokens: int,
        max_len: int,
        ageing: int = 1000,
        clock: Callable[[], float] = time.monotonic,
        mixed: bool = True,
        recompute: bool = False,
    ) -> None:
        checks = (("max_running", max_running, 1), ("max_len", max_len, 1), ("ageing", ageing, 0))
        for name, value, least in (*checks, ("step_tokens", step_tokens, max_running)):
            if value < least:
                raise ValueError(f"{name} = {value}; it must be at least {least}")
        self.pool, self.max_running, self.step_tokens, self.max_len = pool, max_running, step_tokens, max_len
        self.ageing, self.clock, self.mixed, self.recompute = ageing, clock, mixed, recompute
        self.steps = 0  # scheduled so far
        self.waiting: list[Sequence] = []  # by rank, as is `running`
        self.running: list[Sequence] = []
        self._live: dict[Hashable, Sequence] = {}
        self._arrivals = 0
        self._slots = list(range(max_running))[::-1]  # the next one last
        self._draining: list[Sequence] = []  # at their limit, if no draft on its way is rejected
        self._deadlines: list[tuple[float, int, Sequence]] = []  # sorted; the arrival decides between equal ones

    def __len__(self) -> int:
        """Sequences that have been added and have not ended."""
        return len(self._live)

    def add(self, sequence: Sequence) -> None:
        """Let `sequence` wait for its turn.

        Raises:
            ValueError: It can never run; names the sequence and why. Nothing has changed.
        """
        self.check(sequence)
        sequence.arrival, self._arrivals = self._arrivals, self._arrivals + 1
        sequence.rank = (self.steps + sequence.priority * self.ageing, sequence.arrival)
        if self.pool.prefix_cache:
            extend_keys(sequence.keys, sequence.tokens, self.pool.page_size, sequence.salt)
        self._live[sequence.id] = sequence
        if sequence.deadline is not None:
            insort(self._deadlines, (sequence.deadline, sequence.arrival, sequence))
        self._wait(sequence)

    def check(self, sequence: Sequence) -> None:
        """Raises ValueError where `add` would."""
        name = f"sequence {sequence.id!r}"
        pages, parent = self.pool.pages_for(sequence.positions), sequence.parent
        if sequence.id in self._live:
            raise ValueError(f"{name} is live already; an id can be used again when its sequence has ended")
        if sequence.state != "new":
            raise ValueError(f"{name} was added before; make a new Sequence")
        if not sequence.tokens:
            raise ValueError(f"{name} has no tokens; it must have at least one")
        if sequence.limit <= sequence.prompt_length:
            raise ValueError(f"{name} has {sequence.prompt_length} tokens and a limit of {sequence.limit}: none is new")
        if sequence.positions > self.max_len:
            raise ValueError(f"{name} takes {sequence.positions} positions, above max_len = {self.max_len}")
        if pages > self.pool.pages:
            raise ValueError(f"{name} takes {pages} pages for {sequence.limit} tokens; the pool has {self.pool.pages}")
        if sequence.priority < 0:
            raise ValueError(f"{name} has priority {sequence.priority}; it must be at least 0")
        if parent and (parent.tokens[: parent.prompt_length] != sequence.tokens or parent.salt != sequence.salt):
            raise ValueError(f"{name} and its parent {parent.id!r} differ in prompt or salt")

    def append(self, sequence: Sequence, tokens: Collection[int]) -> bool:
        """Append the tokens that a step chose for `sequence`, in the order of the steps.

        Where they are fewer than the step had of it, the other drafts were rejected: the positions roll back, and what
        the step wrote there is written again. Its pages the sequence keeps, as its next step needs them.

        Returns:
            False where the sequence has ended since, and the tokens are to be dropped.

        Raises:
            ValueError: No step on its way chooses tokens for it, or not as many.
        """
        if sequence.state == "ended":
            return False
        if not sequence.expected:
            raise ValueError(f"sequence {sequence.id!r} expects no token: no step has sampled one")
        rejected = sequence.expected[0] - len(tokens)
        if rejected < 0 or not tokens:
            chosen = f"it chose 1 to {sequence.expected[0]}"
            raise ValueError(f"sequence {sequence.id!r} is given {len(tokens)} tokens of a step; {chosen}")
        del sequence.expected[0]
        sequence.tokens.extend(tokens)
        if rejected:
            sequence.length -= rejected
            if sequence.state == "running":
                sequence.computed -= rejected
        self._register(sequence)
        return True

    def finish(self, sequence: Sequence) -> None:
        """End `sequence`: its last token is known. What steps on their way compute of it beyond that is dropped.

        Raises:
            KeyError: It is not live; names it.
        """
        if self._live.get(sequence.id) is not sequence:
            raise KeyError(f"sequence {sequence.id!r} is not live")
        self._end(sequence)

    def abort(self, id: Hashable) -> Sequence:
        """End a sequence that waits or runs, and return it.

        Raises:
            KeyError: No live sequence has that id; names it.
        """
        if id not in self._live:
            raise KeyError(f"no live sequence has the id {id!r}")
        sequence = self._live[id]
        self._end(sequence)
        return sequence

    def schedule(self) -> Step:
        """The next step; one without chunks where nothing can run before results are known or sequences are added."""
        self.steps += 1
        timed_out = self._expire()
        self._drain()
        step = Step([], 0, [], [], timed_out)
        if not self.mixed:
            self._fill(step, decoding=False)
        if not step.chunks:
            self._fill(step, decoding=True)
        return step

    def _fill(self, step: Step, decoding: bool) -> None:
        """Give the step its chunks. decoding: whether sequences that decode have a part in it."""
        decodes: list[ScheduledChunk] = []
        prompts: list[ScheduledChunk] = []
        page_size, drafts = self.pool.page_size, 0
        budget = self.step_tokens  # for prompts
        if decoding:
            budget -= sum(sequence.decoding for sequence in self.running)
        for sequence in self.running:  # who is preempted stands at its end, and has no part in the step yet
            if sequence.decoding and (not decoding or sequence.length == sequence.limit):
                continue  # at its limit, if no draft on its way is rejected
            count = 1 if sequence.decoding else min(sequence.length - sequence.computed, budget)
            end = sequence.computed + count
            if end > len(sequence.pages) * page_size and not self._grow(sequence, end, step.preempted):
                break
            if sequence.decoding:
                decodes.append(self._advance(sequence, 1))
                drafts += sequence.drafts
            elif count:
                budget -= count
                prompts.append(self._advance(sequence, count))
                self._register(sequence)
        while self.waiting and budget and not step.preempted and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            if not self._admit(sequence, prompts, step.copies):
                break
            count = min(sequence.length - sequence.computed, budget)
            self._grow(sequence, sequence.computed + count, step.preempted)
            budget -= count
            prompts.append(self._advance(sequence, count))
            self._register(sequence)
        step.chunks, step.decodes = decodes + prompts, len(decodes)
        if drafts:
            self._add_drafts(step)

    def _add_drafts(self, step: Step) -> None:
        """Let sequences that decode verify drafts, on tokens and pages that nothing else needs in this step."""
        page_size = self.pool.page_size
        budget = self.step_tokens - step.tokens
        for index, chunk in enumerate(step.chunks[: step.decodes]):
            sequence = chunk.sequence
            count = min(sequence.drafts, budget, sequence.limit - sequence.length)
            missing = self.pool.pages_for(sequence.computed + count) - len(sequence.pages)
            if missing > 0 and missing + len(self.running) <= self.pool.available:  # a page to grow is left for each
                sequence.pages += self.pool.take(missing)
            count = min(count, len(sequence.pages) * page_size - sequence.computed)
            if count > 0:
                budget -= count
                step.chunks[index] = chunk._replace(count=1 + count)
                sequence.computed += count
                sequence.length += count
                sequence.expected[-1] += count

    def _expire(self) -> list[Sequence]:
        timed_out = []
        if self._deadlines:
            now = self.clock()
            while self._deadlines and self._deadlines[0][0] <= now:
                timed_out.append(self._deadlines[0][2])
                self._end(timed_out[-1])
        return timed_out

    def _drain(self) -> None:
        """Take pages and slots from the sequences whose last token a step before has chosen for certain."""
        draining, self._draining = self._draining, []
        for sequence in draining:
            if sequence.state != "running" or sequence.length < sequence.limit:
                continue
            if any(most > 1 for most in sequence.expected):
                self._draining.append(sequence)  # its drafts may be rejected
                continue
            self._stop(sequence)
            sequence.state = "drained"

    def _grow(self, sequence: Sequence, end: int, preempted: list[Sequence]) -> bool:
        """Take pages for the tokens up to `end`, preempting the last in rank; False where that is `sequence` itself."""
        count = self.pool.pages_for(end) - len(sequence.pages)
        while self.pool.available < count:
            last = self.running[-1]
            self._stop(last)
            self._wait(last)
            last.preemptions += 1
            preempted.append(last)
            if last is sequence:
                return False
        sequence.pages += self.pool.take(count)
        return True

    def _advance(self, sequence: Sequence, count: int) -> ScheduledChunk:
        begin = sequence.computed
        sequence.computed = end = begin + count
        samples = end == sequence.length
        if samples:
            sequence.length += 1
            sequence.expected.append(1)
            sequence.decoding = not self.recompute
            if self.recompute:
                sequence.computed = 0
            if sequence.length == sequence.limit:
                self._draining.append(sequence)
        return ScheduledChunk(sequence, begin, count, samples)

    def _admit(self, sequence: Sequence, prompts: list[ScheduledChunk], copies: list[tuple[int, int]]) -> bool:
        """Let the first that waits run, on cached pages of its prefix; False where it must wait on."""
        if len(sequence.tokens) < sequence.length:
            return False  # it was preempted, and a token of it is on its way
        size, parent = self.pool.page_size, sequence.parent
        # At least the last token is computed: its logits are needed.
        pages = self.pool.find(sequence.keys[: (sequence.length - 1) // size])
        computed = len(pages) * size
        forked = sequence.prompt_length - 1  # tokens that the parent's pages hold for it
        copied = None
        if parent and parent.computed >= forked > computed:
            if any(chunk.sequence is parent for chunk in prompts):
                return False  # its last page is not complete before this step has run
            pages, computed = parent.pages[: forked // size], forked
            copied = parent.pages[forked // size] if forked % size else None
        self.pool.share(pages)
        if self.pool.available < self.pool.pages_for(sequence.length) - len(pages) + len(self.running):
            self.pool.release(pages)
            return False
        if not sequence.preemptions and parent is None:  # a fork's prompt is its parent's
            self.pool.hits.record(sequence.length, computed)
        sequence.pages, sequence.computed, sequence.registered = pages, computed, len(pages)
        if copied is not None:
            sequence.pages += self.pool.take(1)
            copies.append((copied, sequence.pages[-1]))
        sequence.state, sequence.slot = "running", self._slots.pop()
        del self.waiting[0]
        insort(self.running, sequence, key=_by_rank)
        return True

    def _register(self, sequence: Sequence) -> None:
        """Register the pages that `sequence` has filled with known tokens in the prefix cache."""
        size = self.pool.page_size
        full = min(len(sequence.tokens), sequence.computed) // size
        if full == sequence.registered or not self.pool.prefix_cache:
            return
        extend_keys(sequence.keys, sequence.tokens, size, sequence.salt)
        for index in range(sequence.registered, full):
            self.pool.register(sequence.pages[index], sequence.keys[index])
        sequence.registered = full

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = "waiting"
        insort(self.waiting, sequence, key=_by_rank)

    def _stop(self, sequence: Sequence) -> None:
        """Take `sequence` out of those that run, with its pages and its slot."""
        _remove(self.running, sequence)
        self.pool.release(sequence.pages, sequence.session)
        self._slots.append(sequence.slot)
        sequence.pages, sequence.computed, sequence.registered = [], 0, 0
        sequence.slot, sequence.decoding = -1, False

    def _end(self, sequence: Sequence) -> None:
        if sequence.state == "running":
            self._stop(sequence)
        elif sequence.state == "waiting":
            _remove(self.waiting, sequence)
        sequence.state = "ended"
        del self._live[sequence.id]
        if sequence.deadline is not None:
            entry = (sequence.deadline, sequence.arrival)
            del self._deadlines[bisect_left(self._deadlines, entry, key=lambda item: item[:2])]


def _remove(sequences: list[Sequence], sequence: Sequence) -> None:
    """Take `sequence` out of a list that is sorted by rank."""
    index = bisect_left(sequences, sequence.rank, key=_by_rank)
    assert sequences[index] is sequence
    del sequences[index]
