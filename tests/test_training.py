"""The recipe: data in their formats, the loss of whole steps, resuming, several processes, LoRA, and bad data."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from illada import ILLaDAForCausalLM
from illada.commands.main import main
from illada.training.data import MaskedDiffusionCollator, encode, encode_records, one_per_row, pack
from illada.training.recipe import build_trainer, train_recipe
from illada.training.records import read_records
from illada.training.settings import read_settings, recipe_names

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ bos_token + m['role'] + '.' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant.' }}{% endif %}"
)
CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
WORDS = "one two three four five six seven eight nine ten eleven twelve".split()


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Data sets are cached in a folder of the tests' own."""
    import datasets

    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("datasets")
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    patch.setenv("HF_DATASETS_CACHE", str(folder))
    datasets.disable_progress_bars()
    yield
    patch.undo()


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def settings(tmp_path, tokenizer) -> dict:
    """A recipe of a few seconds on a chat file; 12 examples make 10 windows."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    records = [chat(word, f"{word} is a number") for word in WORDS]
    return {
        "config": CONFIG,
        "tokenizer": str(tmp_path / "tokenizer"),
        "train_data": str(write_jsonl(tmp_path / "train.jsonl", records)),
        "length": 48,
        "output_dir": str(tmp_path / "out"),
        "overwrite": True,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def trainer_of(settings: dict, folder: Path, **changes):
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**settings, **changes}))
    return build_trainer(*read_settings(str(recipe)))


def run(settings: dict, folder: Path, **changes):
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**settings, **changes}))
    return train_recipe(str(recipe))


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module | dict, **tolerance):
    b = b if isinstance(b, dict) else b.state_dict()
    for name, tensor in a.named_parameters():
        torch.testing.assert_close(
            tensor.detach(), b[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


# Formats


def test_packing_loses_nothing_and_positions_begin_anew():
    encoded = [([10 * i + j for j in range(n)], 1) for i, n in enumerate([3, 7, 2, 5])]
    everything = [token for ids, _ in encoded for token in ids]
    for isolated in (True, False):
        rows = list(pack(encoded, 6, isolated))
        assert [token for row in rows for token in row["input_ids"]] == everything
        assert [len(row["input_ids"]) for row in rows] == [6, 6, 5]
        assert [row["is_prompt"].count(True) for row in rows] == [2, 1, 1]
    assert [row["position_ids"] for row in pack(encoded, 6, True)] == [
        [0, 1, 2, 0, 1, 2],  # the second example goes on in the next window, as a segment of its own
        [0, 1, 2, 3, 0, 1],
        [0, 1, 2, 3, 4],
    ]
    assert [row["position_ids"] for row in pack(encoded, 6, False)] == [list(range(n)) for n in (6, 6, 5)]


def test_an_example_is_prompt_response_and_one_eos(tokenizer, tmp_path):
    records = list(read_records(str(write_jsonl(tmp_path / "a.jsonl", [chat("hi", "ab."), {"text": "cd"}]))))
    (ids, prompt_length), (document, document_prompt) = encode(tokenizer, records)
    assert tokenizer.decode(ids[:prompt_length]) == "<s>user.hi</s><s>assistant."
    assert tokenizer.decode(ids[prompt_length:]) == "ab.</s>"
    assert tokenizer.decode(document) == "<s>cd</s>" and document_prompt == 1


def test_llada_rows_are_padded_with_eos_which_is_learnt():
    rows = list(one_per_row([([7, 8, 9, 2], 2), ([7, 2], 1)]))
    batch = MaskedDiffusionCollator(pad_token_id=2, learn_padding=True)(rows)
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[7, 8, 9, 2], [7, 2, 2, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 2
    assert batch["is_prompt"].tolist() == [[True, True, False, False], [True, False, False, False]]


def test_a_folder_that_load_dataset_knows_is_read(tmp_path, tokenizer):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "part.jsonl", [chat("a", "b"), chat("c", "d")])
    assert [record.text for record in read_records(str(tmp_path / "data"))] == ["b", "d"]


def test_a_changed_file_is_read_anew(settings, tmp_path):
    before = trainer_of(settings, tmp_path).train_dataset
    write_jsonl(Path(settings["train_data"]), [chat("new", "text")])
    os.utime(settings["train_data"], ns=(1, 1))
    assert len(trainer_of(settings, tmp_path).train_dataset) == 1 < len(before)


# The loss of a step


def plain_loss(model, micro_batches: list[dict], per_response: bool) -> float:
    """Loops over rows, segments and positions, in fp64, from the corrupted tokens and the weights."""
    total, items = 0.0, 0
    for batch in micro_batches:
        for row in range(len(batch["labels"])):
            positions = batch["position_ids"][row].tolist()
            starts = [i for i, p in enumerate(positions) if i == 0 or p != positions[i - 1] + 1] + [len(positions)]
            learnt = 0
            row_sum = 0.0
            for start, end in zip(starts, starts[1:]):
                with torch.no_grad():
                    logits = model(batch["input_ids"][row : row + 1, start:end]).logits[0]
                for i in range(start, end):
                    label = batch["labels"][row, i].item()
                    if label == -100:
                        continue
                    learnt += 1
                    if batch["input_ids"][row, i] == 5:
                        scores = logits[i - start].tolist()
                        log_p = scores[label] - math.log(sum(math.exp(score) for score in scores))
                        row_sum -= log_p / batch["p"][row].item()
            total += row_sum / learnt if per_response else row_sum
            items += 1 if per_response else learnt
    return total / items


@pytest.mark.parametrize("format", ["pretraining", "sft", "llada_sft"])
def test_the_loss_of_an_accumulated_step_is_the_plain_one(settings, tmp_path, format):
    trainer = trainer_of(
        settings, tmp_path, format=format, per_device_train_batch_size=3, gradient_accumulation_steps=3
    )
    trainer.model.double()
    loader = iter(trainer.get_train_dataloader())
    batches, items = trainer.get_batch_samples(loader, 3, torch.device("cpu"))
    with torch.no_grad():
        loss = sum(
            trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items).item() for batch in batches
        )
    for batch in batches:  # p of each row, from outside the code that is tested: the largest weight's inverse
        learnt = (batch["labels"] != -100).sum(1) if format == "llada_sft" else 1
        batch["p"] = 1 / (batch["loss_weights"].amax(1) * learnt)
    assert loss == pytest.approx(plain_loss(trainer.model, batches, format == "llada_sft"), rel=1e-5)


def test_accumulation_gives_the_gradient_of_one_big_batch(settings, tmp_path):
    for format in ("pretraining", "sft", "llada_sft"):
        whole = run(settings, tmp_path, format=format)
        for size, steps in ((2, 2), (1, 4)):
            parts = run(
                settings, tmp_path, format=format, per_device_train_batch_size=size, gradient_accumulation_steps=steps
            )
            if format != "llada_sft":  # whose rows are padded to the longest of their micro-batch, and learn that
                assert_same_weights(parts.model, whole.model, rtol=1e-5, atol=1e-6)
                assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


def test_logits_are_made_for_masked_positions_alone(settings, tmp_path):
    trainer = trainer_of(settings, tmp_path, max_steps=1)
    masked, made = [], []
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **k: (
        masked.append(int((inputs["input_ids"] == 5).sum())), compute_loss(model, inputs, **k))[1]  # fmt: skip
    trainer.model.lm_head.register_forward_hook(lambda module, inputs, output: made.append(output.shape[0]))
    trainer.train()
    assert made == masked and 0 < made[0] < 4 * 48


# Runs


def test_a_run_with_everything_on_writes_a_model_that_loads(settings, tmp_path, monkeypatch):
    """bf16, checkpointing, accumulation, a schedule by its name, evaluation with samples, TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = run(
        settings,
        tmp_path,
        eval_data=settings["train_data"],
        max_steps=8,
        eval_strategy="steps",
        eval_steps=4,
        optim="adamw_torch",
        learning_rate=0.01,
        bf16=True,
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": 2},
        warmup_steps=2,
        report_to="tensorboard",
        sample_prompts=["one", "one two one two"],
        generation={"max_new_tokens": 8, "block_length": 4},
    )
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[2:7] == [0.01] * 5 and rates[0] < rates[1] < 0.01 and rates[7] < 0.01
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2 and evaluations[1] < evaluations[0]
    out = Path(settings["output_dir"])
    assert json.loads((out / "training_log.json").read_text()) == trainer.state.log_history
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.generation_config.max_new_tokens == 8
    assert_same_weights(model, trainer.model)
    for index, prompt in enumerate(["one", "one two one two"]):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        with torch.autocast("cpu", torch.bfloat16):
            text = tokenizer.decode(model.generate(torch.tensor([ids]))[0, len(ids) :], skip_special_tokens=True)
        name = f"eval_sample_{index}"
        samples = [entry[name] for entry in trainer.state.log_history if name in entry]
        assert len(samples) == 2 and samples[-1] == text
    [events] = out.glob("runs/*/events*")
    accumulator = EventAccumulator(str(events)).Reload()
    assert [event.value for event in accumulator.Scalars("eval/loss")] == pytest.approx(evaluations)
    assert "eval/sample_0/text_summary" in accumulator.Tags()["tensors"]


