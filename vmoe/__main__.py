"""`python -m vmoe`."""

from vmoe.extras import needs_extra

with needs_extra("export", "vmoe"):
    from vmoe.cli import app

app(prog_name="python -m vmoe")
