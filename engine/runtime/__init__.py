"""Requests, the steps that run them, CUDA graphs, sampling, and what is made ready before the first request."""
