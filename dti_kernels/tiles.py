"""Frozen tile table."""
from __future__ import annotations
from dataclasses import dataclass
import torch

@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    warps: int
    stages: int
    pack: int = 16

def choose_tile(kernel: str, device: torch.device, head_dim: int, dtype: torch.dtype, mean_span: int) -> Tile:
    return Tile(16,16,4,2)
