"""`illada train`: the recipe on the command line."""

from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="YAML file of settings, or a recipe of the package: illada-tiny.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings that win over the file's, each as name=value.")
    ] = None,
):
    """Train a model by a recipe, with the standard Trainer.

    Example: `illada train illada-tiny output_dir=my-model max_steps=1000`

    With several processes: `accelerate launch -m illada.training config.yaml`
    """
    try:
        import accelerate  # noqa: F401
        import datasets  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"`illada train` needs more: pip install 'illada[train]' ({error}).") from error
    from .recipe import train_recipe

    trainer = train_recipe(recipe, settings or [])
    if trainer.is_world_process_zero():
        typer.echo(f"The model, its tokenizer and training_log.json are in {trainer.args.output_dir}.")
