"""Attention: fused, with gradients and tangents; kernels by name; and a token that counts many times."""

from stepdistill.attention.fused import fused_attention

__all__ = ["fused_attention"]
