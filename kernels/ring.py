"""A ring of stages in shared memory: a producer warp copies into them, consumer warps multiply out of them.

Two mbarriers a stage, 8 bytes each: "full" (the copies to it have landed) and "empty" (every consumer is done with it).
Both sides go round the ring with (stage, parity); parity changes with each round.

    stage       0         1         2         0              1
    producer    copy      copy      copy      empty? copy    empty? copy
    consumer                        full? multiply, release 0   full? multiply, release 1

A consumer begins with stage 0 and parity 0. A producer that has filled stages nobody had used yet begins where `after`
says; its parity is the other one, as it waits for the end of the round before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from kernels import ptx
from kernels.cuda import device_function, int32, uint32


class Ring(NamedTuple):
    """Device functions of a ring. barriers, empty: the shared address of stage 0's barrier of a kind.

    wait(barriers, stage, parity): until the barrier's phase of that parity has ended. release(empty, stage, lane): a
    warp is done with a stage. advance(stage, parity): the next stage and its parity. after(filled): both, of a producer
    that has filled so many stages, at most all.
    """

    wait: Callable[[Any, Any, Any], None]
    release: Callable[[Any, Any, Any], None]
    advance: Callable[[Any, Any], Any]
    after: Callable[[Any], Any]


@functools.cache
def ring(stages: int, suspends: bool = True) -> Ring:
    """A ring of so many stages. suspends: whether a wait lets the warp sleep (try_wait, sm_90 and later)."""
    waits = ptx.mbarrier_try_wait if suspends else ptx.mbarrier_test_wait

    @device_function
    def wait(barriers, stage, parity):
        while waits(barriers + uint32(8 * stage), parity) == 0:
            pass

    @device_function
    def release(empty, stage, lane):
        if lane == 0:
            ptx.mbarrier_arrive(empty + uint32(8 * stage))

    @device_function
    def advance(stage, parity):
        last = stage == stages - 1
        return (int32(0) if last else stage + int32(1)), (parity ^ uint32(1) if last else parity)

    @device_function
    def after(filled):
        stage, parity = filled, uint32(1)
        if stage == stages:
            stage, parity = int32(0), uint32(0)
        return stage, parity

    return Ring(wait, release, advance, after)
