"""Measuring: benchmarks, and what their figures rest on."""
