"""`python -m illada.training RECIPE [name=value ...]`, for `accelerate launch -m`."""

import typer

from .cli import train

if __name__ == "__main__":
    typer.run(train)
