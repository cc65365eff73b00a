"""Attention: kernels by name, what forward-mode differentiation needs of them, and a token that counts many times."""
