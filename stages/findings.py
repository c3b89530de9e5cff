"""What the checks of parity share: rows that pass or fail, engines of any backend, errors against a reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.metrics import Rows

if TYPE_CHECKING:
    from torch import Tensor

    from engine.llm import EngineConfig
    from engine.model.kv_cache import KVCache
    from engine.model.transformer import Model


@dataclass
class Findings:
    """Rows of one parity run and what failed among them, worst things first found."""

    rows: Rows
    failures: list[str] = field(default_factory=list)

    def check(
        self,
        *,
        suite: str,
        case: str,
        metric: str,
        value: float,
        limit: float,
        limit_kind: str,
        unit: str = "1",
        strict: bool = False,
        note: str | None = None,
        **knobs: Any,
    ) -> bool:
        """Adds `value`, lower is better, which passes up to `limit` (below it if `strict`); returns whether it did."""
        finite = math.isfinite(value)
        passed = finite and (value < limit if strict else value <= limit)
        if not passed:
            note = explain(value, limit, limit_kind, unit) + (f"; {note}" if note else "")
            where = " ".join(str(knobs[knob]) for knob in ("model", "dtype", "backend") if knobs.get(knob))
            self.failures.append(f"{suite}: {case}{f' ({where})' if where else ''}: {metric} {note}")
        self.rows.add(
            suite=suite, case=case, metric=metric, value=value if finite else None, unit=unit, better="lower",
            limit=limit, limit_kind=limit_kind, status="ok" if passed else "failed", note=note, **knobs,
        )  # fmt: skip
        return passed


def explain(value: float, limit: float, limit_kind: str, unit: str) -> str:
    """`0.5, 4 times the 0.125 allowed (...)`."""
    times = f"{value / limit:.3g} times the {limit:.3g} allowed" if limit > 0 else f"{limit:g} allowed"
    return f"{value:.4g}{'' if unit == '1' else ' ' + unit}, {times} ({limit_kind})"


def load_engine(path: Path, engine: EngineConfig) -> Model:
    """The checkpoint at `path` in the engine that `engine` describes."""
    from engine.llm import make_ops
    from engine.model.config import ModelConfig
    from engine.model.transformer import Model
    from engine.model.weights import load_weights

    config = ModelConfig.from_file(path)
    ops = make_ops(engine)
    return Model(config, load_weights(path, config, engine.device, engine.torch_dtype, ops), ops)


def new_cache(model: Model, slots: int, capacity: int, paged: bool) -> KVCache:
    """An empty cache; a paged one's pages are given to its slots in an order that is none."""
    import torch

    from engine.model.kv_cache import PAGE_SIZE

    if not paged:
        return model.new_cache(slots, capacity)
    cache = model.new_paged_cache(pages=slots * -(-capacity // PAGE_SIZE), slots=slots, capacity=capacity)
    order = torch.randperm(cache.pages, generator=torch.Generator().manual_seed(0)).tolist()
    each = cache.pages // slots
    cache.assign({slot: order[slot * each : (slot + 1) * each] for slot in range(slots)})
    return cache


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence to run: they go to `slot`, from position `begin` on."""

    slot: int
    token_ids: Sequence[int]
    begin: int = 0


def forward(model: Model, pieces: Sequence[Piece], cache: KVCache, observe: Any = None) -> list[Tensor]:
    """One packed forward pass; each piece's logits [its tokens, V]."""
    import torch

    from engine.ops.batch import Batch, TokenSpan

    device = model.weights.device

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    tokens = column([token for piece in pieces for token in piece.token_ids])
    slots = column([piece.slot for piece in pieces for _ in piece.token_ids])
    positions = column([piece.begin + index for piece in pieces for index in range(len(piece.token_ids))])
    spans = [TokenSpan(len(piece.token_ids), piece.slot, piece.begin) for piece in pieces]
    with torch.inference_mode():
        logits = model.forward(Batch(tokens, slots, positions, spans=spans), cache, observe)
    return list(logits.split([len(piece.token_ids) for piece in pieces]))


def observe_engine(model: Model, token_ids: Sequence[int]) -> dict[str, Tensor]:
    """One sequence through the engine: {"embedding", "layers.<i>", "norm": [T, hidden], "logits": [T, vocab]}."""
    seen: dict[str, Tensor] = {}

    def record(name: str, tensor: Tensor) -> None:
        if not name.endswith((".attention", ".mlp")):
            seen[name] = tensor.clone()

    forward(model, [Piece(0, token_ids)], model.new_cache(1, len(token_ids)), record)
    return seen


@dataclass
class Error:
    """Absolute differences, added up over prompts."""

    total: float = 0.0
    count: int = 0
    largest: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.count

    def add(self, ours: Tensor, exact: Tensor) -> None:
        """Raises ValueError where the shapes differ: broadcasting would hide it."""
        if ours.shape != exact.shape:
            raise ValueError(f"shape {list(ours.shape)} where the reference has {list(exact.shape)}")
        difference = (ours.double() - exact.double()).abs()
        self.total += difference.sum().item()
        self.count += difference.numel()
        largest = difference.max().item()
        # max() keeps its first argument against NaN.
        self.largest = largest if math.isnan(largest) else max(self.largest, largest)


def errors(ours: Sequence[Mapping[str, Tensor]], exact: Sequence[Mapping[str, Tensor]]) -> dict[str, Error]:
    """name -> error over all prompts, in the forward pass's order. Raises ValueError for a name only one side has."""
    found: dict[str, Error] = {}
    for mine, right in zip(ours, exact, strict=True):
        if mine.keys() != right.keys():
            raise ValueError(f"observed by one side only: {', '.join(sorted(mine.keys() ^ right.keys()))}")
        for name in forward_order(mine):
            found.setdefault(name, Error()).add(mine[name].to(right[name].device), right[name])
    return found


def mean_difference(ours: Tensor, exact: Tensor) -> float:
    """Mean absolute difference of two tensors of one shape, in fp32."""
    return (ours.float() - exact.float()).abs().mean().item()


def unequal(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """Places at which two sequences differ, the length of the longer one's rest included."""
    return sum(a != b for a, b in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs))


def forward_order(names: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """embedding, layers.0, layers.1, ..., norm, logits."""

    def place(name: str) -> tuple[int, int]:
        kind, _, index = name.partition(".")
        return ("embedding", "layers", "norm", "logits").index(kind), int(index or 0)

    return sorted(names, key=place)


def divergence(exact: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Mean KL(softmax(exact) || softmax(other)) in nats over all rows of [T, V] logits."""
    import torch

    total, count = 0.0, 0
    for right, mine in zip(exact, other, strict=True):
        p, q = right.double().log_softmax(-1), mine.double().to(right.device).log_softmax(-1)
        total += torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).item()
        count += right.shape[0]
    # Rounding may leave a tiny negative sum where the two are equal.
    return total / count if math.isnan(total) else max(0.0, total / count)


def bf16_step(value: float) -> float:
    """The distance between bf16 numbers at `value` (8 significant bits)."""
    return 2.0 ** (math.floor(math.log2(max(abs(value), 2.0**-126))) - 7)
