"""How everything is measured."""

from __future__ import annotations

from stages.report.parts import (
    Inputs,
    Section,
    Text,
)

METHODS = (
    "Each figure is the median of repeats inside one stage, whose samples are in the Parquet; warm-up runs are not "
    "counted. On a GPU a call is timed by CUDA events or a synchronised clock, on a CPU by the wall clock. A lock "
    "keeps two measurements from sharing a host.",
    "The confidence interval of a median is that of order statistics: the innermost pair of the sorted samples that "
    "holds the true median with 95 %, as the number of samples below it is binomial (n, 1/2) whatever their "
    "distribution. No resampling, no seed. Fewer than six samples hold it with less: then the interval is their range, "
    "which holds 94 % of five, 88 % of four, 75 % of three, 50 % of two. It covers the repeats of one process on one "
    "day, not another day's or another machine's, and takes the repeats as independent. A change from week to week is "
    "named where the two intervals do not overlap.",
    "A call of the standard suite has B prompts of P random tokens and makes N tokens for each, the end-of-text token "
    "ignored. Tokenisation is outside the time, greedy sampling inside. TTFT: from the call to the first token. TPOT: "
    "(end to end − TTFT) / (N − 1). ITL: between two tokens. Output: B × N tokens over the end-to-end time; prompt + "
    "output: B × (P + N) over the same.",
    "The limit of a step is the larger of its weight and KV bytes over the read bandwidth and its FLOPs over the "
    "matrix rate, both measured on that machine by the provision stage. The share of the limit is limit / value where "
    "lower is better, value / limit where higher is.",
    "A roofline's bytes are those that a kernel must move at least: each weight, key, value, input and output once. "
    "Its FLOPs are two for each parameter and token of a matrix product, and four for each query's width and key of "
    "attention (half of it where a prompt is causal), both from the sizes in the inventory's rows.",
    "Hugging Face (HF) is transformers on the same checkpoint, dtype and cases: w01. A ratio to it is of rows of equal "
    "batch, prompt and new tokens on the same host.",
    "On the page a number links to its row: the page of a Parquet file lists the rows that the report cites with their "
    "samples, limit, knobs, host and commit.",
    "This host's rows come from reports/metrics/, recorded ones from reports/recorded/<gpu>/<model>/. On the page they "
    "share a table only where each line says which it is.",
)


def methods_section(inputs: Inputs) -> Section:
    return Section("methods", "Methods", [Text(text) for text in METHODS])
