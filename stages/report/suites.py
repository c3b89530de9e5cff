"""The suites that have tables of their own, and the titles of these."""

PREFILL_SUITES = {
    "prompt_lengths": "prompts by length, beyond the model's positions with its RoPE scaled to them",
    "prompt_products": "a prompt's matrix products, and torch's (cuBLAS)",
    "prompt_attention": "a prompt's attention, by wgmma and portable, and torch's by cuDNN and FlashAttention-2",
}
DECODE_SUITES = {
    "decode_step": "decode steps",
    "kernels": "each kernel of a decode step by itself",
    "graphs": "CUDA graphs of a decode step",
    "peers": "what others take: cuBLAS through torch, transformers under torch.compile",
}
DETAILED_SUITES = (
    "prompt_products",
    "prompt_attention",
    "kernels",
    "graphs",
    "peers",
    "step_trace",
)  # their tables are folded
LOAD_SUITES = {
    "throughput": "requests that come at once",
    "prefix_cache": "requests that begin with the same tokens",
    "decode_batches": "decode steps of large batches",
    "step_trace": "what the GPU does while it decodes",
    "serve": "the server, from clients",
}
