"""Transformers' pipelines: by default what `generate` gives, on this package's classes and on copied code."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline, set_seed

from illada import EMBEDDED_MODEL

PROMPTS = ["Sort the numbers: 17 4 9", "Tom has 3 pears and", "What"]
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
BLANK = "Today Tom has 3 pears and<[MASK]> cups."
BLANKS = "Tom has<[MASK]> pears and<[MASK]><[MASK]>."
SETTINGS = {"max_new_tokens": 12, "block_length": 4}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What `save_pretrained` writes of the embedded model and its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def writer(saved):
    return pipeline("text-generation", model=str(saved))


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


def generated(model, tokenizer, prompt, **settings) -> list[str]:
    """The new text of each returned row, by `generate` itself."""
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    sequences = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **settings)
    return tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("prompt", [PROMPTS[0], CHATS[0]], ids=["string", "chat"])
def test_without_settings_a_pipeline_is_generate(writer, model, tokenizer, prompt):
    (answer,) = generated(model, tokenizer, prompt)
    assert len(answer) > 0
    full = [*prompt, {"role": "assistant", "content": answer}] if isinstance(prompt, list) else prompt + answer
    assert writer(prompt) == [{"generated_text": full}]
    assert writer(prompt, return_full_text=False) == [{"generated_text": answer}]


@pytest.mark.parametrize("prompts", [PROMPTS, CHATS], ids=["strings", "chats"])
def test_batches(writer, model, tokenizer, prompts):
    alone = [generated(model, tokenizer, prompt, **SETTINGS) for prompt in prompts]
    assert len(set(map(tuple, alone))) > 1
    for batch_size in (1, 3):
        answers = writer(prompts, return_full_text=False, batch_size=batch_size, **SETTINGS)
        assert [[answer["generated_text"] for answer in row] for row in answers] == alone


def test_several_samples_of_a_prompt(writer, model, tokenizer):
    settings = {**SETTINGS, "do_sample": True, "temperature": 2.0, "num_return_sequences": 3}
    set_seed(7)
    expected = generated(model, tokenizer, PROMPTS[1], **settings)
    set_seed(7)
    answers = writer(PROMPTS[1], return_full_text=False, **settings)
    assert [answer["generated_text"] for answer in answers] == expected
    assert len(set(expected)) > 1


def test_streaming(writer, model, tokenizer):
    streamer = TextIteratorStreamer(writer.tokenizer, skip_prompt=True, skip_special_tokens=True)
    writer(CHATS[0], streamer=streamer, **SETTINGS)
    assert ["".join(streamer)] == generated(model, tokenizer, CHATS[0], **SETTINGS)


def expected_fill(model, tokenizer, text: str) -> list[int]:
    """The tokens with which `generate` fills all blanks in one forward pass."""
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"]
    filled = model.generate(input_ids, max_new_tokens=0, max_denoising_steps=1)
    return filled[input_ids == tokenizer.mask_token_id].tolist()


@pytest.mark.parametrize("text", [BLANK, BLANKS], ids=["one", "several"])
def test_fill_mask_predicts_what_generate_fills_in(saved, model, tokenizer, text):
    filler = pipeline("fill-mask", model=str(saved))
    answers = filler(text, top_k=3)
    if text == BLANK:
        assert [answer["sequence"] for answer in answers][0].count("pears") == 1
        answers = [answers]
    assert [blank[0]["token"] for blank in answers] == expected_fill(model, tokenizer, text)
    # Scores are probabilities of a forward pass.
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id].softmax(-1)
    for blank, row in zip(answers, probabilities, strict=True):
        assert [each["score"] for each in blank] == pytest.approx(row.topk(3).values.tolist(), rel=1e-4)


def filled(model, tokenizer, text: str, **settings) -> list[str]:
    """The whole text of each returned row, by `generate` itself."""
    sequences = model.generate(tokenizer(text, return_tensors="pt")["input_ids"], **settings)
    return tokenizer.batch_decode(sequences, skip_special_tokens=True)


@pytest.mark.parametrize("budget", [0, 5])
def test_a_text_pipeline_shows_what_was_filled_in(saved, writer, model, tokenizer, budget):
    from illada.text.pipelines import TextWithBlanksPipeline

    write = pipeline("text-generation", model=str(saved), pipeline_class=TextWithBlanksPipeline)
    texts = [BLANK, BLANKS]
    expected = [filled(model, tokenizer, text, max_new_tokens=budget)[0] for text in texts]
    assert all("MASK" not in text for text in expected)
    for batch_size in (1, 2):
        answers = write(texts, max_new_tokens=budget, batch_size=batch_size)
        assert [answer[0]["generated_text"] for answer in answers] == expected
    spelled = BLANKS.replace("<[MASK]><[MASK]>", "<[MASK]*2>")
    assert write(spelled, max_new_tokens=budget)[0]["generated_text"] == expected[1]
    tokens = write(BLANK, max_new_tokens=budget, return_tensors=True)[0]["generated_token_ids"]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == expected[0]


@pytest.mark.parametrize("settings", [{}, {"return_full_text": False}, {"num_return_sequences": 2, "do_sample": True}])
def test_transformers_own_pipeline_refuses_blanks(writer, settings):
    with pytest.raises(NotImplementedError, match="would lose what is filled into the blanks"):
        writer(BLANK, max_new_tokens=0, **settings)


def test_each_sample_of_a_text_pipeline_shows_its_own_filling(saved, model, tokenizer):
    from illada.text.pipelines import TextWithBlanksPipeline

    write = pipeline("text-generation", model=str(saved), pipeline_class=TextWithBlanksPipeline)
    settings = {"max_new_tokens": 2, "do_sample": True, "temperature": 3.0, "num_return_sequences": 4}
    set_seed(3)
    expected = filled(model, tokenizer, BLANKS, **settings)
    set_seed(3)
    assert [answer["generated_text"] for answer in write(BLANKS, **settings)] == expected
    assert len({text[:20] for text in expected}) > 1
    assert write(PROMPTS[0], **SETTINGS)[0]["generated_text"].startswith(PROMPTS[0])
    assert write(CHATS[0], **SETTINGS)[0]["generated_text"][-1]["role"] == "assistant"
    with pytest.raises(ValueError, match="must not have a blank"):
        write([{"role": "user", "content": BLANK}], **SETTINGS)


STRANGER = """
import json, sys
sys.modules["illada"] = None  # its import fails, installed or not
from transformers import pipeline

folder, prompt, chat, blank, blanks, settings = json.loads(sys.argv[1])
write = pipeline("text-generation", model=folder, trust_remote_code=True)
assert type(write.model).__module__.startswith("transformers_modules."), type(write.model)
fill = pipeline("fill-mask", model=folder, trust_remote_code=True)
print(json.dumps({
    "default": write(prompt, return_full_text=False)[0]["generated_text"],
    "chat": write(chat, **settings)[0]["generated_text"][-1]["content"],
    "blank": [fill(blank)[0]["token"]],
    "blanks": [each[0]["token"] for each in fill(blanks)],
}))
"""


def test_a_saved_checkpoint_works_where_the_package_is_not(saved, model, tokenizer, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", STRANGER, json.dumps([str(saved), PROMPTS[0], CHATS[0], BLANK, BLANKS, SETTINGS])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {
        "default": generated(model, tokenizer, PROMPTS[0])[0],
        "chat": generated(model, tokenizer, CHATS[0], **SETTINGS)[0],
        "blank": expected_fill(model, tokenizer, BLANK),
        "blanks": expected_fill(model, tokenizer, BLANKS),
    }
