"""Sampler: the tokens of many requests from their logits, and log probabilities of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.ops.protocol import Ops
from engine.runtime.request import Request, TokenLogprobs

ROWS = 256  # rows of logits whose probabilities are worked out at a time


class PendingLogprobs(NamedTuple):
    """Log probabilities on their way to the host; see `send_logprobs`. NaN where every logit is."""

    chosen: Tensor  # fp32 [n]
    rank: Tensor  # int64 [n]
    values: Tensor  # fp32 [n, k]
    ids: Tensor  # int64 [n, k]

    def of(self, row: int, token: int, count: int) -> TokenLogprobs:
        """Log probabilities of one row, with the `count` most likely; after what was enqueued has run."""
        top = list(zip(self.ids[row, :count].tolist(), self.values[row, :count].tolist(), strict=True))
        return TokenLogprobs(token, float(self.chosen[row]), int(self.rank[row]), top)


def to_host(tensor: Tensor) -> Tensor:
    """Copy to the host's memory, complete once what is enqueued now has run."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def to_device(values: Sequence[int] | Sequence[float], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy the values to the device of `like`, without a wait for what runs there."""
    return torch.tensor(values, dtype=dtype, pin_memory=like.is_cuda).to(like.device, non_blocking=True)


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax fp32 [n, V] of `logits` [n, V], as draws follow it.

    A token whose logit is NaN has none (-inf). Where the largest is infinite, those equal to it share all of it. A row
    of NaN alone stays NaN.
    """
    scores = logits.to(torch.float32, copy=True)
    unusable = scores.isnan()
    largest = scores.masked_fill_(unusable, -torch.inf).amax(-1, keepdim=True)
    infinite = largest.isinf()
    scores.masked_fill_(infinite & (scores < largest), -torch.inf)
    scores.masked_fill_(infinite & (scores == largest) & ~unusable, 0.0)
    return torch.log_softmax(scores, -1)


def send_logprobs(logits: Tensor, tokens: Tensor, most: int) -> PendingLogprobs:
    """Send the log probability and rank of `tokens` [n] under `logits` [n, V] to the host, and the `most` likely."""
    parts = []
    for begin in range(0, len(logits), ROWS):
        here = slice(begin, begin + ROWS)
        log = log_probabilities(logits[here])
        own = log.gather(1, tokens[here].long().clamp(min=0)[:, None])
        values, ids = log.topk(min(most, log.shape[1]), -1)
        parts.append((own[:, 0], (log > own).sum(-1) + 1, values, ids))
    return PendingLogprobs(*(to_host(torch.cat(columns)) for columns in zip(*parts, strict=True)))


def sample(ops: Ops, requests: Sequence[Request], logits: Tensor, out: Tensor) -> None:
    """Choose a token for each request from its row of `logits` [n, V] into `out` int32 [n], -1 where all are NaN.

    A row's token does not depend on the others: those whose logits are adjusted are chosen from fp32 by themselves, as
    their neighbours would be by another kernel than alone.
    """
    adjusted = [index for index, request in enumerate(requests) if request.params.adjusts_logits]
    if not adjusted:
        _draw(ops, requests, logits, out)
        return
    plain = [index for index in range(len(requests)) if index not in set(adjusted)]
    if plain:
        rows = to_device(plain, logits, torch.int64)
        part = torch.empty(len(plain), dtype=torch.int32, device=out.device)
        _draw(ops, [requests[index] for index in plain], logits.index_select(0, rows), part)
        out[rows] = part
    for index in adjusted:
        # A copy, in fp32 too: the logits themselves are what is reported.
        request, row = requests[index], logits[index : index + 1].to(torch.float32, copy=True)
        _adjust(ops, request, row)
        _draw(ops, [request], row, out[index : index + 1])
        assert request.counts is not None
        _count(request.counts, out[index : index + 1])


def _draw(ops: Ops, requests: Sequence[Request], logits: Tensor, out: Tensor) -> None:
    params = [request.params for request in requests]
    if all(p.temperature == 0 for p in params):
        ops.argmax(logits, out=out)
        return
    ops.sample(
        logits,
        temperature=to_device([p.temperature for p in params], logits, torch.float32),
        top_k=to_device([p.top_k for p in params], logits, torch.int32),
        top_p=to_device([p.top_p for p in params], logits, torch.float32),
        min_p=to_device([p.min_p for p in params], logits, torch.float32),
        seed=to_device([request.seed for request in requests], logits, torch.int64),
        position=to_device([_position(request) for request in requests], logits, torch.int32),
        out=out,
    )


def _position(request: Request) -> int:
    """Position of the token that is being chosen: the scheduler has counted it already."""
    return request.length - 1


def _adjust(ops: Ops, request: Request, logits: Tensor) -> None:
    """Change one row of fp32 logits [1, V] in place as the request's params say."""
    params = request.params
    if params.logit_bias:
        ids = to_device(list(params.logit_bias), logits, torch.int64)
        logits[0, ids] += to_device(list(params.logit_bias.values()), logits, torch.float32)
    if _position(request) - request.prompt_length < params.min_tokens and request.stop_ids:
        logits[0, to_device(sorted(request.stop_ids), logits, torch.int64)] = -torch.inf
    if request.counts is None:
        request.counts = torch.zeros((2, logits.shape[1]), dtype=torch.int32, device=logits.device)
        prompt = to_device(request.tokens[: request.prompt_length], logits, torch.int64)
        request.counts[0, prompt] = 1
        _count(request.counts, to_device(request.generated, logits, torch.int64))
    in_prompt, generated = request.counts
    if params.repetition_penalty != 1:
        penalty = to_device([params.repetition_penalty], logits, torch.float32)
        ops.repetition_penalty(logits, (in_prompt + generated > 0)[None], penalty)
    if params.frequency_penalty or params.presence_penalty:
        logits -= params.frequency_penalty * generated + params.presence_penalty * (generated > 0)


def _count(counts: Tensor, tokens: Tensor) -> None:
    """Add generated tokens to `counts` [2, V], whose second row says how often each was generated."""
    places = tokens.long().clamp(min=0)
    counts[1].index_put_((places,), torch.ones_like(tokens, dtype=torch.int32), accumulate=True)
