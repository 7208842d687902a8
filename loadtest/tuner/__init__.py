"""`python -m loadtest tune`: searches the parameters of the capacity policy in the simulator.

trace -> Split -> search (optuna) -> finalists: other noise, then the part held out -> [live] -> policy.toml
"""
