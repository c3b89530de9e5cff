"""The architecture of a checkpoint, read strictly from its `config.json`.

Whatever could change a number is either understood or refused by name. A field that is absent is an error: the class
defaults of other libraries are never assumed (those for OLMo-2 are wrong for every released OLMo-2). The only fields
that may be left out are those that the shapes of the checkpoint's tensors prove when the weights are loaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.model.architectures import ARCHITECTURES, Architecture
from engine.model.errors import ConfigError

if TYPE_CHECKING:
    from engine.model.quant.formats import Quantization

DTYPES = ("bfloat16", "float16", "float32")
FULL, SLIDING = "full_attention", "sliding_attention"

# Fields that describe training, bookkeeping or generation defaults: they change no number of a forward pass.
HARMLESS = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures attention_dropout auto_map bos_token_id
    chunk_size_feed_forward dtype eos_token_id id2label initializer_range is_decoder is_encoder_decoder label2id
    max_sequence_length model_type output_attentions output_hidden_states pad_token_id pretraining_tp problem_type
    return_dict torch_dtype transformers_version unsloth_version use_cache
    """.split()  # noqa: SIM905
)
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


COMMON = frozenset(REQUIRED) | {
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "quantization_config",
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: inverse frequencies theta^(-2i/head_dim), then scaled as `type` says.

    `factor` is used by "linear" and "llama3"; the three fields after it by "llama3" only (lengths in tokens).
    """

    theta: float
    type: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer. Sizes in elements, lengths in tokens."""

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    rope: Rope  # of layers that see everything
    sliding_rope: Rope  # of layers with a window
    layer_types: tuple[str, ...]  # FULL or SLIDING, one a layer
    sliding_window: int | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    dtype: str | None  # of the stored weights, as the file says
    quantization: "Quantization | None" = None  # of the stored weights of 4 bits

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    def window(self, layer: int) -> int:
        """Keys a query of `layer` may see, itself included; 0 = all before it."""
        return (self.sliding_window or 0) if self.layer_types[layer] == SLIDING else 0

    def layer_rope(self, layer: int) -> Rope:
        return self.sliding_rope if self.layer_types[layer] == SLIDING else self.rope

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Read `path`, a `config.json` or the folder that holds one.

        Raises:
            ConfigError: The file is absent, is not a JSON object, or `from_dict` refuses it.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: there is no such file; a checkpoint folder holds a config.json") from None
        except ValueError as error:
            raise ConfigError(f"{path}: not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}: holds a JSON {type(fields).__name__}, not an object")
        try:
            return cls.from_dict(fields)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ModelConfig":
        """Read the fields of a `config.json`, written by transformers 4 or 5.

        Raises:
            ConfigError: A field is missing, unknown, of the wrong type, or asks for something not computed here.
        """
        arch = _architecture(fields)
        for field in fields:
            if field not in HARMLESS | COMMON | arch.fields:
                raise ConfigError(
                    f"{field} = {fields[field]!r} is not a field known for {arch.name}; it may change results"
                )

        act = _get(fields, "hidden_act", str)
        if act != "silu":
            raise ConfigError(f"hidden_act = {act!r} is not supported; the engine computes 'silu'")
        for field in ("attention_bias", "mlp_bias"):
            if fields.get(field) not in (None, False):
                raise ConfigError(f"{field} = {fields[field]!r} is not supported; projections have no bias here")

        sizes = {field: _positive(fields, field) for field in REQUIRED}
        heads = sizes["num_attention_heads"]
        kv_heads = heads if fields.get("num_key_value_heads") is None else _positive(fields, "num_key_value_heads")
        if heads % kv_heads:
            raise ConfigError(f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}")
        if fields.get("head_dim") is not None:
            head_dim = _positive(fields, "head_dim")
        elif sizes["hidden_size"] % heads:
            raise ConfigError(f"hidden_size = {sizes['hidden_size']} is not a multiple of {heads} heads; give head_dim")
        else:
            head_dim = sizes["hidden_size"] // heads
        if head_dim % 2:
            raise ConfigError(f"head_dim = {head_dim} is odd; rotary embedding needs pairs")
        eps = float(_get(fields, "rms_norm_eps", (int, float)))
        if not 0 < eps < 1:
            raise ConfigError(f"rms_norm_eps = {eps} is not between 0 and 1")

        layer_types, window = _layer_types(fields, arch, sizes["num_hidden_layers"])
        rope = _rope_by_layer_type(fields, arch)
        dtype = fields.get("dtype", fields.get("torch_dtype"))
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"dtype = {dtype!r} is not supported; one of {', '.join(DTYPES)}")
        return cls(
            architecture=arch,
            **sizes,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=eps,
            hidden_act=act,
            tie_word_embeddings=_get(fields, "tie_word_embeddings", bool),
            rope=rope[FULL],
            sliding_rope=rope[SLIDING],
            layer_types=layer_types,
            sliding_window=window,
            bos_token_id=_token(fields, "bos_token_id", sizes["vocab_size"]),
            eos_token_ids=_eos(fields, sizes["vocab_size"]),
            pad_token_id=_token(fields, "pad_token_id", sizes["vocab_size"]),
            dtype=dtype,
            quantization=_quantization(fields),
        )


