"""PEFT's methods: those that change layers act in `generate` and in scores; those that do not are refused by name."""

import pytest
import torch
from tiny_models import MASK, random_model
from transformers import TrainingArguments

from illada.evaluation import confidence_score, is_greedy, monte_carlo_log_likelihood, rolling_log_likelihood
from illada.training.trainer import MaskedDiffusionTrainer

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'illada[train]'")

LAYERS = ["q_proj", "v_proj", "up_proj"]
METHODS = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False, task_type="CAUSAL_LM"),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=LAYERS, use_dora=True, task_type="CAUSAL_LM"),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=LAYERS, task_type="CAUSAL_LM"),
    "ia3": lambda: peft.IA3Config(target_modules=LAYERS, feedforward_modules=["up_proj"], task_type="CAUSAL_LM"),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
}
REFUSED = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "P_TUNING": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "Activated LoRA": lambda: peft.LoraConfig(
        r=2, target_modules=LAYERS, task_type="CAUSAL_LM", alora_invocation_tokens=[8, 9]
    ),
}
PROMPT = [7, 8, 9]


def adapted_model(config):
    """The model in a `PeftModel`, whose own weights are random, so that it is not the model that it adapts."""
    model = peft.get_peft_model(random_model(0), config).double().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator).double()
    return model


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_an_adapter_of_layers_acts_in_generation_and_scores_as_in_forward(method):
    """Each token and its probability are those of the PeftModel's forward of the text so far and one [MASK]."""
    model = adapted_model(METHODS[method]())
    output = model.generate(
        input_ids=torch.tensor([PROMPT]),
        max_new_tokens=4,
        block_length=1,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_trace=True,
    )
    text = list(PROMPT)
    for step in range(4):
        logits = model(input_ids=torch.tensor([[*text, MASK]])).logits[0, -1]
        score = confidence_score(model, [(text, [11])])[0].score
        assert score == pytest.approx(logits.log_softmax(-1)[11].item())
        logits[MASK] = -torch.inf
        text.append(int(logits.argmax()))
        confidence = output.commit_confidences[0, len(PROMPT) + step].item()
        assert confidence == pytest.approx(logits.softmax(-1).max().item())
    assert output.sequences.tolist() == [text]
    with model.disable_adapter():
        plain = model(input_ids=torch.tensor([[*PROMPT, MASK]])).logits
    assert not torch.allclose(plain, model(input_ids=torch.tensor([[*PROMPT, MASK]])).logits)


@pytest.mark.parametrize("method", REFUSED)
def test_an_adapter_that_acts_outside_the_layers_is_refused_by_name(method, tmp_path):
    model = adapted_model(REFUSED[method]())
    pairs = [(PROMPT, [11])]
    message = f"cannot honour the adapter {method} of PEFT"
    with pytest.raises(ValueError, match=f"`generate` {message}"):
        model.generate(input_ids=torch.tensor([PROMPT]), max_new_tokens=2)
    for score in (confidence_score, is_greedy, monte_carlo_log_likelihood):
        with pytest.raises(ValueError, match=f"A score {message}"):
            score(model, pairs)
    with pytest.raises(ValueError, match=f"A score {message}"):
        rolling_log_likelihood(model, [PROMPT])
    with pytest.raises(ValueError, match=f"`MaskedDiffusionTrainer` {message}"):
        MaskedDiffusionTrainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), report_to=[]))


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
def test_without_its_virtual_tokens_the_model_is_the_plain_one(method):
    plain, model = random_model(0), adapted_model(REFUSED[method]())
    inputs, pairs = torch.tensor([PROMPT]), [(PROMPT, [11, 12])]
    with model.disable_adapter():
        assert torch.equal(
            model.generate(input_ids=inputs, max_new_tokens=4), plain.generate(inputs, max_new_tokens=4)
        )
        assert confidence_score(model, pairs) == confidence_score(plain, pairs)
    # The model itself is not changed by a PeftModel around it.
    assert torch.equal(model.base_model.generate(inputs, max_new_tokens=4), plain.generate(inputs, max_new_tokens=4))
