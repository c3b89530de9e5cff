"""The inference engine: configuration, weights, tokenizer, forward graph, sampling, generation."""

__version__ = "0.1.0"
