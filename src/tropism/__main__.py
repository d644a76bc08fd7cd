"""The command line as `python -m tropism`."""

from tropism.cli import main

main()
