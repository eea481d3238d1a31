"""Frozen tile table."""

from __future__ import annotations
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    warps: int
    stages: int
    pack: int = 16
