"""Measurements on the bundled pipelines; run them as modules from the repository root, for example ``python -m benchmarks.peers``."""
