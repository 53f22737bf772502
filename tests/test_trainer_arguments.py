"""The Trainer's arguments: none replaces the loss in silence, metrics align, mistakes are named before loading."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from tiny_models import random_model
from transformers import Trainer, TrainingArguments

from illada.training.data import MaskedDiffusionCollator
from illada.training.settings import read_settings
from illada.training.trainer import EVALUATION_SEED, EVALUATION_STRATA, MaskedDiffusionTrainer, Objective

REFUSED = {
    "average_tokens_across_devices": False,  # refused with several processes
    "label_names": ["targets"],
    "label_smoothing_factor": 1e-9,
    "parallelism_config": None,  # see its own test
    "train_sampling_strategy": "batch_rebalance",
    "use_liger_kernel": True,
}
# Fields that leave the loss what it is, each looked at in the source of Transformers 5.17 and 5.24.
OF_THE_OPTIMISER = """learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay
    adam_beta1 adam_beta2 adam_epsilon optim_target_modules max_grad_norm"""
OF_THE_LENGTH_AND_ORDER = """num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps
    auto_find_batch_size ignore_data_skip data_seed seed full_determinism dataloader_drop_last dataloader_num_workers
    dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    dataloader_in_order length_column_name accelerator_config"""
OF_THE_COMPUTATION = """bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    torch_compile_backend torch_compile_mode use_cache torch_empty_cache_steps use_cpu ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed
    local_rank neftune_noise_alpha liger_kernel_config"""  # NEFTune's noise is on the embeddings
OF_THE_EVALUATION = """eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only
    eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics
    batch_eval_metrics load_best_model_at_end metric_for_best_model greater_is_better do_train do_eval do_predict"""
OF_THE_RECORD = """output_dir logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project
    trackio_space_id trackio_bucket_id trackio_static_space_id save_only_model save_strategy save_steps
    save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id
    hub_strategy hub_always_push hub_revision restore_callback_states_from_checkpoint debug skip_memory_metrics
    resume_from_checkpoint remove_unused_columns"""  # the last is set by the Trainer itself
HARMLESS = " ".join(
    [OF_THE_OPTIMISER, OF_THE_LENGTH_AND_ORDER, OF_THE_COMPUTATION, OF_THE_EVALUATION, OF_THE_RECORD]
).split()


def rows(*lengths: int) -> list[dict]:
    generator = np.random.default_rng(0)
    return [{"input_ids": generator.integers(6, 37, length).tolist()} for length in lengths]


@pytest.fixture
def make_trainer(tmp_path):
    def make(trainer_class=MaskedDiffusionTrainer, arguments=None, **keywords):
        settings = {"max_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True, **(arguments or {})}
        return trainer_class(
            model=random_model(0, dtype=torch.float32),
            args=TrainingArguments(str(tmp_path / "output"), **settings),
            train_dataset=rows(12, 12, 12, 12),
            eval_dataset=rows(12, 9, 7, 5, 3),
            data_collator=MaskedDiffusionCollator(pad_token_id=1),
            **keywords,
        )

    return make


# Arguments that would change the loss


def test_every_field_of_the_installed_version_is_known():
    """A new one must be looked at: does it change the loss?"""
    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert fields <= {*REFUSED, *HARMLESS}, fields - {*REFUSED, *HARMLESS}


@pytest.mark.parametrize("name", ["label_names", "label_smoothing_factor", "train_sampling_strategy"])
def test_what_would_change_the_loss_is_refused_by_name(make_trainer, name):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got .*{REFUSED[name]}"):
        make_trainer(arguments={name: REFUSED[name]})


def test_another_loss_is_refused(make_trainer):
    with pytest.raises(ValueError, match="`compute_loss_func` must be None"):
        make_trainer(compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.sum())


def test_kernels_without_a_loss_and_parallel_sequences_are_refused(tmp_path):
    from accelerate.parallelism_config import ParallelismConfig

    from illada.training.arguments import check_arguments

    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    check_arguments(arguments)
    for name, value in (
        ("use_liger_kernel", True),
        ("parallelism_config", ParallelismConfig(cp_size=2)),
        ("parallelism_config", ParallelismConfig(sp_size=2)),
    ):
        refused = TrainingArguments(str(tmp_path), use_cpu=True)
        setattr(refused, name, value)  # not in the constructor, which wants two processes or the kernels' package
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            check_arguments(refused)


def test_processes_must_share_the_number_of_tokens(tmp_path):
    from illada.training.arguments import check_arguments

    class TwoProcesses(TrainingArguments):
        world_size = 2

    check_arguments(TrainingArguments(str(tmp_path), use_cpu=True, average_tokens_across_devices=False))
    arguments = TwoProcesses(str(tmp_path), use_cpu=True, average_tokens_across_devices=False)
    with pytest.raises(ValueError, match="`average_tokens_across_devices` must be True, got False"):
        check_arguments(arguments)


@pytest.mark.parametrize("name", ["neftune_noise_alpha", "max_grad_norm", "torch_empty_cache_steps", "use_cache"])
def test_what_is_allowed_leaves_the_first_loss_as_it_is_but_for_noise_on_embeddings(make_trainer, name):
    losses = []
    for value in (None, 3):
        value = True if value and name == "use_cache" else value
        trainer = make_trainer(arguments={"logging_steps": 1, **({} if value is None else {name: value})})
        trainer.train()
        losses.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
    assert (losses[0] == losses[1]) == (name != "neftune_noise_alpha")


# Metrics


def test_metrics_are_called_with_arrays_that_align(make_trainer):
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return {"loss_again": 0.5}

    trainer = make_trainer(
        compute_metrics=metrics,
        arguments={"per_device_eval_batch_size": 2, "include_for_metrics": ["inputs", "loss"]},
    )
    results = trainer.evaluate()
    assert results["eval_loss_again"] == 0.5 and results["eval_loss"] > 0
    [prediction] = seen
    assert prediction.predictions.shape == (5, 12, 37) and prediction.label_ids.shape == (5, 12)
    clean = MaskedDiffusionCollator(pad_token_id=1)(rows(12, 9, 7, 5, 3))
    noisy = trainer.objective.add_noise(clean, 5, EVALUATION_SEED, range(5), EVALUATION_STRATA)
    masked = noisy["input_ids"] == 5
    assert masked.any() and np.array_equal(prediction.label_ids, clean["labels"].masked_fill(~masked, -100))
    for row, length in enumerate((12, 9, 7, 5, 3)):
        given = noisy["input_ids"][row : row + 1, :length]
        assert np.array_equal(prediction.inputs[row, :length], given[0])
        positions = noisy["position_ids"][row : row + 1, :length]
        segments = (positions == 0).cumsum(1)
        mask = (segments.unsqueeze(1) == segments.unsqueeze(2)).unsqueeze(1)
        logits = trainer.model(given, attention_mask=mask, position_ids=positions).logits[0]
        for column in masked[row].nonzero().flatten().tolist():
            np.testing.assert_allclose(prediction.predictions[row, column], logits[column].detach(), atol=1e-5)
        assert not prediction.predictions[row, :length][~masked[row, :length].numpy()].any()


def test_logits_can_be_made_smaller_before_they_are_kept(make_trainer):
    def metrics(prediction):
        right = prediction.label_ids != -100
        return {"shape": prediction.predictions.shape, "count": right.sum()}

    trainer = make_trainer(
        compute_metrics=metrics, preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1)
    )
    results = trainer.evaluate()
    assert results["eval_shape"] == (5, 12) and results["eval_count"] > 0
    predicted = trainer.predict(rows(12, 9))
    assert predicted.predictions.shape == predicted.label_ids.shape == (2, 12)


def test_metrics_of_a_plain_trainer_align_too(make_trainer):
    """A masked language model's batches: some tokens are masked, and they alone have labels."""
    shapes = []

    def collate(features):
        batch = MaskedDiffusionCollator(pad_token_id=1)(features)
        masked = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]) % 3 == 0
        return {
            "input_ids": batch["input_ids"].masked_fill(masked, 5),
            "labels": batch["labels"].masked_fill(~masked, -100),
        }

    trainer = make_trainer(
        Trainer,
        compute_metrics=lambda prediction: (
            shapes.append((prediction.predictions.shape, prediction.label_ids.shape)) or {}
        ),
    )
    trainer.data_collator = collate
    trainer.evaluate()
    assert shapes == [((5, 12, 37), (5, 12))]


