"""Requests whose steps yield several tokens: what they come to is what single tokens come to."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import pytest
from engine_checkpoints import Reference
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.async_llm import AsyncLLM
from engine.llm import LLM, Completion, EngineConfig
from engine.runtime.engine import Engine
from engine.runtime.request import Request, TokenLogprobs
from engine.runtime.runner import StepResult
from engine.sampling_params import SamplingParams
from engine.scheduler.sequence import Step


class Chains:
    """Stands for a runner that verifies drafts: of a step's proposals it accepts some, drawn anew each time.

    Tokens depend on the request and on their place alone. nan_at: position of one whose logits are NaN.
    """

    late_graphs = 0

    def __init__(self, seed: int, nan_at: int | None = None) -> None:
        self.draw, self.nan_at = random.Random(seed), nan_at
        self.most = 0  # tokens of a step that were accepted together
        self._positions: dict[Request, int] = {}  # of the next token
        self._results: deque[list[StepResult]] = deque()

    @property
    def pending(self) -> int:
        return len(self._results)

    def enqueue(self, step: Step) -> None:
        results = []
        for number, chunk in enumerate(step.chunks):
            if chunk.samples:
                decodes = number < step.decodes
                request = cast(Request, chunk.sequence)
                if not decodes:
                    self._positions[request] = chunk.begin + chunk.count
                results.append(self._choose(request, self.draw.randint(1, chunk.count) if decodes else 1))
        self._results.append(results)

    def wait(self) -> list[StepResult]:
        return self._results.popleft()

    def _choose(self, request: Request, count: int) -> StepResult:
        begin = self._positions[request]
        self._positions[request] = begin + count
        self.most = max(self.most, count)
        places = list(range(begin, begin + count))
        nan_after = self.nan_at if self.nan_at in places else None
        if nan_after is not None:
            places = places[: places.index(nan_after)]
        tokens = [self.token(request, place) for place in places]
        logprobs = [TokenLogprobs(token, -place, 1, []) for token, place in zip(tokens, places, strict=True)]
        return StepResult(request, tokens, [] if request.params.logprobs is None else logprobs, nan_after)

    @staticmethod
    def token(request: Request, place: int) -> int:
        return 3 + crc32(repr((request.tokens[:3], request.seed, place)).encode()) % 100


@pytest.fixture(scope="module")
def path(olmo2: Reference) -> Path:
    return olmo2.path


def make_llm(path: Path, draft: Callable[[], int], **engine: Any) -> LLM:
    """An engine whose requests have as many drafts as `draft` says before each step."""
    llm = LLM(path, EngineConfig(**{"kv_cache": "paged", "page_size": 8, "max_batch": 3, "kv_tokens": 96} | engine))
    scheduler = llm.core.scheduler
    schedule = scheduler.schedule

    def propose() -> Step:
        for sequence in (*scheduler.running, *scheduler.waiting):
            sequence.drafts = draft()
        return schedule()

    scheduler.schedule = propose  # type: ignore[method-assign]
    return llm


@pytest.fixture(scope="module")
def engines(path: Path) -> dict[str, tuple[LLM, LLM]]:
    """Of each kind of batching one of single tokens and one of chains."""
    draw = random.Random(0)
    return {
        batching: (
            make_llm(path, lambda: 0, batching=batching),
            make_llm(path, lambda: draw.randint(0, 7), batching=batching),
        )
        for batching in ("continuous", "inflight")
    }


def facts(done: Completion) -> tuple[Any, ...]:
    return done.token_ids, done.text, done.finish_reason, done.stop, done.logprobs, len(done.itl_ms)


SETTINGS = st.lists(
    st.builds(
        dict,
        max_new_tokens=st.integers(1, 24), seed=st.integers(0, 3), stop_token_ids=st.sampled_from([(), (7, 20, 33)]),
        stop=st.sampled_from([(), ("e",), ("e", "xyz")]), min_tokens=st.sampled_from([0, 0, 1]),
        logprobs=st.sampled_from([None, 0]), n=st.sampled_from([1, 1, 2]), ignore_eos=st.booleans(),
    ),
    min_size=1, max_size=6,
)  # fmt: skip


@given(SETTINGS, st.integers(0, 99), st.sampled_from(["continuous", "inflight"]))
@settings(max_examples=60, deadline=None)
def test_completions_are_those_of_single_tokens(
    engines: dict[str, tuple[LLM, LLM]], several: list[dict[str, Any]], seed: int, batching: str
):
    """Ends in mid-chain by tokens, strings and lengths, log probabilities and counts, for any number accepted."""
    params = [SamplingParams(**fields) for fields in several]
    prompts = [list(range(10 + 20 * i, 15 + 20 * i + i)) for i in range(len(params))]
    for llm in engines[batching]:
        llm.core.runner = cast(Any, Chains(seed))
    expected, found = ([facts(done) for done in llm.generate(prompts, params)] for llm in engines[batching])
    assert found == expected
    single, chained = (llm.stats() for llm in engines[batching])
    assert sum(chained.finished.values()) == sum(single.finished.values()) and chained.pages_used == 0


def start(path: Path, nan_at: int | None = None, **fields: Any) -> tuple[Engine, Request, Chains]:
    """A request that has seven drafts in each step, all of which are accepted."""
    chains, llm = Chains(0, nan_at), make_llm(path, lambda: 7)
    chains.draw.randint = lambda low, high: high  # type: ignore[method-assign]
    llm.core.runner = cast(Any, chains)
    (live,) = llm.requests([5, 6, 7], SamplingParams(**{"max_new_tokens": 30, "seed": 1, "ignore_eos": True} | fields))
    llm.core.add(live.request)
    return llm.core, live.request, chains


def run(core: Engine) -> None:
    while len(core):
        core.step()


@pytest.mark.parametrize("place", range(1, 9))
def test_tokens_after_the_last_one_do_not_count(path: Path, place: int):
    core, request, chains = start(path, logprobs=0)
    expected = [chains.token(request, 3 + i) for i in range(place)]
    assert len(set(expected)) == place
    request.stop_ids = frozenset(expected[-1:])
    run(core)
    assert request.generated == expected and request.finish_reason == "stop"
    assert len(request.times) == len(request.logprobs) == place
    assert core.stats().generated_tokens == place and (place < 3 or chains.most == 8)
    assert core.stats().finished == {"stop": 1}


def test_logits_that_are_nan_in_mid_chain(path: Path):
    """The tokens before them are the request's."""
    core, request, chains = start(path, nan_at=8, logprobs=0)
    run(core)
    assert request.generated == [chains.token(request, 3 + i) for i in range(5)] and len(request.logprobs) == 5
    assert (request.finish_reason, request.error) == ("error", "every logit after token 8 of a request is NaN")


def test_an_end_before_logits_that_are_nan(path: Path):
    core, request, chains = start(path, nan_at=8)
    request.stop_ids = frozenset([chains.token(request, 6)])
    run(core)
    assert len(request.generated) == 4 and request.finish_reason == "stop" and request.error is None


def test_streams_of_chains(path: Path):
    """Each token comes once, in order, with its log probability, whatever a step has yielded."""
    llm = make_llm(path, lambda: 7)
    llm.core.runner = cast(Any, Chains(3))
    params = [SamplingParams(max_new_tokens=20, seed=i, logprobs=0, stop=["e"] if i % 2 else ()) for i in range(8)]
    prompts = [[10 + i, 11, 12] for i in range(8)]

    async def work() -> None:
        async with AsyncLLM(llm) as engine:
            for stream in [await engine.submit(p, s) for p, s in zip(prompts, params, strict=True)]:
                updates = [update async for update in stream]
                done = updates[-1].completion
                assert done is not None and [t for u in updates for t in u.token_ids] == done.token_ids
                assert [entry for u in updates for entry in u.logprobs or []] == done.logprobs
                assert [entry.token for entry in done.logprobs or []] == done.token_ids

    asyncio.run(work())
