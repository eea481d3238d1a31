from __future__ import annotations

from dti_model.cli.main import BUG_STATUS, ERROR_STATUS, _parser, run

__all__ = ["BUG_STATUS", "ERROR_STATUS", "_parser", "run"]
