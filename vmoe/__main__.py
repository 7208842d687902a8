"""`python -m vmoe`."""

from vmoe.cli import app

app(prog_name="python -m vmoe")
