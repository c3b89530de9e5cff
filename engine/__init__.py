"""The inference engine: configuration, weights, tokenizer, forward graph, sampling, generation."""
