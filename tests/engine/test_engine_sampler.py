"""How tokens are chosen and what is reported of them: the model's own log probabilities, whatever was adjusted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.ops.reference import ReferenceOps
from engine.runtime.request import Request
from engine.runtime.sampler import log_probabilities, sample, send_logprobs
from engine.sampling_params import SamplingParams

INF, NAN = math.inf, math.nan
ADJUSTMENTS: list[dict[str, Any]] = [
    {"logit_bias": {3: 100.0, 5: -100.0}},
    {"min_tokens": 2, "stop_token_ids": [4, 6]},
    {"repetition_penalty": 1.9},
    {"frequency_penalty": 2.0},
    {"presence_penalty": -2.0, "temperature": 0.7},
]


def request(prompt: list[int], **settings: Any) -> Request:
    params = SamplingParams(**{"max_new_tokens": 8, "temperature": 0.0, **settings})
    made = Request(
        id=0, tokens=prompt, limit=len(prompt) + 8, params=params, seed=1, stop_ids=frozenset(params.stop_token_ids),
        entered=0.0,
    )  # fmt: skip
    made.length += 1  # as the scheduler counts the token that is being chosen
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_choosing_leaves_the_logits_alone(dtype: torch.dtype):
    """Each adjustment alone, all of them, and beside rows without one."""
    torch.manual_seed(0)
    requests = [request([1, 2, 3, 4], **settings) for settings in (*ADJUSTMENTS, {}, {"temperature": 1.0})]
    requests.append(request([1, 2], **{key: value for settings in ADJUSTMENTS for key, value in settings.items()}))
    logits = torch.randn(len(requests), 16).to(dtype)
    before = logits.clone()
    out = torch.full((len(requests),), -7, dtype=torch.int32)
    sample(ReferenceOps(), requests, logits, out)
    assert torch.equal(logits, before)
    assert out[0] == 3 and out.min() >= 0
    alone = torch.full((1,), -7, dtype=torch.int32)
    sample(ReferenceOps(), [request([1, 2, 3, 4], repetition_penalty=1.9)], logits[2:3], alone)
    assert torch.equal(logits, before) and alone[0] == out[2]
    sent = send_logprobs(logits, out, 3)
    expected = torch.log_softmax(before.float(), -1)
    for row, token in enumerate(out.tolist()):
        assert float(sent.chosen[row]) == float(expected[row, token])
        assert sent.values[row].tolist() == expected[row].topk(3).values.tolist()
        found = sent.of(row, token, 2)
        assert (found.token, found.logprob, len(found.top)) == (token, float(expected[row, token]), 2)
        assert found.rank == 1 + int((expected[row] > expected[row, token]).sum())


SETTINGS = st.builds(
    dict,
    temperature=st.sampled_from([0.0, 0.7, 1.5]), top_k=st.sampled_from([0, 3]), top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.1]), repetition_penalty=st.sampled_from([1.0, 1.4]),
    frequency_penalty=st.sampled_from([0.0, 1.0]), presence_penalty=st.sampled_from([0.0, -0.5]),
    logit_bias=st.sampled_from([{}, {3: 4.0, 5: -4.0}]), min_tokens=st.sampled_from([0, 3]),
    stop_token_ids=st.sampled_from([(), (1, 2, 3)]),
)  # fmt: skip


@given(st.lists(SETTINGS, min_size=1, max_size=5), st.integers(0, 99))
def test_a_token_depends_on_its_own_request_alone(several: list[dict[str, Any]], seed: int):
    """Step after step beside others, as alone by a request that has just been given the same tokens again."""
    generator = torch.Generator().manual_seed(seed)
    together = [request([1, 2, 7], **settings) for settings in several]
    for step in range(4):
        logits = torch.randn(len(several), 16, generator=generator).to(torch.bfloat16)
        out = torch.full((len(several),), -7, dtype=torch.int32)
        sample(ReferenceOps(), together, logits, out)
        for row, (old, settings) in enumerate(zip(together, several, strict=True)):
            new, alone = request([1, 2, 7], **settings), torch.full((1,), -7, dtype=torch.int32)
            new.tokens, new.length = list(old.tokens), old.length
            sample(ReferenceOps(), [new], logits[row : row + 1], alone)
            assert int(alone) == int(out[row])
            assert settings["min_tokens"] <= step or int(alone) not in settings["stop_token_ids"]
            old.tokens.append(int(alone))
            old.length += 1


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([1.0, INF, -INF, 3.0], [-INF, 0.0, -INF, -INF]),
        ([INF, INF, 0.0, NAN], [-math.log(2), -math.log(2), -INF, -INF]),
        ([-INF, -INF, NAN, -INF], [-math.log(3), -math.log(3), -INF, -math.log(3)]),
        ([0.0, NAN, 0.0, -INF], [-math.log(2), -INF, -math.log(2), -INF]),
        ([6e4, -6e4, 6e4, 0.0], [-math.log(2), -INF, -math.log(2), -6e4 - math.log(2)]),
    ],
)
def test_log_probabilities_of_what_is_not_finite(logits: list[float], expected: list[float]):
    for dtype in (torch.float32, torch.float16):
        given_logits = torch.tensor([logits, [0.0] * 4]).to(dtype)
        before = given_logits.clone()
        found = log_probabilities(given_logits)
        assert given_logits.nan_to_num().equal(before.nan_to_num())
        wanted = [-120000.69 if value == -INF and logits[0] == 6e4 else value for value in expected]
        assert found[0].tolist() == pytest.approx(wanted, rel=1e-3)
        assert found[1].tolist() == pytest.approx([-math.log(4)] * 4)
    assert log_probabilities(torch.full((1, 3), NAN)).isnan().all()


VALUES = st.sampled_from([0.0, -0.0, 1.0, -3.5, 1e-30, 6e4, -6e4, INF, -INF, NAN])


@given(st.lists(VALUES, min_size=2, max_size=9), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_log_probabilities_are_of_what_is_drawn(values: list[float], dtype: torch.dtype):
    """Never above 0, never NaN where something can be drawn; together 1; the likeliest is the greedy token."""
    logits = torch.tensor([values]).to(dtype)
    found, greedy = log_probabilities(logits)[0], int(ReferenceOps().argmax(logits))
    if greedy < 0:
        assert found.isnan().all()
        return
    assert not found.isnan().any() and found[greedy] == found.max() <= 0
    assert float(found.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    assert (found[logits[0].isnan()] == -INF).all()
