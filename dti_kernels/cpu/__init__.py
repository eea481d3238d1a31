"""The operators on CPUs: C++ compiled on first use, PyTorch where there is no compiler, numbers that are not finite kept apart."""

from dti_kernels.cpu.choice import backward, forward, rounds_factors