def _quantization(fields: dict[str, Any]) -> "Quantization | None":
    if fields.get("quantization_config") is None:
        return None
    from engine.model.quant.formats import parse  # which raises this file's errors

    return parse(fields["quantization_config"])


def _architecture(fields: dict[str, Any]) -> Architecture:
    names = _get(fields, "architectures", list)
    known = ", ".join(ARCHITECTURES)
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        raise ConfigError(f"architectures = {names!r} is not supported; one of {known}")
    arch = ARCHITECTURES[names[0]]
    if _get(fields, "model_type", str) != arch.model_type:
        raise ConfigError(f"model_type = {fields['model_type']!r} does not belong to {names[0]} ({arch.model_type!r})")
    return arch


def _get(fields: dict[str, Any], field: str, kind: type | tuple[type, ...], where: str = "") -> Any:
    if field not in fields:
        raise ConfigError(f"{where}{field} is missing; no default is assumed for it")
    value = fields[field]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ConfigError(f"{where}{field} = {value!r} is not a {' or '.join(k.__name__ for k in kinds)}")
    return value


def _positive(fields: dict[str, Any], field: str) -> int:
    value = _get(fields, field, int)
    if value < 1:
        raise ConfigError(f"{field} = {value} is not at least 1")
    return value


def _token(fields: dict[str, Any], field: str, vocab_size: int) -> int | None:
    if fields.get(field) is None:
        return None
    value = _get(fields, field, int)
    if field == "pad_token_id" and value == -1:  # written by some checkpoints to say there is none
        return None
    if not 0 <= value < vocab_size:
        raise ConfigError(f"{field} = {value} is not a token of a vocabulary of {vocab_size}")
    return value


