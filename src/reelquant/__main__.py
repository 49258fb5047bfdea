"""``python -m reelquant`` is the ``reelquant`` command."""

from reelquant.cli import app

if __name__ == "__main__":
    app(prog_name="reelquant")
