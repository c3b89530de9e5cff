"""The engine: whatever else runs, a request's tokens and logits are those that it has alone; nothing leaks."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.llm import LLM
from engine.model.config import ModelConfig
from engine.model.weights import random_weights
from engine.runtime.engine import Engine
from engine.runtime.request import Request
from engine.sampling_params import SamplingParams

FIELDS: dict[str, Any] = {
    "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False, "eos_token_id": 1,
    "hidden_act": "silu", "hidden_size": 128, "intermediate_size": 192, "max_position_embeddings": 128,
    "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
    "rope_scaling": None, "rope_theta": 10000, "tie_word_embeddings": False, "vocab_size": 256,
}  # fmt: skip
Logits = dict[int, Tensor]  # by the position of the token that was chosen from them


def make_llm(device: str, **engine: Any) -> LLM:
    config = ModelConfig.from_dict({**FIELDS, "torch_dtype": "bfloat16"})
    kernels = {"backend": "cuda", "attention": "flash", "linear": "tiled", "sampling": "split"}
    settings = {
        "device": device,
        "kv_cache": "paged",
        "page_size": 8,
        **(kernels if device == "cuda" else {}),
        **engine,
    }
    return LLM((config, random_weights(config, device, torch.bfloat16, 0)), EngineConfig(**settings))


def watch(core: Engine, seen: dict[Request, Logits]) -> None:
    """Keep the logits that each request's tokens are chosen from."""

    def observe(requests: list[Request], logits: Tensor) -> None:
        for request, row in zip(requests, logits, strict=True):
            seen.setdefault(request, {}).setdefault(request.length - 1, row.clone())

    core.runner.observe = observe


class Alone:
    """Each request by itself, computed once."""

    def __init__(self, device: str) -> None:
        self._llm = make_llm(device, max_batch=1, max_step_tokens=128, prefix_cache=False)
        self._seen: dict[Request, Logits] = {}
        watch(self._llm.core, self._seen)
        self._known: dict[Any, tuple[list[int], Logits]] = {}

    def __call__(self, prompt: tuple[int, ...], params: SamplingParams) -> tuple[list[int], Logits]:
        key = prompt, repr(params)
        if key not in self._known:
            (live,) = self._llm.requests(prompt, params)
            self._llm.core.add(live.request)
            while live.request.finish_reason is None:
                self._llm.core.step()
            self._known[key] = live.request.generated, self._seen.pop(live.request)
        return self._known[key]


@pytest.fixture(scope="module")
def alone() -> Callable[..., tuple[list[int], Logits]]:
    return Alone("cpu")


def check_schedule(seed: int, alone: Callable[..., tuple[list[int], Logits]], device: str = "cpu") -> Engine:
    """Random requests that come, end, are aborted and preempted at random, and share beginnings."""
    draw = random.Random(seed)
    batch = draw.choice([1, 2, 3, 5])
    llm = make_llm(
        device, max_batch=batch, max_step_tokens=draw.choice([batch, 8, 24, 64]), cuda_graph=draw.random() < 0.5,
        kv_tokens=draw.choice([72, 72, 88, 400]), prefix_cache=draw.random() < 0.7,
        batching=draw.choice(["continuous", "continuous", "inflight"]),
    )  # fmt: skip
    core, seen = llm.core, {}
    watch(core, seen)
    beginnings = [tuple(range(2 + 40 * i, 2 + 40 * i + 30)) for i in range(3)]
    coming: list[tuple[int, tuple[int, ...], SamplingParams]] = []
    for _ in range(draw.randint(2, 7)):
        prompt = draw.choice(beginnings)[: draw.randint(1, 30)] + tuple(range(200, 200 + draw.choice([0, 0, 1, 9])))
        params = SamplingParams(
            max_new_tokens=draw.choice([1, 2, 7, 20, 32]), temperature=draw.choice([0.0, 0.9]), seed=draw.randint(0, 3),
            stop_token_ids=draw.choice([(), (3, 50, 90, 120, 200)]), n=draw.choice([1, 1, 1, 2]),
            frequency_penalty=draw.choice([0.0, 0.0, 0.0, 1.0]),
        )  # fmt: skip
        coming.append((draw.randint(0, 25), prompt, params))
    requests: list[tuple[Request, SamplingParams]] = []
    aborted: set[Request] = set()
    step = 0
    while coming or len(core):
        for arrival in [item for item in coming if item[0] <= step]:
            coming.remove(arrival)
            for live in llm.requests(arrival[1], arrival[2], priority=draw.choice([0, 0, 1])):
                core.add(live.request)
                requests.append((live.request, arrival[2]))
        if draw.random() < 0.05 and len(core):
            victim = draw.choice([r for r, _ in requests if r.finish_reason is None])
            core.end(victim, "abort")
            aborted.add(victim)
        core.step()
        pool = core.pool
        assert pool.free + pool.cached + pool.used == pool.pages
        step += 1
        assert step < 2000
    while core.runner.pending:
        core.runner.wait()
    assert core.pool.used == 0
    for request, params in requests:
        single = replace(params, n=1, seed=(params.seed or 0) + request.index)
        tokens, logits = alone(tuple(request.tokens[: request.prompt_length]), single)
        assert request.generated == (tokens[: len(request.generated)] if request in aborted else tokens)
        for place in range(request.prompt_length, len(request.tokens)):
            assert torch.equal(seen[request][place], logits[place]), (request.id, place)
    return core


