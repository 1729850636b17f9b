"""`python -m freehold`: the command, by way of the interpreter that it is to run in."""

from freehold.cli.main import main

main()
