"""A 4-bit matrix has one value, the one of the packages that write such checkpoints, in whichever form it is stored."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from engine.model.errors import ConfigError
from engine.model.quant.formats import awq, bitsandbytes, compressed_tensors, gptq, parse
from engine.model.quant.formats.fields import StoredLayer
from engine.model.quant.int4 import NF4_LEVELS, Int4Matrix, aligned_blocks, joined, make_int4
from engine.model.quant.nibbles import pack_bytes, pack_words, unpack_bytes, unpack_words

LAYERS: dict[str, StoredLayer] = {
    "awq-32": awq.AwqLayer(32),
    "awq-row": awq.AwqLayer(-1),
    "gptq-1-sym": gptq.GptqLayer(32, True, 1, True),
    "gptq-1-asym": gptq.GptqLayer(32, False, 1, True),
    "gptq-2-asym-order": gptq.GptqLayer(32, False, 2, False),
    "gptq-1-sym-order": gptq.GptqLayer(32, True, 1, False),
    "compressed-32-sym": compressed_tensors.CompressedLayer(32, True, False),
    "compressed-32-asym": compressed_tensors.CompressedLayer(32, False, False),
    "compressed-row-sym": compressed_tensors.CompressedLayer(-1, True, False),
    "nf4": bitsandbytes.Nf4Layer(False),
    "nf4-double": bitsandbytes.Nf4Layer(True),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@functools.cache
def recorded() -> dict[str, Tensor]:
    """Made by record_quant_vectors.py."""
    return safetensors.torch.load_file(Path(__file__).with_name("quant_vectors.safetensors"))


def stored(case: str) -> tuple[dict[str, Tensor], Tensor]:
    """The layer's tensors and its value [N, K], as the package computed it."""
    parts = {name.split("/", 1)[1]: tensor for name, tensor in recorded().items() if name.startswith(f"{case}/")}
    return parts, parts.pop("value")


def read(case: str, **changes: Tensor | None) -> Int4Matrix:
    parts, value = stored(case)
    changed = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    given = {name: tensor for name, tensor in (parts | changed).items() if tensor is not None}
    return LAYERS[case].read(given, *value.shape)


@pytest.mark.parametrize("case", LAYERS)
def test_value_is_the_packages(case: str):
    parts, value = stored(case)
    announced = LAYERS[case].tensors(*value.shape)
    assert {name for name, entry in announced.items() if not entry.optional} <= parts.keys() <= announced.keys()
    for name, tensor in parts.items():
        assert announced[name].shape in (tuple(tensor.shape), (-1,)), name
    matrix = read(case)
    assert torch.equal(matrix.dequantise(value.dtype), value)
    assert matrix.shape == value.shape
    assert (matrix.g_idx is not None) == case.endswith("order")


PACKERS: dict[str, Callable[[Int4Matrix], dict[str, Tensor]]] = {
    "awq-32": awq.pack,
    "gptq-2-asym-order": lambda matrix: gptq.pack(matrix, version=2),
    "gptq-1-sym-order": gptq.pack,
    "compressed-32-sym": compressed_tensors.pack,
    "compressed-32-asym": compressed_tensors.pack,
    "compressed-row-sym": compressed_tensors.pack,
    "nf4": bitsandbytes.pack,
}


@pytest.mark.parametrize("case", PACKERS)
def test_packing_is_the_packages(case: str):
    parts, _ = stored(case)
    packed = PACKERS[case](read(case))
    assert packed.keys() == parts.keys()
    for name, tensor in packed.items():
        if name != bitsandbytes.STATE:
            assert torch.equal(tensor, parts[name]) and tensor.dtype == parts[name].dtype, name


