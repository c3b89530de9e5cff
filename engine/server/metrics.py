"""Prometheus metrics under our names and vLLM's, so that dashboards made for vLLM work.

Gauges and counters are read from the engine when they are asked for. Histograms get a completion's times when it is
complete: what a client leaves unfinished is counted as aborted and is in no histogram.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.runtime.request import Completion

# vLLM's, so that quantiles over servers of both kinds add up.
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640,
          2560)  # fmt: skip
_BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_N = (1, 2, 5, 10, 20)


def token_buckets(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, … up to `most`."""
    decades = range(int(math.log10(max(most, 1))) + 1)
    return tuple(v for decade in decades for m in (1, 2, 5) if (v := m * 10**decade) <= most) or (1,)


class Metrics:
    """Metrics of one engine, as /metrics shows them.

    Args:
        stats: The engine's statistics now, an EngineStats.
        model: The served name, which is the label `model_name`.
        max_model_len: The longest text in tokens.
        page_size: Tokens in a page of the KV cache; None where the cache has no pages.
    """

    def __init__(self, stats: Callable[[], Any], model: str, max_model_len: int, page_size: int | None = None) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._labels = {"model_name": model, "engine": "0"}
        lengths = token_buckets(max_model_len)

        # Without a registry: _Engine shows each of them under all its names.
        def histogram(name: str, about: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(name, about, tuple(self._labels), registry=None, buckets=tuple(buckets))

        names: dict[str, tuple[str, Iterable[float], tuple[str, ...]]] = {
            "time_to_first_token_seconds": ("From a request's entry to its first token.", _FIRST, ()),
            "inter_token_latency_seconds": (
                "From one token to the next.",
                _BETWEEN,
                ("time_per_output_token_seconds",),
            ),
            "request_time_per_output_token_seconds": ("A completion's mean from token to token.", _BETWEEN, ()),
            "e2e_request_latency_seconds": ("From a request's entry to its last token.", _REQUEST, ()),
            "request_decode_time_seconds": ("From a completion's first token to its last.", _REQUEST, ()),
            "request_prompt_tokens": ("Tokens of a prompt.", lengths, ()),
            "request_generation_tokens": ("Tokens of a completion.", lengths, ()),
            "request_params_max_tokens": ("The most tokens that a request asks for.", lengths, ()),
            "request_params_n": ("Completions that a request asks for.", _N, ()),
        }
        histograms = {name: histogram(name, about, buckets) for name, (about, buckets, _) in names.items()}
        self._observe = {name: found.labels(**self._labels).observe for name, found in histograms.items()}
        also = {name: aliases for name, (_, _, aliases) in names.items()}
        self.responses = Counter(
            "afs_http_requests", "Responses, by path and status.", ("path", "status"), registry=None
        )
        self.registry.register(_Engine(stats, self._labels, histograms, also, self.responses, page_size))
        ProcessCollector(registry=self.registry)

    def observe(self, done: Completion) -> None:
        """Note a completion's times, unless it was cut short."""
        if done.finish_reason not in ("stop", "length"):
            return
        observe = self._observe
        if done.token_ids:
            observe["time_to_first_token_seconds"](done.ttft_ms / 1e3)
        for gap in done.itl_ms:
            observe["inter_token_latency_seconds"](gap / 1e3)
        if done.itl_ms:
            decoding = sum(done.itl_ms) / 1e3
            observe["request_time_per_output_token_seconds"](decoding / len(done.itl_ms))
            observe["request_decode_time_seconds"](decoding)
        observe["e2e_request_latency_seconds"](done.e2e_ms / 1e3)
        observe["request_prompt_tokens"](len(done.prompt_token_ids))
        observe["request_generation_tokens"](len(done.token_ids))

    def asked(self, max_tokens: int, n: int) -> None:
        """Note what a request asks for."""
        self._observe["request_params_max_tokens"](max_tokens)
        self._observe["request_params_n"](n)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


class _Engine(Collector):
    """The engine's own figures and the histograms, each under our name and vLLM's."""

    def __init__(
        self,
        stats: Callable[[], Any],
        labels: dict[str, str],
        histograms: dict[str, Histogram],
        aliases: dict[str, tuple[str, ...]],
        responses: Counter,
        page_size: int | None,
    ) -> None:
        self._stats, self._labels, self._page_size = stats, labels, page_size
        self._histograms, self._aliases, self._responses = histograms, aliases, responses

    def describe(self) -> list[Metric]:
        return []  # nothing to ask the engine when the collector is registered

    def collect(self) -> Iterator[Metric]:
        now = self._stats()
        used = now.pages_used / now.pages if now.pages else 0.0
        gauges = {
            ("afs_requests_running", "vllm:num_requests_running"): (now.running, "Requests that run."),
            ("afs_requests_waiting", "vllm:num_requests_waiting"): (now.waiting, "Requests that wait to run."),
            ("afs_kv_cache_usage", "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"): (
                used,
                "Share of the KV cache's pages that running requests hold, 0 to 1.",
            ),
            ("afs_kv_cache_pages",): (now.pages, "Pages of the KV cache."),
            ("afs_kv_cache_pages_cached",): (now.pages_cached, "Pages that only the prefix cache holds."),
        }
        for names, (value, about) in gauges.items():
            yield from self._family(GaugeMetricFamily, names, about, [((), value)])
        counters = {
            ("afs_prompt_tokens", "vllm:prompt_tokens"): (now.prompt_tokens, "Tokens of prompts."),
            ("afs_generation_tokens", "vllm:generation_tokens"): (now.generated_tokens, "Tokens generated."),
            ("afs_prefix_cache_queries", "vllm:prefix_cache_queries", "vllm:gpu_prefix_cache_queries"): (
                now.prompt_tokens,
                "Tokens looked for in the prefix cache.",
            ),
            ("afs_prefix_cache_hits", "vllm:prefix_cache_hits", "vllm:gpu_prefix_cache_hits"): (
                now.cached_tokens,
                "Tokens found in the prefix cache.",
            ),
            ("afs_preemptions", "vllm:num_preemptions"): (now.preemptions, "Requests set back for want of pages."),
            ("afs_steps",): (now.steps, "Steps of the engine."),
            ("afs_late_kernels",): (now.late_kernels, "Kernels compiled or loaded after the engine was ready."),
            ("afs_late_graphs",): (now.late_graphs, "CUDA graphs captured after the engine was ready."),
        }
        for names, (value, about) in counters.items():
            yield from self._family(CounterMetricFamily, names, about, [((), value)])
        finished = [((reason,), count) for reason, count in sorted(now.finished.items())]
        about = "Completions by what ended them."
        yield from self._family(CounterMetricFamily, ("afs_requests_finished",), about, finished, ("reason",))
        yield from self._family(CounterMetricFamily, ("vllm:request_success",), about, finished, ("finished_reason",))
        if self._page_size:
            info = [((str(self._page_size), str(now.pages)), 1.0)]
            labels = ("block_size", "num_gpu_blocks")
            yield from self._family(GaugeMetricFamily, ("vllm:cache_config_info",), "The KV cache.", info, labels)
        for name, histogram in self._histograms.items():
            for metric in histogram.collect():
                for other in (f"afs_{name}", *(f"vllm:{n}" for n in (name, *self._aliases[name]))):
                    yield _renamed(metric, other)
        for metric in self._responses.collect():
            yield _renamed(metric, metric.name)

    def _family(
        self,
        kind: Callable[..., Any],
        names: tuple[str, ...],
        about: str,
        samples: list[tuple[tuple[str, ...], float]],
        labels: tuple[str, ...] = (),
    ) -> Iterator[Metric]:
        for name in names:
            family = kind(name, about, labels=(*self._labels, *labels))
            for values, value in samples:
                family.add_metric([*self._labels.values(), *values], value)
            yield family


def _renamed(metric: Metric, name: str) -> Metric:
    """A copy under another name, without the series that say when each began: vLLM shows none."""
    copy = Metric(name, metric.documentation, metric.type)
    for sample in metric.samples:
        ending = sample.name.removeprefix(metric.name)
        if ending != "_created":
            copy.add_sample(name + ending, sample.labels, sample.value)
    return copy
