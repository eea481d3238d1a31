"""Honest speed: named workloads, interleaved measurements behind a parity gate, recorded rows in results/, a log of what was tried.

Importing it sets the process up as `dti` does, for every provider alike: it must happen before PyTorch is loaded.
"""

from dti_model.process import set_up_process

set_up_process()
