"""The operations of the forward graph: torch's as reference, and the CUDA kernels'."""
