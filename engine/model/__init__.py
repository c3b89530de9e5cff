"""The model: configuration, checkpoint, weights, KV cache, forward graph, and what a step costs."""
