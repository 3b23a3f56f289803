"""Decoders: what to ask of the model next, and what to make of its answer. Nothing here runs a model."""
