"""The command line, `dti`."""

from dti_model.cli.command import main, run