def test_a_sample_that_cannot_be_written_is_an_error(settings, tmp_path):
    trainer = trainer_of(settings, tmp_path, eval_data=settings["train_data"], sample_prompts=["one", "two"])
    trainer.model.lm_head.weight.data[:] = torch.nan
    with pytest.raises(ValueError, match="logits are NaN"):
        trainer.evaluate()


def test_evaluation_has_a_fixed_noise(settings, tmp_path):
    """In every run, whatever its seed and the size of its batches."""
    first = trainer_of(settings, tmp_path, eval_data=settings["train_data"])
    loss = first.evaluate()["eval_loss"]
    assert first.evaluate()["eval_loss"] == loss
    other = trainer_of(settings, tmp_path, eval_data=settings["train_data"], seed=9)
    other.model.load_state_dict(first.model.state_dict())
    assert other.evaluate()["eval_loss"] == loss

    seen = []
    for size in (2, 4):
        trainer = trainer_of(settings, tmp_path, eval_data=settings["train_data"], per_device_eval_batch_size=size)
        rows = []
        compute_loss = trainer.compute_loss
        trainer.compute_loss = lambda model, inputs, rows=rows, compute_loss=compute_loss, **keywords: (
            rows.extend(ids[ids != 1].tolist() for ids in inputs["input_ids"]),
            compute_loss(model, inputs, **keywords),
        )[1]
        trainer.evaluate()
        seen.append(rows)
    assert seen[0] == seen[1] and any(5 in row for row in seen[0])


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_do_not_change_a_run(settings, tmp_path, streaming):
    alone = run(settings, tmp_path, streaming=streaming, max_steps=4)
    helped = run(settings, tmp_path, streaming=streaming, max_steps=4, dataloader_num_workers=2)
    assert losses(alone) == losses(helped)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(settings, tmp_path, streaming):
    """Ten windows in batches of four: the interruption at step 4 falls into the second epoch."""
    changes = {"streaming": streaming, "max_steps": 7, "optim": "adamw_torch", "gradient_accumulation_steps": 2}
    changes |= {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 4}
    whole = run(settings, tmp_path, **changes)
    resumed = run(settings, tmp_path, **changes, resume_from_checkpoint=f"{settings['output_dir']}/checkpoint-4")
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 7
    assert_same_weights(resumed.model, whole.model, rtol=0, atol=0)


