"""Every suite that a week can list, in the order they run.

The server's comes before the engine is loaded in the stage's own process, which a GPU may not hold beside it; the peers
come last, as transformers takes memory of its own.
"""

from stages.bench.baseline import BASELINE
from stages.bench.decode_batches import DECODE_BATCHES
from stages.bench.decode_step import DECODE_STEP
from stages.bench.graphs import GRAPHS
from stages.bench.kernels import KERNELS
from stages.bench.load import LOAD
from stages.bench.peers import PEERS
from stages.bench.prefix_cache import PREFIX_CACHE
from stages.bench.prompt_attention import PROMPT_ATTENTION
from stages.bench.prompt_lengths import PROMPT_LENGTHS
from stages.bench.prompt_products import PROMPT_PRODUCTS
from stages.bench.serve import SERVE
from stages.bench.standard import STANDARD
from stages.bench.step_trace import STEP_TRACE
from stages.bench.suite import Suite
from stages.bench.throughput import THROUGHPUT
from stages.bench.tokenizer import TOKENIZER

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        BASELINE, TOKENIZER, LOAD, SERVE, *STANDARD, PROMPT_LENGTHS, PROMPT_PRODUCTS, PROMPT_ATTENTION, DECODE_STEP,
        KERNELS, GRAPHS, THROUGHPUT, PREFIX_CACHE, DECODE_BATCHES, STEP_TRACE, PEERS,
    )
}  # fmt: skip
