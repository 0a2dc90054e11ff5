"""Triton kernels and their launchers, installed as `kdfast.kernels`.

They know tensors and Triton, and nothing else of kdfast.
"""

if __name__ != "kdfast.kernels":
    raise ImportError("these are kdfast's kernels: install kdfast and import kdfast.kernels")
