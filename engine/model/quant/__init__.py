"""Weights of 4 bits: what a code stands for, the forms checkpoints keep them in, and how they are made of a model."""
