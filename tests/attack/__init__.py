"""Attacks: seeded damage, hostile files, kills. A short sample runs in ``make test``, a longer one in ``make test-all``, and
``python -m tests.attack.long`` (``make attack``) runs a thousand recipes, hundreds of folders and disks, and fifty kills."""
