"""Attacks: seeded damage, hostile files, kills. A short sample runs in ``make test``, hundreds of each in ``make test-all``."""