# Training on what is visible


@pytest.fixture
def warnings_of_the_model():
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("illada.modeling_illada")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_a_plain_trainer_on_clean_tokens_is_warned_once(make_trainer, warnings_of_the_model):
    trainer = make_trainer(Trainer, arguments={"max_steps": 3, "per_device_train_batch_size": 2})
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: {name: x for name, x in collate(rows).items() if name != "is_prompt"}
    trainer.train()
    assert len(warnings_of_the_model) == 1 and "`illada.training.trainer" in warnings_of_the_model[0]


def test_right_training_is_not_warned(make_trainer, warnings_of_the_model):
    make_trainer(arguments={"max_steps": 2}).train()
    model = random_model(0, dtype=torch.float32)
    labels = torch.arange(6, 18).unsqueeze(0)
    model(labels, labels=labels)  # not in training mode
    model.train()(labels.masked_fill(labels % 2 == 0, 5), labels=labels.masked_fill(labels % 2 == 1, -100))
    model(labels, labels=labels)  # the first batch was right
    assert warnings_of_the_model == []


# Batches that are not the collator's


def test_rows_need_only_token_ids():
    batch = MaskedDiffusionCollator(pad_token_id=1)(rows(4, 6))
    assert not batch["is_prompt"].any() and batch["position_ids"].tolist()[1] == list(range(6))
    noisy = Objective().add_noise({name: batch[name] for name in ("input_ids", "labels")}, 5, 0, range(2))
    whole = Objective().add_noise(batch, 5, 0, range(2))
    assert torch.equal(noisy["input_ids"], whole["input_ids"])


