"""Settings that a process gives itself before PyTorch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import os, resource
from dti_model.process import set_up_process
set_up_process()
import numpy as np
def faults(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        np.ones(2**21, np.uint8)  # 2 MiB: above the usual threshold, and below that of huge pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(2)
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), faults(20))
"""


def run(**environment: str) -> list[str]:
    unset = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-c", CODE]
    result = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    return result.stdout.split()


def test_threads_sleep_and_memory_is_kept() -> None:
    wait_policy, spins, faults = run()
    assert (wait_policy, spins) == ("PASSIVE", "1000")
    assert int(faults) < 512, "20 arrays of 512 pages each came from the system again"


@pytest.mark.parametrize("policy", ["ACTIVE", "PASSIVE"])
def test_the_environment_has_the_last_word(policy: str) -> None:
    wait_policy, spins, faults = run(
        OMP_WAIT_POLICY=policy, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0"
    )
    assert (wait_policy, spins) == (policy, "None")
    assert int(faults) >= 20 * 512
