"""Print what transformers makes of checkpoints of `afs quantize`: one SHA-256 over the weights that it multiplies with.

In an environment with transformers 5.17.0, compressed-tensors 0.20.1 and bitsandbytes 0.50.2, on folders that
`afs quantize data/models/olmo2-tiny FOLDER --method …` wrote:
`python tests/engine/model/quant/record_quantized_tiny.py FOLDER …`.
"""

# pyright: reportMissingImports=false

import hashlib
import sys
from typing import Any

import torch
import transformers


def weight_of(module: Any) -> torch.Tensor:
    if type(module).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(module.weight.data, module.weight.quant_state)
    return module.weight.data


def main() -> None:
    for folder in sys.argv[1:]:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        model(torch.arange(8)[None])  # the first forward pass decompresses
        digest = hashlib.sha256()
        for name, module in sorted(model.named_modules()):
            if isinstance(module, torch.nn.Linear):
                digest.update(name.encode() + weight_of(module).contiguous().view(torch.uint8).numpy().tobytes())
        print(folder, digest.hexdigest())


if __name__ == "__main__":
    main()
