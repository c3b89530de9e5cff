"""A device without a model, for tests of the scheduler: what it keeps for a token stands for keys and values."""

from __future__ import annotations

from collections import deque
from typing import Any
from zlib import crc32

from engine.scheduler.page_pool import PagePool, extend_keys
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.sequence import ScheduledChunk, Sequence, Step

SIZE = 4  # tokens a page, where a test does not say otherwise
END = 0  # the token that ends a sequence before its limit


def state_after(state: int, token: int) -> int:
    """What stands for keys and values: a number that depends on a token and on all before it."""
    return hash((state, token))


def states_of(tokens: list[int]) -> list[int]:
    states = [0]
    for token in tokens:
        states.append(state_after(states[-1], token))
    return states[1:]


def choose(state: int, id: object) -> int:
    """The token that a sequence chooses after `state`; one whose id is a number may end before its limit."""
    drawn = crc32(repr((state, id)).encode())
    return drawn % 12 if isinstance(id, int) else 1 + drawn % 11


def alone(prompt: list[int], id: object, limit: int) -> list[int]:
    """The tokens of a sequence that has the machine to itself."""
    tokens = list(prompt)
    state = states_of(tokens)[-1]
    while len(tokens) < limit and END not in tokens[len(prompt) :]:
        tokens.append(choose(state, id))
        state = state_after(state, tokens[-1])
    return tokens


def numbers(count: int, first: int = 1) -> list[int]:
    """A prompt that shares no page with those of another `first`."""
    return list(range(first, first + count))


class Device:
    """Runs steps as a GPU does: pages hold what was written last, tokens are read from pages and slots alone.

    accepted: of five drafts, how many are what the sequence chooses; the others are wrong.
    """

    def __init__(self, pool: PagePool, max_running: int, accepted: int = 5) -> None:
        self.size, self.accepted = pool.page_size, accepted
        self.pages = [[-1] * self.size for _ in range(pool.pages)]
        self.chosen = [-1] * max_running  # by slots
        self.positions = [-1] * max_running  # of the tokens chosen

    def run(self, step: Step) -> list[tuple[Sequence, list[int]]]:
        """The tokens that the step chooses."""
        for source, target in step.copies:
            self.pages[target] = list(self.pages[source])
        results = [(chunk.sequence, self._decode(chunk)) for chunk in step.chunks[: step.decodes]]
        prompts = step.chunks[step.decodes :]
        for sequence, begin, count, _ in prompts:  # all are written before any is read
            tokens = sequence.tokens[begin : begin + count]
            assert len(tokens) == count
            self._write(sequence, begin, tokens)
        for sequence, begin, count, samples in prompts:
            state = self._check(sequence, begin + count)
            if samples:
                token = choose(state, sequence.id)
                self.chosen[sequence.slot], self.positions[sequence.slot] = token, begin + count
                results.append((sequence, [token]))
        return results

    def _decode(self, chunk: ScheduledChunk) -> list[int]:
        """Verify a chunk's drafts; the tokens chosen up to the first that differs from its draft."""
        sequence, position = chunk.sequence, self.positions[chunk.sequence.slot]
        on_their_way = sum(sequence.expected[:-1]) - len(sequence.expected[:-1])
        assert chunk.begin - on_their_way <= position <= chunk.begin
        inputs, chosen, right = [self.chosen[sequence.slot]], [], True
        for _ in range(chunk.count):
            state = self._write(sequence, position, inputs)
            token = choose(state, sequence.id)
            if right:
                chosen.append(token)
            right = right and crc32(repr(state).encode()) % 5 < self.accepted
            inputs.append(token if right else token + 1)
        self.chosen[sequence.slot], self.positions[sequence.slot] = chosen[-1], position + len(chosen)
        self._check(sequence, position + len(chosen))
        return chosen

    def _write(self, sequence: Sequence, begin: int, tokens: list[int]) -> int:
        state = self._at(sequence, begin - 1) if begin else 0
        for position, token in enumerate(tokens, begin):
            state = state_after(state, token)
            self.pages[sequence.pages[position // self.size]][position % self.size] = state
        return state

    def _check(self, sequence: Sequence, end: int) -> int:
        """What is kept of the tokens up to `end`, which are those of `sequence` as far as they are known."""
        states = [self._at(sequence, position) for position in range(end)]
        known = states_of(sequence.tokens[:end])
        assert states[: len(known)] == known, f"{sequence} reads what is not its own"
        return states[-1]

    def _at(self, sequence: Sequence, position: int) -> int:
        return self.pages[sequence.pages[position // self.size]][position % self.size]


class Engine:
    """A scheduler and a device; results come `ahead` steps late."""

    def __init__(
        self,
        pages: int = 64,
        max_running: int = 4,
        step_tokens: int = 16,
        ahead: int = 0,
        page_size: int = SIZE,
        accepted: int = 5,
        **arguments: Any,
    ) -> None:
        self.now = 0.0
        self.pool = PagePool(pages, page_size)
        self.scheduler = Scheduler(self.pool, max_running, step_tokens, 64, clock=lambda: self.now, **arguments)
        self.device = Device(self.pool, max_running, accepted)
        self.ahead = ahead
        self.on_their_way: deque[list[tuple[Sequence, list[int]]]] = deque()
        self.finished: list[Sequence] = []

    def add(self, id: Any, prompt: list[int], new: int = 4, drafts: int = 0, **arguments: Any) -> Sequence:
        sequence = Sequence(id, prompt, len(prompt) + new, **arguments)
        sequence.drafts = drafts
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> Step:
        step = self.scheduler.schedule()
        self.on_their_way.append(self.device.run(step))
        while len(self.on_their_way) > self.ahead:
            self.deliver()
        return step

    def deliver(self) -> None:
        for sequence, tokens in self.on_their_way.popleft():
            if END in tokens:  # in mid-chain: what follows it was never chosen
                tokens = tokens[: tokens.index(END) + 1]
            if not self.scheduler.append(sequence, tokens):
                assert sequence.state == "ended"
            elif tokens[-1] == END or len(sequence.tokens) == sequence.limit:
                self.scheduler.finish(sequence)
                self.finished.append(sequence)
                prompt = sequence.tokens[: sequence.prompt_length]
                assert sequence.tokens == alone(prompt, sequence.id, sequence.limit)
                self.check_prefix_cache(sequence)

    def drain(self) -> list[Step]:
        steps = []
        while len(self.scheduler):
            steps.append(self.step())
        return steps

    def check_prefix_cache(self, sequence: Sequence) -> int:
        """What is found of a sequence's tokens is what belongs to them, and no page is found that they do not fill."""
        keys: list[bytes] = []
        extend_keys(keys, sequence.tokens, self.pool.page_size, sequence.salt)
        found = [state for page in self.pool.find(keys) for state in self.device.pages[page]]
        assert found == states_of(sequence.tokens)[: len(found)]
        return len(found)

    def check_empty(self) -> None:
        scheduler, pool = self.scheduler, self.pool
        self.now = float("inf")
        assert len(scheduler) == 0 and not scheduler.waiting and not scheduler.running
        assert scheduler.schedule() == Step([], 0, [], [], [])  # no deadline is left
        assert pool.used == 0 and pool.available == pool.pages


def shape(step: Step) -> list[tuple[object, int, int, bool]]:
    return [(chunk.sequence.id, chunk.begin, chunk.count, chunk.samples) for chunk in step.chunks]
