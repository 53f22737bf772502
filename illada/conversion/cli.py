"""The commands `illada convert` and `illada export`."""

from pathlib import Path
from typing import Annotated

from huggingface_hub import ModelCard
from typer import Argument, Option, echo

from ..text.whole_models import is_adapter
from ..tiny import EMBEDDED_MODEL
from . import converting, exporting
from .adapters import convert_adapter
from .converting import MAX_SHARD_SIZE
from .reading import locate_checkpoint

Dtype = Annotated[str | None, Option(help="bfloat16, float16, float32 or float64; that of the source if absent.")]
MaxShardSize = Annotated[str, Option(help='Of a weight file, such as "5GB" or "500MB".')]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace OUT if it is not empty.")]
Revision = Annotated[str | None, Option(help="Branch, tag or commit of a repository on the Hub.")]
AllowPickle = Annotated[
    bool, Option("--allow-pickle", help="Read pickled weights, as tensors only, where there is no safetensors file.")
]


def convert(
    source: Annotated[
        str, Argument(help="A checkpoint or LoRA adapter of iLLaDA, LLaDA or this package: a folder or a Hub id.")
    ],
    out: Annotated[Path, Argument(help="The folder to make.")],
    to: Annotated[
        str, Option(help="standard, what this package saves; or the form of a release: illada or llada.")
    ] = "standard",
    dtype: Dtype = None,
    max_shard_size: MaxShardSize = MAX_SHARD_SIZE,
    overwrite: Overwrite = False,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Convert a checkpoint, or a LoRA adapter, between the formats of the family.

    Example: illada convert GSAI-ML/LLaDA-8B-Instruct llada-8b --dtype bfloat16

    Memory is about one weight file of OUT. OUT appears when everything is written and verified, and not before.
    """
    if is_adapter(folder := locate_checkpoint(source, revision, allow_pickle)):
        if dtype is not None or max_shard_size != MAX_SHARD_SIZE:
            raise ValueError("`source` is an adapter, of which `dtype` and `max_shard_size` stay as they are.")
        convert_adapter(folder, out, to=to, overwrite=overwrite, allow_pickle=allow_pickle)
        echo(f"{out}: the adapter under the names of {to}.")
        return
    conversion = converting.convert(
        source,
        out,
        to=to,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        revision=revision,
        allow_pickle=allow_pickle,
    )
    written = f"{conversion.num_tensors} tensors, {conversion.num_bytes:,} bytes, {conversion.num_shards} file(s)"
    head = "LM head tied" if conversion.tied else "LM head not tied"
    echo(f"{conversion.out}: {written}, {str(conversion.dtype).removeprefix('torch.')}, {head}.")
    if conversion.untied_by_tensors:
        echo("The source calls its LM head tied but stores another; both were kept, and the head is now untied.")
    layers = conversion.num_layers_compared
    logits = f"logits equal through {layers} layer(s)" if layers else "logits not compared, too large"
    echo(f"Verified: every tensor byte for byte; {logits}.")


def export(
    out: Annotated[Path, Argument(help="The folder to make.")],
    model: Annotated[
        str,
        Option(
            help="Checkpoint, training output or LoRA adapter: a folder or a Hub id.",
            show_default="the embedded model",
        ),
    ] = str(EMBEDDED_MODEL),
    adapter: Annotated[
        str | None, Option(help="LoRA adapter to merge into the weights: a folder or a Hub id.")
    ] = None,
    tokenizer: Annotated[str | None, Option(help="Folder or Hub id, if not beside the weights.")] = None,
    license: Annotated[
        str | None, Option(help="Identifier, such as apache-2.0; that of the source's model card if absent.")
    ] = None,
    base_model: Annotated[str | None, Option(help="Hub id of the model that this one derives from.")] = None,
    push: Annotated[str | None, Option(metavar="REPO", help="Also upload to this repository on the Hub.")] = None,
    private: Annotated[bool, Option("--private", help="Make the repository private, if it is new.")] = False,
    dtype: Dtype = None,
    max_shard_size: MaxShardSize = MAX_SHARD_SIZE,
    overwrite: Overwrite = False,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Write a complete Hub repository: weights, config, code, tokenizer, generation config and model card.

    Example: illada export my-model --model runs/sft --license apache-2.0 --push user/my-model

    The repository loads with trust_remote_code=True where this package is not installed.
    """
    if push is not None:
        exporting.check_upload(push)
    exporting.export_to_hub_folder(
        model,
        out,
        adapter=adapter,
        tokenizer=tokenizer,
        license=license,
        base_model=base_model,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        revision=revision,
        allow_pickle=allow_pickle,
    )
    echo(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if not (out / "tokenizer_config.json").exists():
        echo("There is no tokenizer beside the weights; `--tokenizer` names one.")
    if ModelCard.load(out / "README.md").data.license == "unknown":
        echo("The model card says `license: unknown`; `--license` names one.")
    if push is not None:
        echo(f"Uploaded: {exporting.push_to_hub(out, push, private=private)}")
