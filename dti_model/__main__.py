"""Start of the `dti` command: Ctrl-C while its modules are imported is one line too, and so is a missing parser."""

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
    except ModuleNotFoundError as error:
        if error.name != "jsonargparse":
            raise
        print(
            "dti: error: the command line needs jsonargparse, which is not installed: pip install 'jsonargparse[signatures]'",
            file=sys.stderr,
        )
        sys.exit(2)
    command()


if __name__ == "__main__":
    run()
