"""Quantizing from disk to disk: stores, journals and files. The arithmetic is the engine's and does not belong here."""
