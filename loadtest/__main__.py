"""`python -m loadtest`."""

from vmoe.extras import needs_extra

with needs_extra("loadtest", "loadtest"):
    from loadtest.cli import app

app(prog_name="python -m loadtest")