def _eos(fields: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    if "eos_token_id" not in fields:
        raise ConfigError("eos_token_id is missing; no default is assumed for it (null says there is none)")
    value = fields["eos_token_id"]
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(t for i in ids if (t := _token({"eos_token_id": i}, "eos_token_id", vocab_size)) is not None)


def _layer_types(fields: dict[str, Any], arch: Architecture, layers: int) -> tuple[tuple[str, ...], int | None]:
    if "sliding_window" not in arch.fields:
        return (FULL,) * layers, None
    if "sliding_window" not in fields:
        raise ConfigError("sliding_window is missing; no default is assumed for it (null says there is none)")
    window = None if fields["sliding_window"] is None else _positive(fields, "sliding_window")
    if "layer_types" not in arch.fields:
        return ((FULL if window is None else SLIDING),) * layers, window
    types = _get(fields, "layer_types", list)
    if len(types) != layers:
        raise ConfigError(f"layer_types has {len(types)} entries for num_hidden_layers = {layers}")
    for kind in types:
        if kind not in (FULL, SLIDING):
            raise ConfigError(f"layer_types names {kind!r}; the engine computes {FULL!r} and {SLIDING!r}")
    if SLIDING in types and window is None:
        raise ConfigError(f"layer_types names {SLIDING!r} but sliding_window is null")
    return tuple(types), window


def _rope_by_layer_type(fields: dict[str, Any], arch: Architecture) -> dict[str, Rope]:
    """Either `rope_parameters` (transformers 5; flat, or one a layer type) or `rope_theta` with `rope_scaling`."""
    limit = fields["max_position_embeddings"]
    if fields.get("rope_parameters") is not None:
        if fields.get("rope_scaling") is not None:
            raise ConfigError("rope_parameters and rope_scaling are both given; the file must hold one of them")
        given = _get(fields, "rope_parameters", dict)
        if "rope_theta" in fields:
            given = {"rope_theta": fields["rope_theta"], **given}
        if not {FULL, SLIDING} & set(given):
            rope = _rope(given, limit, "rope_parameters.")
            if arch.rope_by_layer_type and rope.type != "default":
                raise ConfigError(
                    f"rope_parameters = {given!r} scales the layers of all types; in this architecture those of "
                    f"{SLIDING!r} are never scaled: give rope_parameters.{FULL} and rope_parameters.{SLIDING}"
                )
            return dict.fromkeys((FULL, SLIDING), rope)
        if not arch.rope_by_layer_type:
            raise ConfigError(f"rope_parameters = {given!r} is by layer type; this architecture has one for all")
        for field in sorted(set(given) - {FULL, SLIDING, "rope_theta"}):
            raise ConfigError(
                f"rope_parameters.{field} = {given[field]!r} is beside {FULL!r} and {SLIDING!r}, in neither"
            )
        return {
            kind: _rope(_get(given, kind, dict, "rope_parameters."), limit, f"rope_parameters.{kind}.")
            for kind in (FULL, SLIDING)
        }
    theta = _get(fields, "rope_theta", (int, float))
    plain = _rope({"rope_theta": theta, "rope_type": "default"}, limit, "")
    if fields.get("rope_scaling") is None:
        return dict.fromkeys((FULL, SLIDING), plain)
    scaled = _rope({"rope_theta": theta, **_get(fields, "rope_scaling", dict)}, limit, "rope_scaling.")
    return {FULL: scaled, SLIDING: plain if arch.rope_by_layer_type else scaled}


def _rope(given: dict[str, Any], max_positions: int, where: str) -> Rope:
    given = dict(given)
    legacy = given.pop("type", None)
    kind = given.setdefault("rope_type", legacy)
    if legacy is not None and legacy != kind:
        raise ConfigError(f"{where}type = {legacy!r} contradicts {where}rope_type = {kind!r}")
    used = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    }
    if kind not in used:
        raise ConfigError(f"{where}rope_type = {kind!r} is not supported; one of {', '.join(used)}")
    if given.get("partial_rotary_factor") == 1.0:
        del given["partial_rotary_factor"]
    for field in given:
        if field not in used[kind] | {"rope_type", "rope_theta"}:
            raise ConfigError(f"{where}{field} = {given[field]!r} is not a field of rope_type {kind!r}")
    values = {field: _get(given, field, (int, float), where) for field in sorted(used[kind])}
    theta = _get(given, "rope_theta", (int, float), where)
    for field, value in {"rope_theta": theta, **values}.items():
        if value <= 0:
            raise ConfigError(f"{where}{field} = {value} is not positive")
    if kind == "llama3":
        if values["high_freq_factor"] <= values["low_freq_factor"]:
            raise ConfigError(f"{where}high_freq_factor is not above low_freq_factor: {values}")
        if values["original_max_position_embeddings"] > max_positions:
            raise ConfigError(f"{where}original_max_position_embeddings is above {max_positions} positions: {values}")
    return Rope(theta=float(theta), type=kind, **values)
