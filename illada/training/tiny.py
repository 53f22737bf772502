"""Trains the embedded model from scratch: `python -m illada.training.tiny OUTPUT`.

About 80 minutes on one CPU core. The loop is the standard `transformers.Trainer`; the model, its
tokenizer and its generation config are saved to OUTPUT, the checkpoints on the way to OUTPUT/checkpoints. The learning
rate is constant up to the last 4,000 steps, so that a run that was stopped before them can go on (`--resume`) to
another `--max-steps`, with the result of an uninterrupted one.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from transformers import Trainer, TrainingArguments, set_seed

from ..configuration_illada import ILLaDAConfig
from ..modeling_illada import ILLaDAForCausalLM
from .data import CorpusWindows, MaskedDiffusionCollator
from .tokenizer import train_tokenizer


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the model, made if absent.")],
    max_steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 20_000,
    batch_size: Annotated[int, typer.Option(help="Windows in a step.")] = 16,
    window_length: Annotated[int, typer.Option(help="Tokens in a window.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of weights, text and noise.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUTPUT.")] = False,
):
    """Train illada-tiny from scratch and save it to OUTPUT."""
    set_seed(seed)
    tokenizer = train_tokenizer()
    config = ILLaDAConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.056,  # sqrt(2 / (5 * hidden_size)), iLLaDA's own scaling
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    model = ILLaDAForCausalLM(config)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output / "checkpoints"),
            max_steps=max_steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=0.1,
            adam_beta2=0.99,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": min(4000, max_steps // 4), "min_lr_ratio": 0.01},
            warmup_steps=min(500, max_steps // 10),
            torch_compile=True,
            logging_steps=100,
            save_steps=1000,
            save_total_limit=2,
            remove_unused_columns=False,
            report_to="none",
            seed=seed,
        ),
        train_dataset=CorpusWindows(tokenizer, window_length, seed),
        data_collator=MaskedDiffusionCollator(config.mask_token_id, keep_prompt_probability=0.75, seed=seed),
    )
    trainer.train(resume_from_checkpoint=resume)
    model.generation_config.update(max_new_tokens=128, do_sample=False)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "training_log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    typer.run(main)
