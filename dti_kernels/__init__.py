"""Attention over streaming prompts: per-row windows exact in interactions, [SUM] rows, ALiBi, hidden-state reset."""

from dti_kernels.alibi import default_alibi_slopes
from dti_kernels.candidates import candidate_layout
from dti_kernels.layout import StreamLayout
from dti_kernels.padding import padded_layout
from dti_kernels.reference import windowed_attn_reference
from dti_kernels.reset import HiddenStateReset
from dti_kernels.windowed_attn import windowed_attn

__all__ = [
    "HiddenStateReset",
    "StreamLayout",
    "candidate_layout",
    "default_alibi_slopes",
    "padded_layout",
    "windowed_attn",
    "windowed_attn_reference",
]
