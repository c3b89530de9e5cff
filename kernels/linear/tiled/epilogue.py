"""Epilogue of the prefill GEMM: a warp's sums, with SwiGLU where gated, through shared memory to whole rows of out."""

from __future__ import annotations

from collections.abc import Callable

from kernels import device, ptx
from kernels.cuda import device_function, int64, uint32
from kernels.linear.tiled.tiling import PIECE, PITCH


def writer(dtype: str, blocks: int, fragments: int, gated: bool) -> Callable[..., None]:
    """A function that writes a warp's accumulators to out.

    They are those of `blocks` x 16 tokens and `fragments` x 8 weight rows, 4 a fragment as mma_m16n8k16 has them, block
    after block; gated: of the fragments the first half are gates, the other half ups.
    """
    kept = fragments // 2 if gated else fragments
    pieces = -(-kept // PIECE)
    pack = device.HALVES[dtype].pack

    @device_function
    def plain(acc, c):
        return pack(acc[c + 1], acc[c])

    def swiglu(silu: Callable[..., float]) -> Callable[..., int]:
        @device_function
        def pair(acc, c):
            u = c + kept * 4
            first, second = ptx.mul_rn_f32(silu(acc[c]), acc[u]), ptx.mul_rn_f32(silu(acc[c + 1]), acc[u + 1])
            return pack(second, first)

        return pair

    @device_function
    def nothing(acc, staging, lane, out, token, column, count, columns):
        pass

    def writer(piece: int) -> Callable[..., None]:
        # A function a piece, not a loop: the compiler would not unroll one as large, and an index that it does not know
        # sends the accumulators to memory.
        m, p = piece // pieces, piece % pieces
        first, last = m * fragments + p * PIECE, m * fragments + min(kept, (p + 1) * PIECE)
        following = writer(piece + 1) if piece + 1 < blocks * pieces else nothing

        def staging_of(pair: Callable[..., int]) -> Callable[..., None]:
            @device_function
            def stage(acc, into):
                for f in range(first, last):
                    place = into + uint32((f - first) * 16)
                    ptx.st_shared_b32(place, pair(acc, f * 4))
                    ptx.st_shared_b32(place + uint32(8 * PITCH), pair(acc, f * 4 + 2))

            return stage

        # Without branches the compiler works on many outputs at a time.
        stage_plain = staging_of(plain)
        stage_common, stage_any = staging_of(swiglu(device.common_silu)), staging_of(swiglu(device.silu))

        @device_function
        def write(acc, staging, lane, out, token, column, count, columns):
            """From [token, column] on of out [count, columns], through the warp's STAGING bytes of shared memory."""
            into = staging + uint32((lane >> 2) * PITCH + (lane & 3) * 4)
            row, chunk = lane >> 3, lane & 7
            outof = staging + uint32(row * PITCH + chunk * 16)
            if gated:
                common = True
                for c in range(first * 4, last * 4):
                    common = common & device.is_common(acc[c])
                if common:
                    stage_common(acc, into)
                else:
                    stage_any(acc, into)
            else:
                stage_plain(acc, into)
            ptx.bar_warp_sync()
            place = column + (p * PIECE + chunk) * 8
            inside = p * PIECE + chunk < kept and place < columns
            for i in range(4):
                here = token + m * 16 + i * 4 + row
                if inside and here < count:
                    v = ptx.ld_shared_v4(outof + uint32(i * 4 * PITCH))
                    ptx.st_global_v4(out, int64(here) * columns + place, v[0], v[1], v[2], v[3])
            ptx.bar_warp_sync()
            following(acc, staging, lane, out, token, column, count, columns)

        return write

    return writer(0)