def test_zero_points_of_version_1():
    """0 and 15 among all others; what borrows is undone as it was done, and what does not carries nothing."""
    zeros = torch.tensor([[0, 15, 0, 0, 7, 1, 15, 8, 9, 8, 7, 0, 15, 15, 15, 0]], dtype=torch.uint8)
    parts, _ = stored("gptq-1-asym")
    parts["g_idx"], parts["scales"] = torch.zeros(64, dtype=torch.int32), parts["scales"][:1]
    for borrows, packed in (
        (False, pack_words(zeros - 1 & 15)),
        (True, pack_words(zeros) - 0x11111111),
    ):
        layer = gptq.GptqLayer(-1, False, 1, borrows)
        matrix = layer.read(parts | {"qzeros": packed}, 16, 64)
        assert torch.equal(matrix.zero_points().t(), zeros), borrows
    assert not torch.equal(pack_words(zeros - 1 & 15), pack_words(zeros) - 0x11111111)


@pytest.mark.parametrize("offset", [7, 8])
def test_a_symmetric_zero_point_is_8_in_either_version(offset: int):
    """Some checkpoints say "gptq" and store what "gptq_v2" does."""
    _, value = stored("gptq-1-sym")
    words = pack_words(torch.full((2, 16), offset, dtype=torch.uint8))
    assert torch.equal(read("gptq-1-sym", qzeros=words).dequantise(torch.float16), value)


