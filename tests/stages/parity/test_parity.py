"""stages/parity/: a right engine passes, a wrong one fails and the stage says where and by how much."""

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline as tiny
import torch

from engine import llm
from engine.ops.reference import ReferenceOps
from engine.text.tokenizer import Tokenizer
from stages import micro, parity
from stages.exits import StageError
from stages.findings import Findings, bf16_step, divergence, errors, forward_order
from stages.host import read_host
from stages.metrics import Rows
from stages.params import Gpu, ParamsError
from stages.parity import layers, sampling, simulator, tensors, tokenizer
from stages.parity.checks import CHECKS
from stages.parity.errors import FP32_LIMIT, HALVES
from stages.parity.greedy import diverge
from stages.parity.shapes import SHAPES, make_checkpoint
from stages.reference import GreedyReference
from stages.stage import Run

PASSED = Path("reports/metrics/parity_w04.parquet")
FAILED = Path("reports/metrics/parity_w04.failed.parquet")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tiny.pipeline()
    monkeypatch.chdir(directory)
    # The random Llama and Mistral models have a test of their own.
    monkeypatch.setattr(layers, "SHAPES", {})
    return directory


@pytest.fixture
def findings() -> Findings:
    return Findings(Rows("parity", "w04", "tiny", read_host()))


def make_engine(dtype: Any) -> llm.EngineConfig:
    return llm.EngineConfig(dtype=dtype)


def run_parity(*checks: str, gpu: Gpu = tiny.GPU) -> None:
    parity.main.__wrapped__(Run("parity"), gpu, tiny.MODEL, tiny.make_week(checks), tiny.WORKLOAD)  # type: ignore[attr-defined]


def break_ops(monkeypatch: pytest.MonkeyPatch, ops: Callable[[], Any]) -> None:
    monkeypatch.setattr(llm, "make_ops", lambda _engine: ops())


def test_a_right_engine_passes_every_check(here: Path):
    run_parity("tokenizer", "tensors", "layers", "text", "invariance", "sampling")
    frame = tiny.read(PASSED)
    assert not FAILED.exists() and set(frame.status) == {"ok"}
    assert set(frame.suite) == {"tokenizer", "tensors", "layers", "text", "invariance", "sampling"}
    layers = frame[(frame.suite == "layers") & (frame.metric == "mean_abs_error")]
    names = ["embedding", *(f"layers.{index}" for index in range(4)), "norm", "logits"]
    for dtype in ("float32", "bfloat16"):
        ours = layers[(layers.dtype == dtype) & (layers.backend == "reference")]
        assert list(ours.case) == names and (ours.value <= ours.limit).all()
    assert list(layers[layers.backend == "transformers"].case) == names
    equal = frame[(frame.metric == "equal_completions") & (frame.dtype == "float32")]
    assert list(equal.value) == [len(tiny.WORKLOAD.prompts)]
    tensors = frame[frame.suite == "tensors"]
    assert len(tensors) == 3 + 4 * 11 and (tensors.value == 0).all()


class PerturbedLayer(ReferenceOps):
    """Adds a little to the MLP of one layer of four."""

    def __init__(self, layer: int, size: float):
        super().__init__("cpu")
        self.layer, self.size, self.calls = layer, size, itertools.count()

    def swiglu(self, gate_up, out=None):
        result = super().swiglu(gate_up, out)
        return result + self.size if next(self.calls) % 4 == self.layer else result


@pytest.mark.parametrize("layer", [0, 2])
def test_a_broken_layer_is_named_with_its_error_ratio(here: Path, monkeypatch: pytest.MonkeyPatch, layer: int):
    break_ops(monkeypatch, lambda: PerturbedLayer(layer, 0.5))
    with pytest.raises(StageError) as raised:
        run_parity("layers")
    found = re.match(
        r"layers: (\S+) \(float32 reference\): mean_abs_error (\S+), (\S+) times the 0.001 allowed", str(raised.value)
    )
    assert found and found[1] == f"layers.{layer}" and float(found[3]) == pytest.approx(float(found[2]) * 1e3, rel=0.01)
    assert not PASSED.exists()
    frame = tiny.read(FAILED)
    failed = frame[(frame.status == "failed") & (frame.metric == "mean_abs_error")]
    assert f"layers.{layer}" in set(failed.case) and f"layers.{layer - 1}" not in set(failed.case)
    assert set(failed.dtype) == {"float32", "bfloat16"}


