"""The stopwatch over training steps: validation in between does not count, what the device does after the host's last step does."""

from __future__ import annotations

import pytest

from dti_model.training.flops import Speed


def test_speed_counts_steps_and_the_wait_for_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("dti_model.training.flops.time.perf_counter", lambda: now[0])
    speed = Speed(peak=1e6)

    def step(seconds: float) -> None:
        speed.begin()
        speed.add(targets=10, tokens=1000, flops=2e6)
        now[0] += seconds
        speed.on_step_end()

    assert speed.report() == {}
    step(1.0)
    now[0] += 50.0  # validation
    step(1.0)
    now[0] += 2.0  # the host waits for the loss, which is a line of the log
    assert speed.report() == {"targets_per_s": 5.0, "tokens_per_s": 500.0, "mfu": 1.0}
    assert speed.report() == {}
    now[0] += 50.0
    step(4.0)
    assert speed.report()["targets_per_s"] == 2.5
