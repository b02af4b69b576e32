"""Side-by-side measurements of eager PyTorch, ``torch.compile`` and preact on whole networks.

Run as ``python -m benchmarks``; ``benchmarks/README.md`` says what each figure means.
"""