def test_an_error_that_only_bf16_makes_is_caught_by_the_ratio(here: Path, monkeypatch: pytest.MonkeyPatch):
    class Coarse(ReferenceOps):
        """Rounds what leaves attention to half of bf16's precision; fp32 stays exact."""

        def attention(self, q, *arguments, **keywords):
            result = super().attention(q, *arguments, **keywords)
            if q.dtype == torch.float32:
                return result
            step = 2.0 ** (torch.floor(torch.log2(result.float().abs().clamp_min(1e-30))) - 4)
            return (torch.round(result.float() / step) * step).to(q.dtype)

    break_ops(monkeypatch, lambda: Coarse("cpu"))
    with pytest.raises(StageError, match=r"layers\.0 \(bfloat16 reference\): .* times the .*1\.25 x transformers'"):
        run_parity("layers")
    frame = tiny.read(FAILED)
    assert (frame[frame.dtype == "float32"].status == "ok").all()
    ratio = frame[(frame.metric == "error_ratio") & (frame.case == "layers.0")].value.item()
    assert ratio > 1.25


def test_a_norm_that_rounds_elsewhere_is_caught(here: Path, monkeypatch: pytest.MonkeyPatch):
    class Twice(ReferenceOps):
        def rms_norm(self, x, weight, eps, rounding, out=None):
            return super().rms_norm(x, weight, eps, "twice", out)

    break_ops(monkeypatch, lambda: Twice("cpu"))
    with pytest.raises(StageError, match=r"norm of transformers' input \(bfloat16 reference\): differing_share"):
        run_parity("layers")


def test_not_a_number_fails_with_a_null_value(here: Path, monkeypatch: pytest.MonkeyPatch):
    break_ops(monkeypatch, lambda: PerturbedLayer(1, float("nan")))
    with pytest.raises(StageError, match=r"layers\.1 \(float32 reference\): mean_abs_error nan"):
        run_parity("layers")
    frame = tiny.read(FAILED)
    row = frame[(frame.case == "layers.1") & (frame.dtype == "float32") & (frame.metric == "mean_abs_error")]
    assert row.status.item() == "failed" and row.value.isna().all()


def test_a_result_that_depends_on_the_batch_fails(here: Path, monkeypatch: pytest.MonkeyPatch):
    class Neighbourly(ReferenceOps):
        def linear(self, x, matrix, out=None):
            return super().linear(x * (1 + x.shape[0] * 2**-9), matrix, out)

    break_ops(monkeypatch, lambda: Neighbourly("cpu"))
    with pytest.raises(StageError, match=r"invariance: a batch of 4 .*one reduction order"):
        run_parity("invariance")
    failed = set(tiny.read(FAILED).query("status == 'failed'").case)
    assert {"decoded token by token", "prefill in chunks of 7"} <= failed and "20 repeats" not in failed


def test_a_wrong_distribution_fails(findings: Findings):
    class Cold(ReferenceOps):
        def sample(self, logits, temperature, *arguments, **keywords):
            return super().sample(logits, temperature * 0.7, *arguments, **keywords)

    sampling.compare_distributions(findings, Cold("cpu"), "cpu", "reference")
    assert any("temperature 1, 1000 positions" in failure and "chi_square" in failure for failure in findings.failures)


def test_a_filter_that_lets_too_much_through_fails(findings: Findings):
    class Open(ReferenceOps):
        def sample(self, logits, temperature, top_k, **keywords):
            return super().sample(logits, temperature, top_k=top_k + 2 * (top_k > 0).int(), **keywords)

    sampling.compare_distributions(findings, Open("cpu"), "cpu", "reference")
    assert any("top-k 8" in failure and "forbidden_tokens" in failure for failure in findings.failures)