@pytest.mark.parametrize(
    ("objective", "change", "message"),
    [
        (Objective(), {"labels": None}, "this one lacks labels"),
        (Objective(), {"attention_mask": torch.ones(2, 6)}, "this one has attention_mask"),
        (Objective(keep_prompt_probability=1.0), {"is_prompt": None}, "this one lacks is_prompt"),
    ],
)
def test_a_batch_that_the_noise_would_not_heed_is_refused(objective, change, message):
    batch = {**MaskedDiffusionCollator(pad_token_id=1)(rows(4, 6)), **change}
    with pytest.raises(ValueError, match=message):
        objective.add_noise({name: value for name, value in batch.items() if value is not None}, 5, 0, range(2))


# Every setting of a recipe, before anything is loaded


BAD_VALUES = {
    "model": 3,
    "tokenizer": 3,
    "dtype": "float33",
    "attn_implementation": "flash",
    "lora": {"rank": 3},
    "generation": {"max_tokens": 3},
    "overwrite": "maybe",
    "train_data": "absent.csv",
    "eval_data": "absent.parquet",
    "format": "chat",
    "length": 1,
    "corpus_difficulty": "extreme",
    "corpus_opening": {"maze": 3},
    "streaming": True,  # without max_steps
    "sample_prompts": "one",
    "split_probability": "often",
    "keep_prompt_probability": -0.1,
    "eps": 1.5,
    "stratified": 1,
    "seed": -1,
    "learning_rate": "fast",
    "per_device_train_batch_size": 0,
    "gradient_accumulation_steps": 0,
    "num_train_epochs": -1.0,
    "bf16": "yes",
    "label_smoothing_factor": 0.1,
    "resume_from_checkpoint": "absent",
}


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"train_data: {tmp_path / 'train.jsonl'}\nmodel: illada-tiny\nuse_cpu: true\nlength: 8\n"
        f"report_to: none\noutput_dir: {tmp_path / 'out'}\nmax_steps: 1\nsave_strategy: 'no'\ndisable_tqdm: true\n"
    )
    return path


def refuse_to_load(monkeypatch):
    from illada.training import recipe

    def loaded(*arguments, **keywords):
        raise AssertionError("something was loaded")

    for name in ("load_tokenizer", "load_model", "load_data"):
        monkeypatch.setattr(recipe, name, loaded)


def override(name: str, value) -> str:
    return f"{name}={str(value).lower() if isinstance(value, bool) else value}"


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_bad_value_is_refused_by_its_name_before_anything_is_loaded(recipe, monkeypatch, name):
    from illada.training.recipe import train_recipe

    refuse_to_load(monkeypatch)
    changes = [override(name, BAD_VALUES[name])] + (["max_steps=-1"] if name == "streaming" else [])
    named = "max_steps" if name == "streaming" else name
    with pytest.raises(ValueError, match=f"`{named}`"):
        train_recipe(str(recipe), changes)


@pytest.mark.parametrize(
    ("config", "message"),
    [("{hiden_size: 3}", "hiden_size"), ("{hidden_size: wide}", "hidden_size"), ("3", "a mapping")],
)
def test_a_bad_config_is_refused(recipe, config, message):
    with pytest.raises(ValueError, match=f"`config`.*{message}"):
        read_settings(str(recipe), ["model=null", "tokenizer=illada-tiny", f"config={config}"])


def test_every_setting_of_our_own_has_a_bad_value():
    from illada.training.settings import DataArguments, ModelArguments

    names = {field.name for kind in (ModelArguments, DataArguments) for field in dataclasses.fields(kind)}
    assert names - {"config"} <= BAD_VALUES.keys()


def test_a_used_folder_is_not_overwritten_in_silence(recipe, tmp_path):
    from illada.training.recipe import train_recipe

    train_recipe(str(recipe))
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="There is a model in `output_dir` .*out.*`overwrite=true` replaces it"):
        train_recipe(str(recipe), ["learning_rate=0.1"])
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    train_recipe(str(recipe), ["learning_rate=0.1", "overwrite=true"])
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_has_both_names_and_no_warning(recipe, recwarn, name):
    from illada.training.recipe import train_recipe

    trainer = train_recipe(str(recipe), [f"{name}=true", "lora={r: 2, target_modules: all-linear}"])
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
    assert [str(warning.message) for warning in recwarn if "checkpointing" in str(warning.message)] == []


def test_what_lora_writes_names_no_folder_of_this_machine(recipe, tmp_path, monkeypatch, recwarn):
    import illada
    from illada.training.recipe import train_recipe

    monkeypatch.chdir(tmp_path)
    train_recipe(str(recipe), ["lora={r: 2, target_modules: all-linear}", "output_dir=out"])
    package = str(illada.tiny.EMBEDDED_MODEL.parent)
    for path in (tmp_path / "out").iterdir():
        if path.suffix in (".json", ".md", ".jinja"):
            assert package not in path.read_text() and str(tmp_path) not in path.read_text(), path.name
    assert not [warning for warning in recwarn if "config file" in str(warning.message)]
    assert '"base_model_name_or_path": "illada-tiny"' in (tmp_path / "out" / "adapter_config.json").read_text()
