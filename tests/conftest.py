"""Kernels run on the GPU where there is one, else under the simulator: decided here, before anything imports them."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"

# Workers beside each other are as many as there are cores: more threads only get in each other's way.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
