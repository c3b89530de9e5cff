"""Every check that a week can list, in the order they run: those of one dtype together, and last the simulator, whose
processes run beside the others."""

from stages.parity.check import Check
from stages.parity.invariance import INVARIANCE
from stages.parity.layers import LAYERS
from stages.parity.sampling import SAMPLING
from stages.parity.simulator import SIMULATOR
from stages.parity.tensors import TENSORS
from stages.parity.text import TEXT
from stages.parity.tokenizer import TOKENIZER

CHECKS: dict[str, Check] = {
    check.name: check for check in (TOKENIZER, TENSORS, LAYERS, INVARIANCE, SAMPLING, TEXT, SIMULATOR)
}