@pytest.mark.parametrize("part", range(2))
def test_random_schedules(part: int, alone: Callable[..., tuple[list[int], Logits]]):
    stats = [check_schedule(seed, alone).stats() for seed in range(20 * part, 20 * part + 20)]
    assert sum(s.preemptions for s in stats) and sum(s.cached_tokens for s in stats)


def test_a_request_that_gets_its_slot_back_on_other_pages(alone: Callable[..., tuple[list[int], Logits]]):
    assert check_schedule(588, alone).stats().preemptions


@pytest.mark.skipif("AFS_SOAK" not in os.environ, reason="minutes; AFS_SOAK=1 runs it")
@pytest.mark.timeout(3000)
def test_a_thousand_random_schedules(alone: Callable[..., tuple[list[int], Logits]]):
    for seed in range(100, 1100):
        check_schedule(seed, alone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_schedules_on_a_gpu():
    alone = Alone("cuda")
    stats = [check_schedule(seed, alone, "cuda").stats() for seed in range(40)]
    assert sum(s.preemptions for s in stats) and sum(s.cached_tokens for s in stats)


def collect(core: Engine, requests: list[Request]) -> None:
    while any(request.finish_reason is None for request in requests):
        core.step()


def test_forks_compute_their_prompt_once():
    llm = make_llm("cpu", max_batch=4, prefix_cache=False)
    enqueue, computed = llm.core.runner.enqueue, []
    llm.core.runner.enqueue = lambda step: (computed.append(step.tokens), enqueue(step))  # type: ignore[assignment]
    done = llm.generate([list(range(2, 32))], SamplingParams(max_new_tokens=6, n=3, seed=5, ignore_eos=True))
    stats = llm.stats()
    assert [c.index for c in done] == [0, 1, 2] and len({tuple(c.token_ids) for c in done}) == 3
    assert sum(computed) == 30 + 2 * 1 + 3 * 5  # the prompt, its last token for each fork, and what decodes
    assert stats.prompt_tokens == 30 and stats.cached_tokens == 0 and llm.core.pool.hits.asked == 30
    for completion in done:
        params = SamplingParams(max_new_tokens=6, seed=5 + completion.index, ignore_eos=True)
        assert llm.generate([list(range(2, 32))], params)[0].token_ids == completion.token_ids


def test_a_shared_prompt_is_computed_once():
    llm = make_llm("cpu", max_batch=4)
    params = SamplingParams(max_new_tokens=2, ignore_eos=True, temperature=0.0)
    first = llm.generate([list(range(2, 50))], params)
    again = llm.generate([[*range(2, 50), i] for i in range(60, 64)], params)
    assert first[0].cached_tokens == 0 and [c.cached_tokens for c in again] == [48] * 4


@pytest.mark.parametrize("length", [15, 16, 17, 40])
def test_siblings_are_no_hits_of_the_prefix_cache(length: int):
    """What n completions of a prompt share of it is not found in the cache: what was there before is, once."""
    llm = make_llm("cpu", max_batch=2)  # siblings wait, and find the first one's pages in the cache
    prompt = list(range(2, 2 + length))
    for n in (3, 4):
        params = SamplingParams(max_new_tokens=3, n=n, seed=1, ignore_eos=True)
        found = [c.cached_tokens for c in llm.generate([prompt], params)]
        assert found == ([0] * n if n == 3 else [(length - 1) // 8 * 8] * n)
    stats = llm.stats()
    assert (stats.prompt_tokens, stats.cached_tokens) == (2 * length, (length - 1) // 8 * 8)
    assert (llm.core.pool.hits.asked, llm.core.pool.hits.found) == (stats.prompt_tokens, stats.cached_tokens)


def test_deadlines_and_what_is_left():
    llm = make_llm("cpu", max_batch=2)
    core = llm.core
    (live,) = llm.requests([2, 3, 4], SamplingParams(max_new_tokens=100, ignore_eos=True), timeout=0.0)
    (other,) = llm.requests([2, 3, 4], SamplingParams(max_new_tokens=3, ignore_eos=True))
    core.add(live.request)
    core.add(other.request)
    collect(core, [live.request, other.request])
    assert live.request.finish_reason == "deadline" and other.request.finish_reason == "length"
    assert core.stats().finished == {"deadline": 1, "length": 1} and core.pool.used == 0


def test_what_can_never_run_is_refused_alone():
    llm = make_llm("cpu", max_batch=2, kv_tokens=32)
    (large,) = llm.requests(range(2, 32), SamplingParams(max_new_tokens=20))
    with pytest.raises(ValueError, match=r"takes 49 positions, above max_len = 32"):
        llm.core.add(large.request)
    (one,) = llm.requests([2, 3], SamplingParams(max_new_tokens=3), id="a")
    llm.core.add(one.request)
    (two,) = llm.requests([2, 3], SamplingParams(max_new_tokens=3), id="a")
    with pytest.raises(ValueError, match="is live already"):
        llm.core.add(two.request)
    collect(llm.core, [one.request])
    with pytest.raises(KeyError, match="is not live"):
        llm.core.end(one.request, "abort")
    assert one.request.finish_reason in ("length", "stop")


def test_logprobs_are_those_of_the_logits(alone: Callable[..., tuple[list[int], Logits]]):
    llm = make_llm("cpu", max_batch=3, max_step_tokens=16, cuda_graph=True)
    prompts = [tuple(range(2, 2 + n)) for n in (5, 20, 30)]
    settings = [
        SamplingParams(max_new_tokens=8, temperature=0.0, logprobs=k, prompt_logprobs=p, ignore_eos=True)
        for k, p in ((None, 0), (3, None), (0, 2))
    ]
    for prompt, params, done in zip(prompts, settings, llm.generate(prompts, settings), strict=True):
        plain = SamplingParams(max_new_tokens=8, temperature=0.0, ignore_eos=True)
        tokens, logits = alone(prompt, plain)
        assert done.token_ids == tokens and (done.logprobs is None) == (params.logprobs is None)
        for at, found in enumerate(done.logprobs or []):
            log = torch.log_softmax(logits[len(prompt) + at].float(), -1)
            assert found.token == tokens[at] and found.logprob == pytest.approx(float(log[tokens[at]]), abs=1e-5)
            assert found.rank == 1 and len(found.top) == params.logprobs
            assert [value for _, value in found.top] == pytest.approx(
                log.topk(len(found.top)).values.tolist(), abs=1e-5
            )
        if params.prompt_logprobs is not None:
            assert done.prompt_logprobs is not None and done.prompt_logprobs[0] is None
            for place in range(1, len(prompt)):
                found = done.prompt_logprobs[place]
                _, before = alone(prompt[:place], replace(plain, max_new_tokens=1))
                log = torch.log_softmax(before[place].float(), -1)
                assert found is not None and found.token == prompt[place]
                assert found.logprob == pytest.approx(float(log[prompt[place]]), abs=1e-5)
                assert found.rank == int((log > log[prompt[place]]).sum()) + 1
        else:
            assert done.prompt_logprobs is None


def test_scoring_alone_generates_nothing():
    done = make_llm("cpu").generate([[2, 3, 4]], SamplingParams(max_new_tokens=0, prompt_logprobs=0))[0]
    assert done.token_ids == [] and done.finish_reason == "length" and len(done.prompt_logprobs or []) == 3


@pytest.mark.parametrize(
    "engine",
    [{}, {"batching": "inflight"}, {"cuda_graph": True}, {"max_step_tokens": 24}, {"kv_tokens": 64},
     {"kv_cache": "contiguous"}, {"kv_cache": "none"}],
    ids=str,
)  # fmt: skip
def test_whole_windows_are_scored(engine: dict[str, Any]):
    """As evaluations do: prompts of just the greatest length, without a new token. What `check` passes can run."""
    llm = make_llm("cpu", max_batch=2, max_model_len=64, **engine)
    prompts = [[2 + i * 7 % 250 for i in range(length)] for length in (64, 63, 64)]
    scored = SamplingParams(max_new_tokens=0, prompt_logprobs=1)
    for done, prompt in zip(llm.generate(prompts, scored), prompts, strict=True):
        assert done.finish_reason == "length" and done.token_ids == [] and done.prompt_logprobs is not None
        assert len(done.prompt_logprobs) == len(prompt) and None not in done.prompt_logprobs[1:]
    generated = llm.generate([prompts[1]], SamplingParams(max_new_tokens=1, prompt_logprobs=1, ignore_eos=True))[0]
    assert generated.prompt_logprobs == llm.generate([prompts[1]], scored)[0].prompt_logprobs


@pytest.mark.parametrize("engine", [{}, {"kv_tokens": 20}, {"kv_cache": "contiguous"}, {"max_model_len": 21}], ids=str)
def test_one_arithmetic_of_lengths(engine: dict[str, Any]):
    """Whatever `LLM.check` passes the scheduler takes, and runs; what it refuses is refused in the user's words."""
    llm = make_llm("cpu", max_batch=1, page_size=8, **engine)
    longest = llm.max_model_len
    assert longest == {"kv_tokens": 24, "max_model_len": 21}.get(next(iter(engine), ""), 128)
    for length in (1, longest - 2, longest - 1, longest, longest + 1):
        for new in (0, 1, 2, longest - 1, longest):
            params = SamplingParams(max_new_tokens=new, prompt_logprobs=0, ignore_eos=True)
            if length + new > longest:
                with pytest.raises(ValueError, match=rf"has {length} tokens and max_new_tokens = {new}: .* limit of"):
                    llm.generate([[2] * length], params)
            else:
                assert len(llm.generate([[2] * length], params)[0].token_ids) == new


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", [{}, {"cuda_graph": True}], ids=str)
def test_log_probabilities_are_reported_before_adjustments(dtype: str, engine: dict[str, Any]):
    config = ModelConfig.from_dict({**FIELDS, "torch_dtype": dtype})
    weights = random_weights(config, "cpu", getattr(torch, dtype), 0)
    llm = LLM((config, weights), EngineConfig(dtype=dtype, kv_cache="paged", max_batch=3, **engine))  # type: ignore[arg-type]
    prompt = list(range(2, 12))
    settings = [
        {"logit_bias": {77: 100.0, 5: -100.0}}, {"frequency_penalty": 2.0, "repetition_penalty": 1.5},
        {"min_tokens": 6, "stop_token_ids": list(range(100))}, {},
    ]  # fmt: skip
    params = [SamplingParams(max_new_tokens=6, temperature=0.0, logprobs=4, ignore_eos=True, **s) for s in settings]
    for done in llm.generate([prompt] * len(params), params):
        assert done.logprobs is not None
        for at, found in enumerate(done.logprobs):
            plain = SamplingParams(max_new_tokens=0, prompt_logprobs=4)
            (score,) = llm.generate([[*prompt, *done.token_ids[: at + 1]]], plain)
            assert score.prompt_logprobs is not None and score.prompt_logprobs[-1] == found
    assert llm.generate([prompt], params[0])[0].token_ids == [77] * 6


def test_logits_of_infinity_have_log_probabilities():
    """As fp16 overflows to: those tokens have all of the probability, and nothing is NaN. NaN alone is an error."""
    llm = make_llm("cpu", max_batch=2)
    head, forward = llm.model.weights.lm_head, llm.model.forward
    changed = {"by": {7: torch.inf, 9: torch.inf, 8: torch.nan}, "row": slice(None)}

    def overflow(*args: Any, **kwargs: Any) -> Tensor:
        logits = forward(*args, **kwargs).clone()
        for token, value in changed["by"].items():
            logits[changed["row"], token] = value
        return logits

    assert head.out_features == 256
    llm.model.forward = overflow  # type: ignore[method-assign]
    params = SamplingParams(max_new_tokens=5, logprobs=3, prompt_logprobs=2, seed=3, ignore_eos=True)
    done = llm.generate([[2, 9, 4, 8]], params)[0]
    assert set(done.token_ids) <= {7, 9} and done.logprobs and done.prompt_logprobs
    for found in done.logprobs:
        assert found.logprob == pytest.approx(-0.6931472) and found.rank == 1 and found.top[2][1] == -torch.inf
    assert [found and found.logprob for found in done.prompt_logprobs] == [
        None, pytest.approx(-0.6931472), -torch.inf, -torch.inf,
    ]  # fmt: skip
    changed["by"], changed["row"] = dict.fromkeys(range(256), torch.nan), 1  # of a prompt's token alone
    with pytest.raises(ArithmeticError, match="every logit after token 1 of a request is NaN"):
        llm.generate([[2, 9, 4, 8]], SamplingParams(max_new_tokens=0, prompt_logprobs=2))


def test_adjusted_logits():
    llm = make_llm("cpu", max_batch=3)
    prompt = list(range(2, 12))

    def tokens(**settings: Any) -> list[int]:
        params = SamplingParams(**{"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True, **settings})
        return llm.generate([prompt], params)[0].token_ids

    assert tokens(logit_bias={77: 100.0}) == [77] * 12
    free = tokens()
    assert len(set(tokens(presence_penalty=2.0, logit_bias={i: 50.0 for i in range(20, 30)}))) >= 10
    assert tokens(frequency_penalty=0.0) == free
    stop = free[2]
    assert len(tokens(stop_token_ids=[stop])) <= 3
    longer = tokens(stop_token_ids=[stop], min_tokens=8)
    assert len(longer) >= 8 and stop not in longer[:7]
    with pytest.raises(ValueError, match="logit_bias is for token id 256; ids are 0 to 255"):
        tokens(logit_bias={256: 1.0})


def test_memory_that_is_too_small_is_said():
    with pytest.raises(ValueError, match=r"kv_tokens = 0"):
        make_llm("cpu", kv_tokens=0)
    llm = make_llm("cpu", kv_tokens=20)
    assert llm.core.pool.pages == 3 and llm.max_model_len == 24
    assert make_llm("cpu", kv_tokens=1).max_model_len == 8  # what a request may have is what there is room for
    with pytest.raises(ValueError, match=r"kv_tokens = 20 is room for 24 tokens, and max_model_len = 25; raise kv_"):
        make_llm("cpu", kv_tokens=20, max_model_len=25)
    assert make_llm("cpu", kv_tokens=20, kv_cache="contiguous").max_model_len == 128


def test_caches_follow_the_memory_of_a_cpu(monkeypatch: pytest.MonkeyPatch):
    token = 2 * 2 * 1 * 64 * 2  # keys and values, layers, heads, elements, bytes
    fields = {"max_batch": 40, "max_step_tokens": 1}

    def free(size: float) -> None:
        monkeypatch.setattr("engine.runtime.engine.free_bytes", lambda device: size)

    free(1e12)
    assert make_llm("cpu", **fields).core.pool.pages == 40 * 16
    free(2 * (100 * 8 * token) + 1e6)  # half of it, less what a pass takes
    assert 16 <= make_llm("cpu", **fields).core.pool.pages < 40 * 16
    free(2 * (10 * 8 * token))
    with pytest.raises(ValueError, match=r"of memory are free: no room for the KV cache of one request of 128 tokens"):
        _ = make_llm("cpu", **fields).core
    with pytest.raises(ValueError, match=r"kv_tokens = 1000000 takes 0.5 GB, and 0.0 GB of memory are free; lower kv"):
        _ = make_llm("cpu", kv_tokens=10**6, **fields).core
    with pytest.raises(ValueError, match=r"a contiguous cache of 40 slots of 128 tokens is 0.0 GB, and .* are free"):
        _ = make_llm("cpu", kv_cache="contiguous", **fields).core


def test_a_great_many_positions():
    """A cache is no larger than memory, and takes of it what is written; tables too large for it are refused."""
    config = ModelConfig.from_dict({**FIELDS, "max_position_embeddings": 1 << 18, "torch_dtype": "bfloat16"})
    weights = random_weights(config, "cpu", torch.bfloat16, 0)
    llm = LLM((config, weights), EngineConfig(kv_cache="paged", max_batch=256))  # 34 GB if all were full
    before = psutil.Process().memory_info().rss
    assert len(llm.generate([[2, 3]], SamplingParams(max_new_tokens=2, ignore_eos=True))[0].token_ids) == 2
    assert psutil.Process().memory_info().rss - before < 200 << 20
    config = replace(config, max_position_embeddings=10**12)
    with pytest.raises(ValueError, match=r"rotary tables of 1000000000000 positions are 256000.0 GB, and .* lower max"):
        LLM((config, weights), EngineConfig(kv_cache="paged"))


def test_steps_suit_the_device():
    assert EngineConfig(device="cuda").step_tokens > EngineConfig().step_tokens
    assert EngineConfig(max_step_tokens=7).step_tokens == 7
    assert make_llm("cpu", max_batch=3).core.scheduler.step_tokens == EngineConfig().step_tokens
    batch = EngineConfig().step_tokens + 44  # each decodes in every step
    assert make_llm("cpu", max_batch=batch).core.scheduler.step_tokens == batch


@pytest.mark.slow
def test_many_requests_leave_nothing_behind():
    """Memory is flat, and every list and table of the engine is empty again; AFS_SOAK=1: after 10,000 requests."""
    draw, batches = random.Random(0), 20 if "AFS_SOAK" in os.environ else 4
    llm = make_llm("cpu", max_batch=16, max_step_tokens=64, kv_tokens=800, cuda_graph=True)
    core, process, sizes = llm.core, psutil.Process(), []
    for _ in range(batches):
        prompts = [[draw.randrange(2, 256) for _ in range(draw.randint(1, 20))] for _ in range(500)]
        params = [SamplingParams(max_new_tokens=draw.randint(1, 4), temperature=1.0, logprobs=1) for _ in prompts]
        lives = [live for ids, p in zip(prompts, params, strict=True) for live in llm.requests(ids, p)]
        for live in lives:
            core.add(live.request)
        while len(core):
            if draw.random() < 0.2:
                core.end(draw.choice([live.request for live in lives if live.request.finish_reason is None]), "abort")
            core.step()
        while core.runner.pending:
            core.runner.wait()
        del lives
        sizes.append(process.memory_info().rss)
    assert sum(core.stats().finished.values()) == 500 * batches
    assert core.pool.used == 0 and not core.scheduler.running and not core.scheduler.waiting
    assert max(sizes[batches // 2 :]) - max(sizes[: batches // 2]) < 8 << 20, sizes
