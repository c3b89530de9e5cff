"""Record quant_vectors.safetensors: small matrices as other packages store them, and what these make of them.

In an environment with compressed-tensors 0.20.1, bitsandbytes 0.50.2, and the sources of AutoAWQ 0.2.9 and GPTQModel
7.3.4 (commit f4c327a1) on PYTHONPATH: `python tests/engine/model/quant/record_quant_vectors.py`. Names: "case/tensor of
the layer", and "case/value", fp16 or bf16 [N, K]. Cases of AutoAWQ are [K, N] there and turned here.
"""

# pyright: reportMissingImports=false

from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

ROWS, COLUMNS = 16, 64


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def scales(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return (torch.randn(shape) * 0.02).to(dtype)


def awq(group: int) -> dict[str, torch.Tensor]:
    from awq.utils.packing_utils import dequantize_gemm

    groups = COLUMNS // group
    stored = {"qweight": words(COLUMNS, ROWS // 8), "qzeros": words(groups, ROWS // 8), "scales": scales(groups, ROWS)}
    value = dequantize_gemm(stored["qweight"], stored["qzeros"], stored["scales"], 4, group)
    return stored | {"value": value.t().contiguous()}


def gptq(version: int, symmetric: bool, shuffled: bool) -> dict[str, torch.Tensor]:
    """Groups of 32. The zero points of version 1 are made less by GPTQModel itself; a 0 is among them."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    layer = TorchLinear(
        bits=4, group_size=32, sym=symmetric, desc_act=shuffled, in_features=COLUMNS, out_features=ROWS, bias=False,
        pack_dtype=torch.int32,
    )  # fmt: skip
    order = torch.randperm(COLUMNS) if shuffled else torch.arange(COLUMNS)
    layer.qweight = words(COLUMNS // 8, ROWS)
    layer.qzeros = torch.full((2, ROWS // 8), -0x77777778, dtype=torch.int32) if symmetric else words(2, ROWS // 8)
    layer.scales, layer.g_idx = scales(2, ROWS), (order // 32).int()
    layer.qzero_format(format=2)
    layer._init_wf_unsqueeze_buffers()
    value = super(TorchLinear, layer).dequantize_weight().t().contiguous()
    if version == 1:
        convert_gptq_v2_to_v1_format_module(layer, SimpleNamespace(bits=4, pack_dtype=torch.int32))
    names = ("qweight", "qzeros", "scales", "g_idx")
    return {name: getattr(layer, name).clone() for name in names} | {"value": value}


def compressed(group: int, symmetric: bool) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    grouping = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, **grouping)
    )
    groups = 1 if group == -1 else COLUMNS // group
    state = {
        "weight": torch.randn(ROWS, COLUMNS).bfloat16(),
        "weight_scale": (torch.rand(ROWS, groups) / 3 + 0.1).bfloat16(),
    }
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-8, 8, (ROWS, groups), dtype=torch.int8)
    stored = PackedQuantizationCompressor.compress(state, scheme)
    return stored | {"value": PackedQuantizationCompressor.decompress(stored, scheme)["weight"]}


def nf4(double: bool) -> dict[str, torch.Tensor]:
    from bitsandbytes import functional

    weight = torch.randn(ROWS, COLUMNS).bfloat16()
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    named = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {"weight": codes, **named, "value": functional.dequantize_4bit(codes, state)}


def main() -> None:
    torch.manual_seed(7)
    cases = {
        "awq-32": awq(32),
        "awq-row": awq(COLUMNS),
        "gptq-1-sym": gptq(1, True, False),
        "gptq-1-asym": gptq(1, False, False),
        "gptq-2-asym-order": gptq(2, False, True),
        "gptq-1-sym-order": gptq(1, True, True),
        "compressed-32-sym": compressed(32, True),
        "compressed-32-asym": compressed(32, False),
        "compressed-row-sym": compressed(-1, True),
        "nf4": nf4(False),
        "nf4-double": nf4(True),
    }
    flat = {f"{case}/{name}": tensor.contiguous() for case, parts in cases.items() for name, tensor in parts.items()}
    save_file(flat, Path(__file__).with_name("quant_vectors.safetensors"))


if __name__ == "__main__":
    main()
