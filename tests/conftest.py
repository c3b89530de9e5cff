"""Kernels run on the GPU where there is one, else under the simulator: decided here, before anything imports them."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
