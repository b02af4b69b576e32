"""Triton kernels with their launchers, one op a file, named as in ``csrc/cpu``.

Nothing outside imports this package before the first call that Triton serves.
"""
