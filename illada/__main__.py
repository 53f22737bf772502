"""`python -m illada` is the `illada` command."""

from .commands.main import main

main()
