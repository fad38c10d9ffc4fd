"""Benchmarks; every report includes its method."""
