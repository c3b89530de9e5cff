"""Sequences, and the steps that compute parts of them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple


@dataclass(eq=False)
class Sequence:
    """A prompt and what is generated after it.

    Args:
        id: Its name; no two live sequences have the same.
        tokens: The prompt's token ids.
        limit: Tokens of the prompt and of what is generated, at most: no step is scheduled beyond them.
        priority: 0 is served first; a higher number waits for lower ones (see Scheduler for how long).
        deadline: When it ends unfinished, in seconds of the scheduler's clock.
        parent: A sequence of the same prompt, added earlier. Once its prompt is computed, this one starts from its
            pages and computes the prompt's last token alone.
        salt: Pages are shared between sequences of the same salt only.
        session: Client or conversation that it belongs to: cached pages of one session are kept and evicted together.

    `drafts` may be set at any time: tokens that are proposed to follow its last one, of which its next step verifies as
    many as the step, the pages and the limit have room for. The other fields are the scheduler's.
    """

    id: Hashable
    tokens: list[int] = field(repr=False)  # those known; `append` adds what is generated
    limit: int
    priority: int = 0
    deadline: float | None = None
    parent: Sequence | None = field(default=None, repr=False)
    salt: bytes = field(default=b"", repr=False)
    session: Hashable | None = None

    drafts: int = field(default=0, init=False)
    state: Literal["new", "waiting", "running", "drained", "ended"] = field(default="new", init=False)
    prompt_length: int = field(init=False)
    arrival: int = field(default=-1, init=False)  # sequences added before it
    rank: tuple[int, int] = field(default=(0, 0), init=False)  # lower ones first
    length: int = field(init=False)  # tokens, with those that steps on their way will choose at most
    expected: list[int] = field(default_factory=list, init=False, repr=False)  # at most, of each step on its way
    computed: int = field(default=0, init=False)  # tokens on `pages` once all steps have run, at most
    pages: list[int] = field(default_factory=list, init=False, repr=False)
    slot: int = field(default=-1, init=False)  # while it runs: a number below max_running that is its own
    decoding: bool = field(default=False, init=False)  # its next token was chosen by a step since it got its slot
    preemptions: int = field(default=0, init=False)
    keys: list[bytes] = field(default_factory=list, init=False, repr=False)  # of the pages that the known tokens fill
    registered: int = field(default=0, init=False)  # pages at the front that need not be registered any more

    def __post_init__(self) -> None:
        self.tokens = list(self.tokens)
        self.length = self.prompt_length = len(self.tokens)

    @property
    def positions(self) -> int:
        """Cache positions that it fills at most: its last token is chosen, and never computed."""
        return self.limit - 1


class ScheduledChunk(NamedTuple):
    """Part of a step: `count` tokens of a sequence, from position `begin` on.

    While drafts of the sequence are on their way, `begin` is the last position that it may be at, and the device knows
    at which it is.
    """

    sequence: Sequence
    begin: int
    count: int
    samples: bool  # they are all it has: the last one's logits choose its next token


@dataclass
class Step:
    """One forward pass: what it computes. Its arrays must be built before the scheduler is called again.

    First come the copies, whose pages were complete before this step. Then `chunks`: first `decodes` of a token that an
    earlier step chose, which may not be on the host yet, and the drafts after it, which read only what earlier steps
    and they themselves wrote; then pieces of prompts, which may read what others of them write in this step, as a layer
    has written all keys and values before it reads any.
    """

    chunks: list[ScheduledChunk]
    decodes: int
    copies: list[tuple[int, int]]  # (from page, to page)
    preempted: list[Sequence]  # they lost their pages and wait again
    timed_out: list[Sequence]  # they ended at their deadlines

    @property
    def tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)
