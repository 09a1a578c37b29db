"""Triton only: one file per op family, a jit function and its launcher. Nothing here knows torch.library."""
