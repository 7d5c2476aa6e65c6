"""The longer parts of benchmarks/engine.py."""