def test_a_tokenizer_that_differs_fails(here: Path, findings: Findings, monkeypatch: pytest.MonkeyPatch):
    right = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids, *rest: right(self, ids, *rest).replace("\u00a0", " "))
    tokenizer.compare_tokenizers(findings, here / "data/hf/hf_snapshot/tiny", [])
    assert any(failure.startswith("tokenizer: whitespace: differing_characters") for failure in findings.failures)
    assert not any("english" in failure for failure in findings.failures)


def test_a_tensor_in_the_wrong_place_fails(here: Path, monkeypatch: pytest.MonkeyPatch):
    right = tensors.engine_tensors

    def swapped(config, weights):
        named = right(config, weights)
        k, v = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "kv")
        return named | {k: named[v], v: named[k]}

    monkeypatch.setattr(tensors, "engine_tensors", swapped)
    with pytest.raises(StageError, match=r"tensors: model\.layers\.1\.self_attn\.k_proj\.weight .*mean_abs_difference"):
        run_parity("tensors")
    assert len(tiny.read(FAILED).query("status == 'failed'")) == 2


@pytest.mark.parametrize("name", ["llama_shape", "mistral_shape"])
def test_other_architectures_against_transformers(findings: Findings, name: str):
    layers.compare_shape(findings, name, SHAPES[name], make_engine)
    assert not findings.failures
    cases = {(row["case"], row["dtype"]) for row in findings.rows.rows if row["model"] == name}
    assert {(f"layers.{index}", dtype) for index in range(3) for dtype in ("float32", *HALVES)} <= cases


@pytest.mark.parametrize("field", ["sliding_window", "rope_parameters"])
def test_a_field_the_engine_ignored_would_fail(findings: Findings, monkeypatch: pytest.MonkeyPatch, field: str):
    """The shapes' prompts reach beyond the window, and the scaled frequencies matter: neither is left out unseen."""
    name = {"sliding_window": "mistral_shape", "rope_parameters": "llama_shape"}[field]
    wrong = {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}[field]
    from engine.model.config import ModelConfig

    right = ModelConfig.from_dict.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(ModelConfig, "from_dict", classmethod(lambda cls, given: right(cls, given | {field: wrong})))
    layers.compare_shape(findings, name, SHAPES[name], make_engine)
    assert any("layers.0" in failure and "float32" in failure for failure in findings.failures)


def test_a_divergence_is_judged_by_its_margin():
    assert [bf16_step(value) for value in (1.0, 8.0, 15.9, -16.0, 0.75)] == [2**-7, 2**-4, 2**-4, 2**-3, 2**-8]
    reference = GreedyReference(
        [5, 9],
        "",
        candidates=[[5, 6, 7], [9, 8, 7]],
        logits=[[10.0, 9.9375, 9.0], [12.0, 11.0, 10.0]],
        float32=[[10.01, 9.94, 9.0], [12.0, 11.0, 10.0]],
    )
    near = diverge(reference, 0, 0, 6, "bfloat16")
    assert near.margin == pytest.approx(0.07) and near.rounding == near.allowed == 0.0625
    assert near.margin > near.allowed and "prompt 0, token 0: 6, not 5" in near.note
    noisy = GreedyReference(reference.token_ids, "", reference.candidates, [[10.06, 9.9, 9.0], [12.0, 11.0, 10.0]],
                            reference.float32)  # fmt: skip
    assert diverge(noisy, 0, 0, 6, "bfloat16").allowed == pytest.approx(0.1)
    assert diverge(reference, 0, 1, 3, "bfloat16").margin == pytest.approx(2.0)
    assert diverge(reference, 0, 0, 6, "float32").allowed == FP32_LIMIT


def test_errors_and_divergence_are_what_they_say():
    ours = [{"embedding": torch.tensor([[1.0, 3.0]])}, {"embedding": torch.tensor([[0.0, 0.0]])}]
    exact = [{"embedding": torch.tensor([[1.0, 1.0]])}, {"embedding": torch.tensor([[0.0, -1.0]])}]
    found = errors(ours, exact)["embedding"]
    assert found.mean == pytest.approx(0.75) and found.largest == 2.0
    with pytest.raises(ValueError, match="shape"):
        errors(ours, [{"embedding": torch.zeros(2)}] * 2)
    with pytest.raises(ValueError, match="one side only: norm"):
        errors(ours, [one | {"norm": torch.zeros(1)} for one in exact])
    assert forward_order(["logits", "layers.10", "norm", "layers.2", "embedding"]) == [
        "embedding", "layers.2", "layers.10", "norm", "logits",
    ]  # fmt: skip
    p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    expected = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum().item()
    assert divergence([p], [q]) == pytest.approx(expected) and divergence([p], [p]) == 0


