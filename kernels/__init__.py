"""Triton kernels and their launchers, installed as `kdfast.kernels`.

They know tensors and Triton, and nothing else of kdfast.
"""

if __name__ != "kdfast.kernels":
    # Imported from the root of a checkout under the name of somebody else's package, for which
    # transformers probes: an error here would break `import transformers`, so this is an empty
    # package instead.
    __path__ = []
