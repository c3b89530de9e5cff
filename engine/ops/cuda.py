"""The operations as CUDA kernels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.model.linear import DenseLinear, Linear, TiledLinear
from engine.ops.batch import AttentionLayer, Batch, LayerCache, Rounding, TokenSpan
from engine.ops.protocol import Placement
from engine.ops.reference import Composed, of_rows
from kernels import add_norm, embedding, kv_write, residual, rms_norm, rope, rope_write, sampling, swiglu
from kernels.attention import flash, prefill
from kernels.attention import naive as naive_attention
from kernels.check import HALVES
from kernels.cuda import SIMULATED
from kernels.launch import is_rehearsal, machine_of
from kernels.linear import naive as naive_linear
from kernels.linear import streamed, tiled
from kernels.tiles import BOX, empty_tiles, shape_of

FLASH_WIDTHS = (64, 128)  # elements of a head
FLASH_GROUP = 16  # query heads that share a KV head, at most
FEW = 16  # attention for up to one in so many tokens is computed for them one by one


class CudaOps(Composed):
    """`engine.ops.protocol.Ops` over the launchers in `kernels/`, which say what each computes.

    The fast versions are for bf16 and fp16: fp32 tensors take the naive ones whatever is chosen, and so do weights and
    heads of a shape that the fast ones do not take. Which one a model takes never depends on the tokens.

    Args:
        device: A CUDA device; or the CPU when NUMBA_ENABLE_CUDASIM=1, where the same kernels run in the simulator.
        attention: "naive", or "flash" (head_dim 64 or 128): in a decode step one kernel with the norms of q and k, the
            rotation and the cache write; for runs of tokens `kernels.attention.prefill`.
        linear: "naive"; "streamed", where SwiGLU is part of the product ahead of it and norm part of the addition; or
            "tiled", which is that with more tokens than a pass of it by `kernels.linear.tiled`.
        sampling: "naive" or "split".

    Raises:
        ValueError: The device is the CPU without the simulator, or the other way round.
    """

    def __init__(
        self,
        device: torch.device | str = "cuda",
        attention: str = "naive",
        linear: str = "naive",
        sampling: str = "naive",
    ) -> None:
        self.device = torch.device(device)
        if (self.device.type == "cpu") != SIMULATED and not is_rehearsal():
            raise ValueError(
                f"device = {self.device.type!r} with the cuda backend and NUMBA_ENABLE_CUDASIM={int(SIMULATED)}; "
                "a GPU needs 0, and the simulator runs on 'cpu' with 1 set before the start"
            )
        self._flash, self._tiled, self._split = attention == "flash", linear == "tiled", sampling == "split"
        self._streamed = linear in ("streamed", "tiled")
        self._machine = machine_of(self.device.index or 0)
        self._workspaces: dict[tuple[str | int, ...], Tensor] = {}

    def head_major(self, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
        fits = head_dim in FLASH_WIDTHS and heads <= FLASH_GROUP * kv_heads
        return self._flash and dtype in HALVES and fits

    def why_not_paged(self, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> str | None:
        if self.head_major(dtype, heads, kv_heads, head_dim):
            return None
        chosen, widths = "flash" if self._flash else "naive", " or ".join(map(str, FLASH_WIDTHS))
        return (
            f"a paged cache needs attention = 'flash', dtype = 'bfloat16' or 'float16', head_dim {widths} and at "
            f"most {FLASH_GROUP} query heads for each KV head; here attention = {chosen!r}, {dtype}, "
            f"head_dim {head_dim}, {heads} query heads and {kv_heads} KV heads"
        )

    def _fuses(self, weight: Tensor) -> bool:
        """Whether a norm of this weight is part of the addition, and alone in the same order of summation."""
        fits = weight.shape[0] % 8 == 0 and weight.shape[0] <= add_norm.WIDEST
        return self._streamed and weight.dtype in HALVES and fits

    def _splits(self, logits: Tensor) -> bool:
        """Whether many blocks choose a row's token."""
        return self._split and logits.dtype in HALVES and logits.shape[1] % 8 == 0

    def _workspace(self, name: str, rows: int, size: Callable[[int], int], *shape: int) -> Tensor:
        """Memory of `size(rows)` 32-bit elements for operation `name` on `shape`, rows rounded up to a power of two.

        Zero at first, for that operation alone, and never moved or given back: graphs keep its address.
        """
        rows = 1 << (rows - 1).bit_length()
        key = (name, rows, *shape)
        if key not in self._workspaces:
            self._workspaces[key] = torch.zeros(size(rows), dtype=torch.int32, device=self.device)
        return self._workspaces[key]

    def _attention_workspace(
        self, tokens: int, heads: int, width: int, k_cache: Tensor, table: Tensor | None
    ) -> Tensor:
        capacity = k_cache.shape[1] * (1 if table is None else table.shape[1])

        def size(tokens: int) -> int:
            return flash.workspace_size(tokens, heads, width, capacity)

        shape = (heads, width, capacity)
        return self._workspace("attention", min(tokens, flash.TOKENS), size, *shape).view(torch.float32)

    def new_linear(self, rows: int, depth: int, gated: bool, dtype: torch.dtype) -> DenseLinear | TiledLinear:
        # On other architectures tiles have not been measured, and `tiled` reads rows.
        if self._machine[0] != "sm_90a" or not self._streams(rows, depth, gated, dtype):
            return super().new_linear(rows, depth, gated, dtype)
        return TiledLinear(empty_tiles(rows, depth, gated, dtype, self.device))

    def _streams(self, rows: int, depth: int, gated: bool, dtype: torch.dtype) -> bool:
        """Whether the streamed version multiplies with such a weight: rows in groups, 64 columns at a time."""
        return self._streamed and dtype in HALVES and rows % (16 if gated else 8) == 0 and depth % BOX == 0

    def embedding(self, tokens: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
        out = table.new_empty((tokens.shape[0], table.shape[1])) if out is None else out
        embedding.embedding(tokens, table, out)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, rounding: Rounding, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        # Of a view, as the q of a projection, stride(0) differs even where it has one row.
        if self._fuses(weight) and x.stride(0) == x.shape[1]:
            return add_norm.norm(x, weight, eps, rounding, out)
        return rms_norm.rms_norm(x, weight, eps, rounding, out)

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
        rope.rope(q, k, cos, sin, positions)

    def linear(self, x: Tensor, matrix: Linear, out: Tensor | None = None) -> Tensor:
        return self._multiply(x, matrix, False, out)

    def linear_swiglu(self, x: Tensor, gate_up: Linear, out: Tensor | None = None) -> Tensor:
        return self._multiply(x, gate_up, True, out)

    def _multiply(self, x: Tensor, matrix: Linear, gated: bool, out: Tensor | None) -> Tensor:
        """The product with a matrix in the form in which it is stored; gated: with gate and up, and SwiGLU of both."""
        if isinstance(matrix, DenseLinear):
            return self._multiply_dense(x, matrix.weight, gated, out)
        if isinstance(matrix, TiledLinear):  # the naive version reads rows
            return self._multiply_dense(x, matrix.weight if self._streamed else matrix.rows(), gated, out)
        raise ValueError(
            f"the weights are stored as {matrix.form!r}, and backend = 'cuda' multiplies with {DenseLinear.form!r} "
            "ones; choose backend = 'reference'"
        )

    def _multiply_dense(self, x: Tensor, weight: Tensor, gated: bool, out: Tensor | None) -> Tensor:
        rows, depth = shape_of(weight)
        fast = self._streams(rows, depth, gated, weight.dtype)
        if gated and not fast:
            return self.swiglu(self._multiply_dense(x, weight, False, None), out)
        out = x.new_empty((x.shape[0], rows // 2 if gated else rows)) if out is None else out
        if not fast:
            naive_linear.linear(x, weight, out)
            return out
        # Of two versions with the same bits, the one for so many tokens.
        version = tiled if self._tiled and tiled.is_faster(x.shape[0], rows, depth, gated, self._machine) else streamed
        (version.linear_swiglu if gated else version.linear)(x, weight, out)
        return out

    def swiglu(self, gate_up: Tensor, out: Tensor | None = None) -> Tensor:
        out = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2)) if out is None else out
        swiglu.swiglu(gate_up, out)
        return out

    def add(self, x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(x) if out is None else out
        residual.add(x, y, out)
        return out

    def add_norm(
        self, x: Tensor, y: Tensor, weight: Tensor, eps: float, rounding: Rounding, placement: Placement,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if not self._fuses(weight):
            return super().add_norm(x, y, weight, eps, rounding, placement, added)
        stream = torch.empty_like(x)
        normed = torch.empty_like(x) if placement == "pre" else None
        return add_norm.add_norm(x, y, weight, eps, rounding, placement, stream, normed, added)

    def kv_write(
        self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, positions: Tensor,
        table: Tensor | None = None,
    ) -> None:  # fmt: skip
        _refuse("kv_write", table)
        kv_write.kv_write(k, v, k_cache, v_cache, slots, positions)

    def attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, positions: Tensor, scale: float,
        window: int, out: Tensor | None = None, table: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
        count, heads, width = q.shape
        if self.head_major(q.dtype, heads, k_cache.shape[2], width):
            workspace = self._attention_workspace(count, heads, width, k_cache, table)
            flash.attention(q, k_cache, v_cache, slots, positions, scale, window, out, workspace, table)
        else:
            _refuse("attention", table)
            naive_attention.attention(q, k_cache, v_cache, slots, positions, scale, window, out)
        return out

    def plan(
        self, spans: Sequence[TokenSpan], dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int,
        into: prefill.Plan | None = None,
    ) -> prefill.Plan | None:  # fmt: skip
        if not self.head_major(dtype, heads, kv_heads, head_dim):
            return None
        return prefill.plan(spans, head_dim, self.device, into=into, heads=heads)

    def attend(
        self, qkv: Tensor, layer: AttentionLayer, cache: LayerCache, batch: Batch, rows: Tensor | None = None
    ) -> Tensor:
        count, (kv_heads, width) = qkv.shape[0], cache.k.shape[2:]
        heads = qkv.shape[1] // width - 2 * kv_heads
        if not self.head_major(qkv.dtype, heads, kv_heads, width):
            return super().attend(qkv, layer, cache, batch, rows)
        k, v, table = cache
        slots, positions, scale, window = batch.slots, batch.positions, layer.scale, layer.window
        norms = layer.q_norm, layer.k_norm, layer.eps, layer.rounding
        projected = (qkv, *norms, layer.cos, layer.sin, k, v, slots, positions)
        out = qkv.new_empty((count, heads * width))
        if batch.one_token_per_slot:
            workspace = self._attention_workspace(count, heads, width, k, table)
            flash.decode(*projected, scale, window, out, workspace, table)
            return of_rows(out, rows)
        q = rope_write.rope_write(*projected, out.view(count, heads, width), table)
        # One by one a few tokens take less time than all do in tiles.
        if batch.plan is None or (rows is not None and FEW * len(rows) <= count):
            q, slots, positions = (of_rows(x, rows) for x in (q, slots, positions))
            return self.attention(q, k, v, slots, positions, scale, window, table=table).flatten(1)
        out, alone = torch.empty_like(q), batch.decodes
        if alone:
            own = slots[:alone], positions[:alone]
            self.attention(q[:alone], k, v, *own, scale, window, out[:alone], table)
        prefill.attention(q[alone:], k, v, batch.plan, scale, window, out[alone:], table)
        return of_rows(out.flatten(1), rows)

    def repetition_penalty(self, logits: Tensor, seen: Tensor, penalty: Tensor) -> None:
        sampling.repetition_penalty(logits, seen, penalty)

    def argmax(self, logits: Tensor, out: Tensor | None = None) -> Tensor:
        out = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device) if out is None else out
        if self._splits(logits):
            workspace = self._workspace("argmax", logits.shape[0], sampling.argmax_workspace_size)
            return sampling.argmax_split(logits, out, workspace)
        return sampling.argmax(logits, out)

    def sample(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor,
        position: Tensor, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        out = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device) if out is None else out
        settings = (temperature, top_k, top_p, min_p, seed, position)
        if self._splits(logits):
            workspace = self._workspace("sample", logits.shape[0], sampling.sample_workspace_size)
            return sampling.sample_split(logits, *settings, out, workspace)
        return sampling.sample(logits, *settings, out)

    def advance(self, chosen: Tensor, tokens: Tensor, positions: Tensor, places: Tensor, history: Tensor) -> None:
        sampling.advance(chosen, tokens, positions, places, history)


def _refuse(operation: str, table: Tensor | None) -> None:
    """Raises ValueError where there is a table: `why_not_paged` has been passed over."""
    if table is not None:
        raise ValueError(f"{operation}: table is given, and the naive kernel takes none")
