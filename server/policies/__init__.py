"""Capacity policies by the name that policy.toml gives them."""
