"""V-MoE in PyTorch: model, routing, training and evaluation (Riquelme et al., 2021, arXiv 2106.05974).

`operating_point`, `preprocess`, `config`, `architecture`, `errors`, `class_names`, `console`, `data` and `extras` are
torch-free; a serving install imports nothing else.
"""