def drawn(rows: int, columns: int, group: int, symmetric: bool = False) -> Int4Matrix:
    """A matrix like one of weights: the zero points are where the codes' mean is."""
    codes = (torch.randn(rows, columns) * 2.5 + 8).round().clamp(0, 15).to(torch.uint8)
    scales = torch.rand(rows, -(-columns // group)).half() + 0.5
    zeros = None if symmetric else torch.randint(6, 11, scales.shape, dtype=torch.uint8)
    return make_int4(codes, scales, zeros, group)


@pytest.mark.parametrize(("written", "said"), [(1, 2), (2, 1)])
def test_asymmetric_zero_points_of_the_other_version_are_refused(written: int, said: int):
    matrix = drawn(64, 256, 128)
    parts = gptq.pack(matrix, written)
    right = gptq.GptqLayer(128, False, written, False).read(parts, 64, 256)
    assert torch.equal(right.dequantise(torch.float32), matrix.dequantise(torch.float32))
    with pytest.raises(ValueError, match=r"lie [+-][01]\.\d\d steps from 0 .* checkpoint_format 'gptq"):
        gptq.GptqLayer(128, False, said, False).read(parts, 64, 256)


def test_zero_points_0_and_15_negative_and_zero_scales():
    codes = torch.arange(16, dtype=torch.uint8).repeat(4, 1)
    scales = torch.tensor([[0.5], [-0.5], [0.0], [-2.0]]).half()
    zeros = torch.tensor([[0], [15], [3], [15]], dtype=torch.uint8)
    matrix = make_int4(codes, scales, zeros, 16)
    exact = (torch.arange(16) - zeros.int()) * scales.float()
    assert torch.equal(matrix.dequantise(torch.float32), exact)
    assert torch.equal(compressed_tensors.CompressedLayer(-1, False, False).read(
        compressed_tensors.pack(matrix), 4, 16).dequantise(torch.float32), exact)  # fmt: skip


def test_a_product_is_rounded_once():
    """fp16 scales in a bf16 engine are not rounded to bf16 first."""
    matrix = drawn(8, 64, 32)
    exact = (matrix.unpacked().double() - matrix.zero_points().repeat_interleave(32, 1)) * (
        matrix.scales.double().repeat_interleave(32, 1)
    )
    value = matrix.dequantise(torch.bfloat16)
    assert torch.equal(value, exact.float().bfloat16())
    twice = matrix.scales.bfloat16().double().repeat_interleave(32, 1)
    rounded = (matrix.unpacked().double() - matrix.zero_points().repeat_interleave(32, 1)) * twice
    assert not torch.equal(value, rounded.float().bfloat16())


def test_groups_that_do_not_divide_a_row():
    matrix = drawn(16, 200, 128)
    parts = gptq.pack(matrix)
    assert parts["scales"].shape == (2, 16)
    layer = gptq.GptqLayer(128, False, 1, False)
    assert layer.tensors(16, 200)["qzeros"].shape == (2, 2)
    assert torch.equal(layer.read(parts, 16, 200).dequantise(torch.float32), matrix.dequantise(torch.float32))


@pytest.mark.parametrize("columns", [96, 40, 7])
def test_nf4_blocks_that_reach_into_the_next_row(columns: int):
    absmax = torch.rand(-(-5 * columns // 64))
    codes = torch.randint(0, 16, (5, columns), dtype=torch.uint8)
    scales, group = aligned_blocks(absmax, 5, columns, 64)
    value = make_int4(codes, scales, None, group, nf4=True).dequantise(torch.float32)
    flat = torch.tensor(NF4_LEVELS)[codes.int()].flatten() * absmax.repeat_interleave(64)[: 5 * columns]
    assert torch.equal(value.flatten(), flat)


def test_rows_and_parts():
    q, k = drawn(8, 64, 32), drawn(16, 64, 32, symmetric=True)
    whole = joined([q, k])
    assert whole is not None and whole.nbytes < 24 * 64
    value = whole.dequantise(torch.bfloat16)
    assert torch.equal(value, torch.cat([q.dequantise(torch.bfloat16), k.dequantise(torch.bfloat16)]))
    assert torch.equal(whole.rows(5, 11).dequantise(torch.bfloat16), value[5:11])
    assert joined([q, drawn(8, 64, 64)]) is None
    assert joined([q, make_int4(q.unpacked(), q.scales, q.zeros, 32, torch.arange(64).flip(0).int() // 32)]) is None


@pytest.mark.parametrize("columns", [1, 7, 8, 30])
def test_nibbles(columns: int):
    codes = torch.randint(0, 16, (3, columns), dtype=torch.uint8)
    assert torch.equal(unpack_bytes(pack_bytes(codes), columns), codes)
    for order in ((0, 1, 2, 3, 4, 5, 6, 7), awq.ORDER):
        assert torch.equal(unpack_words(pack_words(codes, order), columns, order), codes)
    word = int(pack_words(torch.arange(8, dtype=torch.uint8)[None], awq.ORDER)) & 0xFFFFFFFF
    assert word == 0x75316420


SCALE = torch.full((2, 16), 0.5, dtype=torch.float16)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("awq-32", {"scales": SCALE * torch.nan}, r"scales\[0, 0\] is nan; scales are finite"),
        ("gptq-1-sym", {"scales": SCALE * torch.inf}, r"scales\[0, 0\] is inf"),
        ("compressed-32-sym", {"weight_scale": torch.full((16, 2), -torch.inf).bfloat16()}, r"weight_scale\[0, 0\]"),
        ("nf4", {"weight__absmax": torch.full((16,), torch.nan)}, r"weight.absmax\[0, 0\] is nan"),
        ("gptq-1-sym", {"g_idx": torch.full((64,), 2, dtype=torch.int32)}, r"g_idx\[0\] is 2; there are groups 0 … 1"),
        ("gptq-1-sym", {"g_idx": torch.full((64,), -1, dtype=torch.int32)}, r"g_idx\[0\] is -1"),
        ("gptq-1-sym", {"qzeros": torch.zeros(2, 2, dtype=torch.int32)}, r"zero points that are not 8.*sym = true"),
        ("gptq-1-sym", {"bias": torch.ones(16)}, "bias is not all zeros"),
        ("compressed-32-sym", {"weight_shape": torch.tensor([16, 32])}, r"weight_shape is \[16, 32\]; .* \[16, 64\]"),
        ("nf4", {"weight__quant_map": torch.linspace(-1, 1, 16)}, "NF4's sixteen levels"),
    ],
)
def test_what_tensors_hold_is_refused_by_name(case: str, changes: dict[str, Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        read(case, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocksize": 128}, "blocksize is 128; 64 was expected"),
        ({"shape": [16, 32]}, r"shape is \[16, 32\]; \[16, 64\] was expected"),
        ({"nested_offset": None}, "nested_offset is None; a number was expected"),
        ({"nested_dtype": "float16"}, "nested_dtype is 'float16'; 'float32' was expected"),
    ],
)
def test_quant_state_is_checked(change: dict[str, Any], message: str):
    parts, _ = stored("nf4-double")
    state = json.loads(bytes(parts[bitsandbytes.STATE].tolist())) | change
    parts[bitsandbytes.STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        LAYERS["nf4-double"].read(parts, 16, 64)
    with pytest.raises(ValueError, match="is not JSON"):
        LAYERS["nf4-double"].read(parts | {bitsandbytes.STATE: torch.full((4,), 200, dtype=torch.uint8)}, 16, 64)


def test_an_order_of_minus_one_is_none():
    layer = compressed_tensors.CompressedLayer(32, True, True)
    parts, value = stored("compressed-32-sym")
    unset = layer.read(parts | {"weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}, 16, 64)
    assert unset.g_idx is None and torch.equal(unset.dequantise(torch.bfloat16), value)
    swapped = layer.read(parts | {"weight_g_idx": (1 - torch.arange(64) // 32).int()}, 16, 64)
    assert swapped.g_idx is not None and not torch.equal(swapped.dequantise(torch.bfloat16), value)


@pytest.mark.parametrize(
    ("layer", "rows", "columns", "message"),
    [
        (awq.AwqLayer(32), 12, 64, "12 outputs are not a multiple of 8"),
        (awq.AwqLayer(128), 16, 192, "192 inputs are not whole groups of 128"),
        (gptq.GptqLayer(32, True, 1, False), 16, 36, "36 inputs are not a multiple of 8"),
        (compressed_tensors.CompressedLayer(128, True, False), 16, 192, "192 inputs are not whole groups of 128"),
    ],
)
def test_shapes_that_a_form_cannot_have(layer: StoredLayer, rows: int, columns: int, message: str):
    with pytest.raises(ValueError, match=message):
        layer.tensors(rows, columns)


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}},
    "ignore": ["lm_head"],
}
NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


def test_configurations():
    up, head = "model.layers.1.mlp.up_proj", "lm_head"
    plain = parse(AWQ | {"modules_to_not_convert": ["layers.0", "lm_head", "self_attn"]})
    assert plain.layer(up) == awq.AwqLayer(128)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.3.self_attn.q_proj", head):
        assert plain.layer(name) is None
    assert plain.layer("model.layers.10.mlp.up_proj") == awq.AwqLayer(128)
    assert parse(GPTQ).layer(up) == gptq.GptqLayer(128, True, 1, False) and parse(GPTQ).layer(head) is None
    own = {"checkpoint_format": "gptq_v2", "lm_head": True, "meta": {"quantizer": ["gptqmodel:7.3.4"]}}
    assert parse(GPTQ | own).layer(head) == gptq.GptqLayer(128, True, 2, True)
    dynamic = {r"+:.*\.1\.mlp\..*": {"group_size": 32, "sym": False}, r"-:.*down_proj": {}}
    overridden = parse(GPTQ | {"dynamic": dynamic})
    assert overridden.layer(up) == gptq.GptqLayer(32, False, 1, False)
    assert overridden.layer("model.layers.2.mlp.down_proj") is None
    assert overridden.layer("model.layers.2.mlp.up_proj") == gptq.GptqLayer(128, True, 1, False)
    assert parse(NF4 | {"llm_int8_skip_modules": ["lm_head"]}).layer(up) == bitsandbytes.Nf4Layer(True)


def test_groups_of_compressed_tensors():
    fine = {"targets": [r"re:.*up_proj$"], "weights": WEIGHTS | {"group_size": 32, "symmetric": False}}
    channel = WEIGHTS | {"strategy": "channel", "group_size": None}
    whole = {"targets": ["model.layers.1.mlp.up_proj"], "weights": channel}
    groups = COMPRESSED["config_groups"] | {"group_1": fine, "group_2": whole}
    config = parse(COMPRESSED | {"config_groups": groups, "ignore": ["lm_head", r"re:.*\.o_proj"]})
    layer = compressed_tensors.CompressedLayer
    assert config.layer("model.layers.0.mlp.down_proj") == layer(128, True, False)
    assert config.layer("model.layers.0.mlp.up_proj") == layer(32, False, False)
    assert config.layer("model.layers.1.mlp.up_proj") == layer(-1, True, False)
    assert config.layer("model.layers.1.self_attn.o_proj") is None and config.layer("lm_head") is None
    written = parse(compressed_tensors.settings(64, False, ["lm_head"]))
    assert written.layer("model.layers.0.mlp.up_proj") == layer(64, False, False) and written.layer("lm_head") is None


def weights(**changes: Any) -> dict[str, Any]:
    return COMPRESSED | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS | changes}}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (None, "quantization_config = None is not an object"),
        ({"quant_method": "fp8"}, r"quant_method = 'fp8' is not read here; AWQ.*`afs quantize`"),
        ({"quant_method": "gguf"}, "'gguf' is not read here"),
        ({"quant_method": "auto-round"}, "'auto-round' is not read here"),
        ({"quant_method": "mxfp4"}, "'mxfp4' is not read here"),
        ({"bits": 4}, "quant_method = None is not read here"),
        (AWQ | {"bits": 8}, "bits = 8: weights of 8 bits are not computed here; 4 bits are"),
        (AWQ | {"version": "gemv"}, "version = 'gemv' is not read here; AutoAWQ's 'gemm'"),
        (AWQ | {"version": "marlin"}, "version = 'marlin' is not read here"),
        (AWQ | {"group_size": 256}, "group_size = 256 is not supported; one of 32, 64, 128, -1"),
        (AWQ | {"unheard_of": 1}, "quantization_config.unheard_of = 1 is not a field known here"),
        ({k: v for k, v in AWQ.items() if k != "group_size"}, "group_size is missing"),
        (GPTQ | {"bits": 3}, "bits = 3"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin' is not read here"),
        (GPTQ | {"is_marlin_format": True}, "checkpoint_format = 'marlin' is not read here"),
        (GPTQ | {"checkpoint_format": "bitblas"}, "'bitblas' is not read here; 'gptq' and 'gptq_v2' are"),
        (GPTQ | {"pack_dtype": "int64"}, "pack_dtype = 'int64'"),
        (GPTQ | {"sym": "yes"}, "sym = 'yes' is not a bool"),
        (GPTQ | {"dynamic": {"(": {}}}, "is not a regular expression"),
        (GPTQ | {"dynamic": {".*": {"bits": 8}}}, r"dynamic\['\.\*'\].bits = 8"),
        (COMPRESSED | {"format": "nvfp4-pack-quantized"}, "format = 'nvfp4-pack-quantized' is not read here"),
        (COMPRESSED | {"format": "marlin-24"}, "format = 'marlin-24'"),
        (COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (COMPRESSED | {"ignore": ["re:("]}, "'re:\\(' is not a regular expression"),
        (weights(type="float"), r"weights.type = 'float' is not computed here.*NVFP4"),
        (weights(num_bits=8), "num_bits = 8"),
        (weights(strategy="tensor"), "strategy = 'tensor' is not read here"),
        (weights(dynamic=True), "dynamic scales"),
        (weights(group_size=16), "group_size = 16 is not supported"),
        (
            COMPRESSED | {"config_groups": {"a": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": {}}}},
            r"config_groups.a.input_activations = \{\}: activations have 16 bits",
        ),
        (NF4 | {"load_in_8bit": True}, "load_in_8bit = true: weights of 8 bits"),
        (NF4 | {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type = 'fp4' is not computed here; 'nf4' is"),
        (NF4 | {"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage = 'bfloat16'"),
        (NF4 | {"load_in_4bit": False}, "load_in_4bit is not true"),
    ],
)
def test_configurations_are_refused_by_name(fields: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        parse(fields)


def test_wrong_shapes_of_a_matrix():
    codes, scales = torch.zeros(4, 16, dtype=torch.uint8), torch.ones(4, 1)
    with pytest.raises(ValueError, match=r"codes is torch.uint8 \[4, 16\]; torch.uint8 \[4, 32\] was expected"):
        Int4Matrix(codes, scales, None, 64, 64)
    with pytest.raises(ValueError, match="1 groups of 16 columns are not a row of 32"):
        Int4Matrix(codes, scales, None, 32, 16)
