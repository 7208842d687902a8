"""Turns a trained V-MoE into a bundle: one ONNX graph with C and K as inputs, a manifest and Triton's config.

`bundle` is torch-free and is the only module that a serving install imports.
"""
