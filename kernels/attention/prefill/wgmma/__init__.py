"""Prefill attention by wgmma (sm_90a): persistent blocks, a producer warp with tensor maps, two ping-pong warpgroups.

    producer       queries, keys 0, values 0, keys 1, values 1, …                     then those of the next entry
    warpgroup 0    S0 = QK0 | softmax S0 | S1 = QK1, O += P0 V0 | softmax S1 | …
    warpgroup 1              S0 = QK0    | softmax S0           | S1 = QK1, O += P0 V0 | …

An item of work is an entry of the plan for one head.
"""

from __future__ import annotations

from kernels import ptx
from kernels.attention.prefill.tiling import Tiling
from kernels.attention.prefill.wgmma.consumer import consumer
from kernels.attention.prefill.wgmma.layout import Layout
from kernels.attention.prefill.wgmma.producer import producer
from kernels.cuda import cuda, int32, uint8, uint32
from kernels.device import HALVES
from kernels.launch import Kernel, LaunchOptions, kernel_factory


@kernel_factory
def warpgroups(dtype: str, head_dim: int, tiling: Tiling, divided: bool) -> Kernel:
    """Tensor maps of q [T, Hq D] (boxes of `rows` rows), k_cache and v_cache [S or P, Hk, C or page, D] (boxes of a
    tile or page); work, table, out, partials, arrived, entries, Hq, Hq / Hk, heads at work at a time, pages of a slot
    (0: not paged), log2 of a page, stride of out, factor, window; grid (blocks,): at most entries times Hq.

    dtype: "bf16" or "f16". divided: whether an entry may be a segment of a tile and fewer entries may be in use; what
    that takes costs whole tiles 5 %.
    """
    layout = Layout(head_dim, tiling, divided)
    groups, stages, workers = layout.groups, layout.stages, layout.workers
    q_full, q_used = layout.q_full, layout.q_used
    give_registers, take_registers = ptx.setmaxnreg_dec(24), ptx.setmaxnreg_inc(240)
    produce, consume = producer(layout), consumer(dtype, layout)

    def attention(
        q_map, k_map, v_map, work, table, out, partials, arrived, entries, heads, group_heads, heads_at_once, pages,
        page_bits, out_stride, factor, window,
    ):  # fmt: skip
        ptx.griddepcontrol_launch_dependents()
        memory = cuda.shared.array(0, uint8)
        base = (ptx.shared_address(memory) + uint32(1023)) & uint32(0xFFFFFC00)
        thread = int32(cuda.threadIdx.x)
        if thread == 0:
            for i in range(1 + 2 * stages):
                ptx.mbarrier_init(base + uint32(q_full + 8 * i), uint32(1))
                ptx.mbarrier_init(base + uint32(q_used + 8 * i), uint32(4 * groups))
            ptx.fence_mbarrier_init()
        cuda.syncthreads()
        if thread >= workers:
            give_registers()
            if thread < workers + 32:
                produce(
                    base, (q_map, k_map, v_map), work, (table, pages, page_bits),
                    (entries, heads, group_heads, heads_at_once), window, int32(thread - workers),
                )  # fmt: skip
        else:
            take_registers()
            consume(base, out, (partials, arrived, heads), out_stride, factor, window, thread)

    name = f"attention_prefill_{tiling.name}_{'divided_' if divided else ''}d{head_dim}{HALVES[dtype].suffix}"
    kinds = ("u8*", "u8*", "u8*", "i32*", "i32*", f"{dtype}*", "f32*", "i32*", *("i32",) * 6, "i64", "f32", "i32")
    return Kernel(
        name, attention, kinds, tiling.threads, dynamic_shared=tiling.shared(head_dim), blocks_per_sm=1,
        options=LaunchOptions(programmatic=True), architectures=("sm_90a",),
    )  # fmt: skip
