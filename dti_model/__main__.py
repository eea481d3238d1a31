"""Where the `dti` command begins: Ctrl-C while its modules are imported is one line too."""

from __future__ import annotations

import sys


def main() -> int:
    """As `dti_model.cli.main`, of the process's arguments."""
    try:
        from dti_model.cli import main as command
    except KeyboardInterrupt:
        print("\ndti: interrupted: give the same command again to start again", file=sys.stderr)
        return 130
    return command()


if __name__ == "__main__":
    sys.exit(main())
