"""What can be known of a Triton kernel without a GPU: its launches, its machine code, its results.

``launches`` records what the launchers pass, ``binaries`` compiles that ahead of time and reads the
machine code, ``interpreter`` repairs the arithmetic of Triton's interpreter.
"""