def test_chi_square_quantiles():
    for cells in (3, 11, 21):
        statistic, quantile = sampling.chi_square([10.0] * cells, [10.0] * cells)
        tail = torch.special.gammaincc(torch.tensor((cells - 1) / 2).double(), torch.tensor(quantile / 2).double())
        assert statistic == 0 and sampling.RARE / 5 < tail < 2 * sampling.RARE
    assert sampling.chi_square([20.0, 0.0, 3.0, 3.0], [10.0, 10.0, 3.0, 3.0])[0] == pytest.approx(20.0)


def test_the_micro_models_wrong_results_are_named(findings: Findings, tmp_path: Path):
    make_checkpoint(micro.ARCHITECTURE, tmp_path)
    reference = {"float32": micro.reference(tmp_path, "float32")}
    right = reference["float32"] | micro.choose(ReferenceOps("cpu"), reference["float32"]["logits"])
    simulator.compare_micro(findings, "float32", right, reference, "cuda simulator")
    assert not findings.failures
    wrong = right | {"v.1": right["v.1"] + 0.1, "argmax": right["argmax"] + 1, "layers.1": right["layers.1"] * 1.1}
    again = Findings(Rows("parity", "w04", "tiny", read_host()))
    simulator.compare_micro(again, "float32", wrong, reference, "cuda simulator")
    assert [re.split(r"[:(]", failure)[1].strip() for failure in again.failures] == ["layers.1", "cache v.1", "argmax"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_cuda_backend_passes_every_check_on_a_gpu(here: Path):
    run_parity("tensors", "layers", "invariance", "sampling", "text", "simulator", gpu=replace(tiny.GPU, name="auto"))
    frame = tiny.read(PASSED)
    assert set(frame.status) == {"ok"} and "reference" not in set(frame.backend) and "cuda" in set(frame.backend)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the simulator is for hosts without a GPU")
def test_the_cuda_kernels_run_the_micro_model_under_the_simulator(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(parity.__file__).parents[2]))
    monkeypatch.setattr(simulator, "DTYPES", ("float32",))  # the stage itself runs both
    run_parity("simulator")
    frame = tiny.read(PASSED)
    assert set(frame.status) == {"ok"} and "cuda simulator" in set(frame.backend)
    assert {"argmax", "sampled", "repetition penalty", "cache k.1", "layers.1"} <= set(frame.case)


def test_a_simulator_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(parity.__file__).parents[2]))
    out = tmp_path / "out"
    process = micro.start_simulation(tmp_path / "absent", "float32", "prefill", {}, out)
    with pytest.raises(RuntimeError, match=r"status 1: engine\.model\.errors\.ConfigError: .*config\.json"):
        micro.finish_simulation(process, out)


def test_a_killed_parity_leaves_no_file(here: Path, monkeypatch: pytest.MonkeyPatch):
    PASSED.unlink(missing_ok=True)

    def killed(_context):
        raise KeyboardInterrupt

    monkeypatch.setitem(CHECKS, "invariance", replace(CHECKS["invariance"], run=killed))
    with pytest.raises(KeyboardInterrupt):
        run_parity("tensors", "invariance")
    assert not PASSED.exists()


def test_an_unknown_check_and_a_week_without_an_engine_are_refused(here: Path):
    with pytest.raises(ParamsError, match=r"no check 'layer'; there are: tokenizer, tensors, layers"):
        run_parity("layer")
    week = tiny.make_week(("invariance",), engine=None)
    with pytest.raises(ParamsError, match=r"weeks\.w04\.engine is null"):
        parity.main.__wrapped__(Run("parity"), tiny.GPU, tiny.MODEL, week, tiny.WORKLOAD)  # type: ignore[attr-defined]
