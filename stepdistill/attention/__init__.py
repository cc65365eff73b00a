"""Attention: fused, with gradients and tangents; kernels by name; and a token that counts many times."""
