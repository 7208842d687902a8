"""V-MoE in PyTorch: model, routing, training and evaluation (Riquelme et al., 2021, arXiv 2106.05974).

`operating_point` and `preprocess` are torch-free and are the only modules that a serving install imports.
"""
