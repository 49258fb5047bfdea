"""placeholder until merge"""

BRANCHES: dict = {}
