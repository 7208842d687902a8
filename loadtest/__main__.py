"""`python -m loadtest`."""

import sys

try:
    from loadtest.cli import app
except ModuleNotFoundError as error:
    sys.exit(f"error: loadtest needs {error.name}: pip install 'vmoe-serving[loadtest]'")

app(prog_name="python -m loadtest")
