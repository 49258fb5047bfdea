"""``python -m reelquant`` and the ``reelquant`` command."""

import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command line; Ctrl-C while it is imported is as quiet as later."""
    try:
        from reelquant.cli import app
    except KeyboardInterrupt:
        sys.stderr.write("reelquant: interrupted, nothing is left behind\n")
        sys.exit(INTERRUPTED)
    app(prog_name="reelquant")


if __name__ == "__main__":
    main()