LAUNCH = """
import sys
from accelerate.state import PartialState
from accelerate.utils import DistributedType

if "fsdp" in sys.argv:
    # Accelerate heeds its FSDP settings on accelerators alone: these two CPU processes call themselves GPUs.
    original = PartialState.__init__

    def init(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init

from illada.training.recipe import train_recipe

trainer = train_recipe(sys.argv[1])
assert trainer.args.world_size == 2
assert trainer.is_fsdp_enabled == bool(trainer.args.fsdp)
"""


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does_on_the_batch_of_both(settings, tmp_path, wrapper):
    # Without `drop_last`, Accelerate fills the last batch of an epoch, so that each process has one.
    common = {"format": "pretraining", "gradient_accumulation_steps": 2, "dataloader_drop_last": True}
    alone = run(settings, tmp_path, **common)
    changes = {**common, "per_device_train_batch_size": 2}
    changes["output_dir"] = str(tmp_path / "two")
    if wrapper == "fsdp":
        changes |= {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["ILLaDADecoderLayer"]}}
    recipe = tmp_path / "two.yaml"
    recipe.write_text(yaml.safe_dump({**settings, **changes}))
    script = tmp_path / "launch.py"
    script.write_text(LAUNCH)
    # `--cpu` would start one process, for MPI to multiply; the recipe's `use_cpu` keeps these two off GPUs.
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    root = str(Path(__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-m", *launcher, str(script), str(recipe), wrapper],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_weights(
        alone.model, with_tied_head(load_file(tmp_path / "two" / "model.safetensors")), rtol=1e-5, atol=1e-6
    )
    log = json.loads((tmp_path / "two" / "training_log.json").read_text())
    assert [entry["loss"] for entry in log if "loss" in entry] == pytest.approx(losses(alone), rel=1e-4)


def with_tied_head(weights: dict) -> dict:
    return {"lm_head.weight": weights["model.embed_tokens.weight"], **weights}


# LoRA


@pytest.fixture
def lora_run(settings, tmp_path):
    trainer = run({**settings, "output_dir": str(tmp_path / "base")}, tmp_path, max_steps=1)
    changes = {"config": None, "model": str(tmp_path / "base"), "optim": "adamw_torch", "max_steps": 5}
    changes |= {
        "lora": {"r": 4, "target_modules": "all-linear"},
        "gradient_checkpointing": True,
        "learning_rate": 0.05,
    }
    return trainer.model, run(settings, tmp_path, **changes), Path(settings["output_dir"])


def test_lora_changes_only_the_adapter(lora_run):
    base, trainer, folder = lora_run
    weights = trainer.model.get_base_model().state_dict()
    for name, tensor in base.named_parameters():
        matches = [weights[key] for key in weights if key.replace(".base_layer", "") == name]
        assert len(matches) == 1 and torch.equal(matches[0], tensor)
    b_matrices = [weight for name, weight in weights.items() if "lora_B" in name]
    assert len(b_matrices) == 14 and all(weight.any() for weight in b_matrices)  # they begin at zero
    stored = load_file(folder / "adapter_model.safetensors")
    assert stored and all("lora" in name for name in stored)


def test_an_adapter_reloads_and_merges_without_another_token(lora_run):
    from peft import PeftModel

    base, trainer, folder = lora_run
    prompt = torch.tensor([[0, 10, 11, 12]])
    settings = {"max_new_tokens": 12, "block_length": 4, "eos_token_id": None}
    tokens = trainer.model.eval().generate(prompt, **settings)
    assert not torch.equal(tokens, base.eval().generate(prompt, **settings))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(loaded, ILLaDAForCausalLM) and torch.equal(loaded.generate(prompt, **settings), tokens)
    adapted = PeftModel.from_pretrained(base, folder)
    assert torch.equal(adapted.generate(prompt, **settings), tokens)
    assert torch.equal(adapted.merge_and_unload().generate(prompt, **settings), tokens)


# What is wrong is said


GOOD = chat("one", "two")
BAD_DATA = {
    "empty file": ([], r"train\.jsonl: no records"),
    "not JSON": (None, r"train\.jsonl, line 2: not JSON"),
    "not an object": ([GOOD, 3], r"line 2: must be an object .* got int"),
    "no field": ([GOOD, GOOD, {"prompt": "a"}], r"line 3: must have `messages` or .* or `text`, got prompt"),
    "empty text": ([{"text": ""}], r"line 1: `text` must be a string that is not empty"),
    "text of a wrong type": ([{"text": 3}], r"line 1: `text` must be a string"),
    "no answer": ([{"messages": [{"role": "user", "content": "a"}]}], r"line 1: `messages` must be a list of two"),
    "no content": ([{"messages": [{"role": "user"}, *GOOD["messages"]]}], r"line 1: `messages\[0\]\.content`"),
    "user last": ([{"messages": GOOD["messages"][::-1]}], r"line 1: `messages\[1\]\.role` must be 'assistant'"),
    "refused by the template": (
        [GOOD, {"messages": [{"role": "system", "content": "a"}, *GOOD["messages"]]}],
        r"line 2: `messages` does not fit the chat template: no system role",
    ),
    "too long": ([GOOD, chat("one", "a" * 60)], r"line 2: `messages` has \d+ tokens, at most 48 fit"),
    "mask token": ([chat("one", "a <[MASK]>")], r"line 1: `messages` holds the mask token 5"),
}


@pytest.mark.parametrize("case", BAD_DATA)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_data_are_named_by_file_line_and_field(settings, tmp_path, case, streaming):
    records, message = BAD_DATA[case]
    path = Path(settings["train_data"])
    if records is None:
        path.write_text(json.dumps(GOOD) + '\n{"messages": [\n')
    else:
        write_jsonl(path, records)
    with pytest.raises(ValueError, match=message):
        trainer = trainer_of(settings, tmp_path, streaming=streaming)
        next(iter(trainer.train_dataset))
        list(trainer.train_dataset)


def test_a_token_beyond_the_vocabulary_is_named(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "a."}])
    with pytest.raises(ValueError, match=r"line 2: `text` holds token 36, the model's vocabulary ends at 35"):
        list(encode_records(tokenizer, str(path), vocab_size=36, mask_token_id=5, max_length=None))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: [1", r"recipe\.yaml, line \d: not YAML"),
        ("- a\n- b\n", r"recipe\.yaml: must be a mapping"),
        ("learning_rat: 1", r"`learning_rat` is not a setting: did you mean `learning_rate`\?"),
        ("model: a\nconfig: {}\ntrain_data: b", "Exactly one of `model`"),
        ("model: a\n", "`train_data` must be set"),
        ("model: a\ntrain_data: b\nformat: chat", "`format` must be one of pretraining, sft, llada_sft"),
        ("model: a\ntrain_data: b\nlength: long", "`length` must be a whole number, got 'long'"),
    ],
)
def test_a_broken_recipe_is_named_by_file_line_and_field(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(str(path))


def test_values_out_of_range_are_refused(settings, tmp_path):
    for changes, message in [
        ({"corpus_difficulty": "extreme"}, "`corpus_difficulty` must be one of easy, medium, hard, got 'extreme'"),
        ({"corpus_opening": ["grid"]}, r"`corpus_opening` must be a mapping, got \['grid'\]"),
        ({"corpus_opening": {"maze": 5}}, "`corpus_opening` must give a number of examples .* got 'maze': 5"),
        ({"split_probability": 1.5}, r"`split_probability` must be a number in \[0, 1\], got 1.5"),
        ({"length": 65}, "`length` must be at most the model's 64 positions, got 65"),
        ({"train_data": "absent.jsonl"}, "absent.jsonl: no such file"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer_of(settings, tmp_path, **changes)


def test_numbers_and_words_are_read_as_people_write_them(settings, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    *_, arguments = read_settings(str(recipe), ["learning_rate=2e-3", "save_strategy=no", "bf16=true", "seed=3"])
    assert (arguments.learning_rate, arguments.save_strategy, arguments.bf16, arguments.seed) == (0.002, "no", True, 3)


def test_the_command_trains_and_says_what_is_wrong(settings, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(sys, "argv", ["illada", "train", str(recipe), "max_steps=1"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 0 and (Path(settings["output_dir"]) / "model.safetensors").is_file()
    monkeypatch.setattr(sys, "argv", ["illada.training", str(recipe), "max_steps=1"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("illada.training", run_name="__main__")  # what `accelerate launch -m` starts
    assert exit.value.code == 0
    assert f"training_log.json are in {settings['output_dir']}." in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["illada", "train", "absent"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2 and "must be a YAML file or one of illada-tiny" in capsys.readouterr().err


def test_the_recipe_of_the_embedded_model_runs(tmp_path):
    assert recipe_names() == ["illada-tiny"]
    overrides = [f"output_dir={tmp_path}", "max_steps=2", "torch_compile=false", "logging_steps=1", "use_cpu=true"]
    trainer = train_recipe("illada-tiny", [*overrides, "report_to=none", "eval_data=corpus", "disable_tqdm=true"])
    assert len(losses(trainer)) == 2 and math.isfinite(trainer.evaluate()["eval_loss"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.mask_token_id == 5 and model.generation_config.max_new_tokens == 128
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template
