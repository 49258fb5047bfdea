"""``python -m reelquant`` and the ``reelquant`` command."""

import sys

INTERRUPTED = 130
SAID = "reelquant: interrupted, nothing is left behind: run the same command again\n"


def main() -> None:
    """Run the command line; Ctrl-C while it is imported, or before a verb listens, is answered as later."""
    try:
        from reelquant.cli import app

        app(prog_name="reelquant")
    except KeyboardInterrupt:
        sys.stderr.write(SAID)
        sys.exit(INTERRUPTED)
    except SystemExit as ended:
        if isinstance(getattr(ended.__context__, "__cause__", None), KeyboardInterrupt):  # typer ends silently then
            sys.stderr.write(SAID)
        raise


if __name__ == "__main__":
    main()
