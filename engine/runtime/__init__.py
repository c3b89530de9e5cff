"""The engine at work: requests, steps, CUDA graphs, sampling, and what is ready before the first request."""
