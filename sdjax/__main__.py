"""`python -m sdjax` is the `sdjax` command."""

from sdjax.commands.main import main

main()
