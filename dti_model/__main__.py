"""Where the `dti` command begins: Ctrl-C while its modules are imported is one line too."""

from __future__ import annotations

import sys
from typing import NoReturn


def run() -> NoReturn:
    """The program `dti`."""
    try:
        from dti_model.cli import run as command
    except KeyboardInterrupt:
        print("\ndti: interrupted: give the same command again to start again", file=sys.stderr)
        sys.exit(130)
    command()


if __name__ == "__main__":
    run()
