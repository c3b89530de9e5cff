"""One reduction order on the target backend: a token's logits are the same bits however they were computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stages.findings import Piece, forward, new_cache
from stages.parity.check import Check
from stages.parity.context import Context
from stages.parity.shapes import random_prompts

if TYPE_CHECKING:
    from torch import Tensor

    from engine.llm import LLM, EngineConfig
    from engine.model.transformer import Model as EngineModel

ORDER = "one reduction order: no bit may differ"
LENGTHS = (70, 1, 16, 33)  # around the block of 16 rows and the chunk of 64 keys
CHUNKS = (1, 7, 64)
REPEATS = 20
STEPS = 12


def check_invariance(context: Context) -> None:
    """Design section 5 on the target backend: the same token's logits are the same bits however they were computed."""
    llm = context.llm(context.dtype)
    engine, config = llm.model, llm.engine
    prompts = random_prompts(LENGTHS, context.config.vocab_size)
    paged = config.kv_cache == "paged"
    found = count_unequal(engine, prompts, paged)
    if config.cuda_graph:
        case = "steps of a CUDA graph" if config.captures else "steps of the decode loop"
        found[case] = count_unequal_steps(engine, prompts, config.captures, paged)
    if config.batching == "continuous":
        found["requests together, in pieces and preempted"] = count_unequal_requests(llm, prompts)
    for case, count in found.items():
        context.findings.check(
            suite="invariance", case=case, metric="unequal_logits", value=count, limit=0.0, limit_kind=ORDER,
            dtype=context.dtype, backend=context.backend,
        )  # fmt: skip


def differing(results: Sequence[Tensor], expected: Sequence[Tensor]) -> int:
    """Elements whose bits differ, of tensors of one floating-point dtype."""
    import torch

    # Viewed as integers, NaN equals itself and -0 is not 0.
    kind = {2: torch.int16, 4: torch.int32}[expected[0].element_size()]
    return sum(int((a.view(kind) != b.view(kind)).sum()) for a, b in zip(results, expected, strict=True))


def count_unequal_requests(llm: LLM, prompts: list[list[int]]) -> int:
    """Log probabilities of requests' tokens and of the likeliest others that differ from those of each request alone.

    Together they have pages for a part of their tokens only, and steps too short for the longest prompt.
    """
    from engine.llm import LLM
    from engine.sampling_params import MOST_LOGPROBS, SamplingParams

    params = [
        SamplingParams(max_new_tokens=2 * STEPS, temperature=i % 2, seed=i, logprobs=MOST_LOGPROBS, ignore_eos=True)
        for i in range(len(prompts))
    ]
    longest = max(map(len, prompts)) + 2 * STEPS
    small = {"max_batch": len(prompts), "max_step_tokens": 24, "kv_tokens": longest + 16, "page_size": 8}
    short = replace(llm.engine, max_model_len=longest)
    weights = llm.config, llm.weights

    def run(engine: EngineConfig, groups: list[list[int]]) -> list[Any]:
        single = LLM(weights, engine)
        return [
            done.logprobs
            for group in groups
            for done in single.generate([prompts[i] for i in group], [params[i] for i in group])
        ]

    order = list(range(len(prompts)))
    together = run(replace(short, **small), [order])
    alone = run(replace(short, max_batch=1, kv_tokens=2 * longest), [[i] for i in order])
    return sum(mine != theirs for a, b in zip(together, alone, strict=True) for mine, theirs in zip(a, b, strict=True))


def count_unequal_steps(engine: EngineModel, prompts: list[list[int]], captures: bool, paged: bool) -> int:
    """Logits of STEPS greedy steps of the decode loop that differ from those of one pass over the finished text.

    Each prompt but its last token is in the cache before. With `captures` the steps are replayed from a CUDA graph.
    """
    import torch

    from engine.runtime.decode_loop import DecodeLoop, DecodeRow, bucket
    from engine.sampling_params import SamplingParams

    capacity = max(map(len, prompts)) + STEPS
    loop = DecodeLoop(engine, new_cache(engine, bucket(len(prompts)), capacity, paged), captures)
    pieces = [Piece(slot, ids[:-1]) for slot, ids in enumerate(prompts) if len(ids) > 1]
    forward(engine, pieces, loop.cache)
    greedy = SamplingParams(temperature=0.0)
    loop.start([DecodeRow(slot, ids[-1], len(ids) - 1, greedy, 0) for slot, ids in enumerate(prompts)])
    steps = []
    for _ in range(STEPS):
        loop.enqueue()
        loop.wait()
        assert loop.logits is not None
        steps.append(loop.logits[: len(prompts)].clone())
    found = torch.stack(steps, dim=1)
    whole = [ids + new for ids, new in zip(prompts, loop.generated(), strict=True)]
    alone = [
        forward(engine, [Piece(0, text[:-1])], engine.new_cache(1, capacity))[0][len(ids) - 1 :]
        for ids, text in zip(prompts, whole, strict=True)
    ]
    return differing(list(found), alone)


def count_unequal(engine: EngineModel, prompts: list[list[int]], paged: bool) -> dict[str, int]:
    """case -> logits whose bits differ from those of the prompt run alone in one pass."""
    import torch

    capacity = max(map(len, prompts))
    alone = [forward(engine, [Piece(0, ids)], engine.new_cache(1, capacity))[0] for ids in prompts]

    def packed(order: Sequence[int]) -> int:
        pieces = [Piece(place, prompts[index]) for place, index in enumerate(order)]
        results = forward(engine, pieces, new_cache(engine, len(order), capacity, paged))
        return differing(results, [alone[index] for index in order])

    def chunked(size: int) -> int:
        cache = new_cache(engine, len(prompts), capacity, paged)
        parts: list[list[Tensor]] = [[] for _ in prompts]
        for begin in range(0, capacity, size):
            running = [index for index, ids in enumerate(prompts) if begin < len(ids)]
            pieces = [Piece(index, prompts[index][begin : begin + size], begin) for index in running]
            for index, logits in zip(running, forward(engine, pieces, cache), strict=True):
                parts[index].append(logits)
        return differing([torch.cat(pieces) for pieces in parts], alone)

    order = list(range(len(prompts)))
    found = {
        f"a batch of {len(prompts)}": packed(order),
        "the batch in another order": packed(order[::-1]),
        "16 times in one batch": packed([1] * 16),
    }
    found |= {f"prefill in chunks of {size}": chunked(size) for size in CHUNKS if size > 1}
    found["decoded token by token"] = chunked(1)
    again = [forward(engine, [Piece(0, prompts[2])], engine.new_cache(1, capacity))[0] for _ in range(REPEATS)]
    found[f"{REPEATS} repeats"] = differing(again, [alone[2]] * REPEATS)
    return found


INVARIANCE = Check("invariance", check_invariance)
