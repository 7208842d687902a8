"""Turns a trained V-MoE into a bundle: one ONNX graph with C and K as inputs, a manifest and Triton's config.

`bundle`, `session`, `profiling` and `measure` are torch-free: the gateway reads bundles, and `--profile-only` measures
them where they are served.
"""
