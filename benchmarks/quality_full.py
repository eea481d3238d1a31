"""The paper's own runs as commands: ML-1M, CDs and Kindles with Llama-3.1-8B."""

from __future__ import annotations


def commands(plans: list[str]) -> list[str]:
    """Shell lines."""
    return plans
