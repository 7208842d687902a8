"""`python -m exporter`."""

from exporter.cli import app

app(prog_name="python -m exporter")
