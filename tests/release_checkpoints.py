"""Small checkpoints in the releases' forms, made from the golden ones."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FIXTURES = Path(__file__).parent / "fixtures"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} w9 {% endfor %}"
HEADS = {"illada": "lm_head.weight", "llada": "model.transformer.ff_out.weight"}
EMBEDDINGS = {"illada": "model.embed_tokens.weight", "llada": "model.transformer.wte.weight"}
TIES = {"illada": "tie_word_embeddings", "llada": "weight_tying"}


def release(family: str) -> Path:
    return FIXTURES / family / "checkpoint"


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def write_release(
    folder: Path,
    family: str,
    dtype: torch.dtype = torch.float32,
    tied: bool | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
    num_files: int = 1,
) -> Path:
    """The golden checkpoint of `family` in another dtype, tied or not, with other tensors, or in several files.

    Tied, iLLaDA stores the head and LLaDA does not, as their releases do.
    """
    folder.mkdir(parents=True)
    config = json.loads((release(family) / "config.json").read_text())
    state = {name: tensor.to(dtype) for name, tensor in (tensors or read_tensors(release(family))).items()}
    if tied is not None:
        config[TIES[family]] = tied
        state.pop(HEADS[family])
        embedding = state[EMBEDDINGS[family]]
        if not tied:
            state[HEADS[family]] = embedding.flip(0).contiguous()
        elif family == "illada":
            state[HEADS[family]] = embedding.clone()
    (folder / "config.json").write_text(json.dumps(config))
    if num_files == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        write_shards(
            folder, {f"part-{index}.safetensors": list(state)[index::num_files] for index in range(num_files)}, state
        )
    return folder


def write_shards(folder: Path, files: dict[str, list[str]], state: dict[str, torch.Tensor]) -> None:
    for file, names in files.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of words `w6`, `w7` ... whose [MASK] is a token that nothing declares, as in the iLLaDA release."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "w4", "<[MASK]>", *(f"w{index}" for index in range(6, vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **special)
    fast.save_pretrained(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, to show that nothing changed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def copy_release(folder: Path, family: str, vocab_size: int | None = None) -> Path:
    """The golden checkpoint itself, with a tokenizer if `vocab_size` is given."""
    shutil.copytree(release(family), folder)
    if vocab_size is not None:
        write_tokenizer(folder, vocab_size)
    return folder
