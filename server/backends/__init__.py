"""Where the graph runs: `base` says what the engine needs, the other modules are the ways to get it."""
