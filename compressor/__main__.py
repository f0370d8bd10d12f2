"""``compress``, and ``python -m compressor`` for systems that have another program of that name."""

import os
import sys

from compressor.errors import EXIT_INTERRUPTED


def main() -> None:
    """Entry point: Ctrl-C while the command line is still being imported ends as it does later."""
    try:
        from compressor.cli.main import main as command

        command()
    except KeyboardInterrupt:
        text = "interrupted: run the same command again"
        line = f'{{"event": "error", "text": "{text}"}}' if "--log-json" in sys.argv else text
        print(line, file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
