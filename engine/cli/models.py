"""The model a command works on, by checkpoint or of random weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.llm import LLM
    from engine.model.config import ModelConfig


def load(
    model: str, backend: str, dtype: str, kv_cache: str | None, max_model_len: int | None, max_batch: int = 1
) -> "LLM":
    from engine.llm import LLM, EngineConfig

    engine = EngineConfig.for_machine(
        backend, dtype=dtype, kv_cache=kv_cache or "auto", max_batch=max_batch, max_model_len=max_model_len
    )
    return LLM(model, engine)


def load_shaped(model: str, weights: str, backend: str, dtype: str, cuda_graph: bool, **settings: Any) -> "LLM":
    """The model, or one of its shapes: random weights need no more than a configuration. settings: of EngineConfig."""
    from engine.config import EngineConfig

    engine = EngineConfig.for_machine(backend, dtype=dtype, cuda_graph=cuda_graph, **settings)
    return make(model, weights, engine)


def make(model: str, weights: str, engine: "EngineConfig") -> "LLM":
    from engine.config import make_ops
    from engine.llm import LLM
    from engine.model.weights import random_weights

    if weights not in ("checkpoint", "random"):
        raise ValueError(f"weights = {weights!r}; it must be checkpoint or random")
    if weights == "checkpoint":
        if Path(model).suffix == ".yaml":
            raise ValueError(f"{model} says a model's shapes alone; use it with --weights random")
        return LLM(model, engine)
    config = read_config(model)
    engine = engine.for_dtype(dtype_of(config))
    made = random_weights(config, engine.device, engine.torch_dtype, 0, make_ops(engine))
    return LLM((config, made), engine)


def read_config(model: str) -> "ModelConfig":
    """A model's configuration: of a file of conf/model/, a config.json, a folder with one, or the hub's."""
    from engine.model.config import ModelConfig
    from engine.model.hub import find_model

    path = Path(model)
    if path.suffix == ".yaml":
        import yaml

        return ModelConfig.from_dict(yaml.safe_load(path.read_text(encoding="utf-8"))["architecture"])
    return ModelConfig.from_file(path if path.is_file() else find_model(model, "config"))


def dtype_of(config: "ModelConfig") -> str:
    """Name the dtype that a model without files runs in where none is asked for."""
    return "float16" if config.dtype == "float16" else "bfloat16"


def describe_measured(llm: "LLM", model: str, weights: str) -> dict[str, Any]:
    """Fields that every record of a measurement begins with, named as llama-bench names them."""
    import torch

    from engine.model.tensors import parameter_count

    engine = llm.engine
    return {
        "model_filename": model,
        "model_type": f"{llm.config.architecture.name.removesuffix('ForCausalLM')} {engine.dtype}",
        "model_size": llm.weights.nbytes,
        "model_n_params": parameter_count(llm.config),
        "weights": weights,
        "backends": engine.backend,
        "gpu_info": torch.cuda.get_device_name() if engine.device == "cuda" else "CPU",
    }
