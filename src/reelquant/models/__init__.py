"""Pipelines to work on: opening them, sampling from them, prompts, adapters, and the bundled tiny ones. Quantization does not
belong here."""
