"""The real harness on the embedded model: its results against plain loops over the package's own functions."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'illada[eval]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from illada import EMBEDDED_MODEL, MaskedDiffusionGenerationConfig  # noqa: E402
from illada.commands.errors import WrongUsage  # noqa: E402
from illada.continuous_batching import ContinuousBatchingManager  # noqa: E402
from illada.conversion import convert_adapter  # noqa: E402
from illada.evaluation import (  # noqa: E402
    cli,
    confidence_score,
    is_greedy,
    monte_carlo_log_likelihood,
    rolling_log_likelihood,
)
from illada.evaluation.harness import MaskedDiffusionLM  # noqa: E402
from illada.evaluation.presets import BASE, INSTRUCT, PRESETS, TABLES, select_presets  # noqa: E402
from illada.tiny.corpus import held_out_examples  # noqa: E402
from illada.training.data import encode  # noqa: E402

CHAT_TASKS = ["illada_choice", "illada_reversal"]
DOCUMENT_TASKS = ["illada_infilling", "illada_perplexity"]
METRICS = {"acc,none", "word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"}
EMBEDDED_CHECKPOINT = str(EMBEDDED_MODEL)
LIKELIHOOD = {"num_samples": 4, "sampling": "stratified", "check_greedy": False}


def run_harness(tasks, model_args=None, *, batch_size=4, limit=3, chat=False, **settings):
    """One run of the real harness on the offline tasks: {task: [(arguments, response, metrics) per request]}."""
    results = lm_eval.simple_evaluate(
        model="illada",
        model_args={"pretrained": EMBEDDED_CHECKPOINT, "dtype": "float32", **(model_args or {})},
        tasks=tasks,
        batch_size=batch_size,
        device="cpu",
        limit=limit,
        bootstrap_iters=0,
        apply_chat_template=chat,
        task_manager=TaskManager(include_path=str(cli.TASK_FOLDER), include_defaults=False),
        **settings,
    )
    return results and {task: summarise(results, task) for task in results["samples"]}


def summarise(results, task):
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    responses = [response[0] for sample in samples for response in sample["resps"]]
    metrics = {name: value for name, value in results["results"][task].items() if name in METRICS}
    return {"responses": responses, "metrics": metrics, "samples": samples}


def assert_same(first, second):
    """Equal metrics, equal texts, and scores equal up to the rounding of fp32 in differently padded batches."""
    assert first.keys() == second.keys()
    for task in first:
        assert first[task]["metrics"] and first[task]["responses"]
        for name, value in first[task]["metrics"].items():
            assert second[task]["metrics"][name] == pytest.approx(value, rel=1e-5), (task, name)
        for a, b in zip(first[task]["responses"], second[task]["responses"], strict=True):
            if isinstance(a, (tuple, list)):  # a list if it comes from the other processes' JSON
                (a, greedy), (b, also_greedy) = a, b
                assert greedy == also_greedy
            assert b == (a if isinstance(a, str) else pytest.approx(a, abs=1e-4))


def all_runs(batch_size):
    """What two processes, other batch sizes and a second run must agree on."""
    return {
        "chat": run_harness(CHAT_TASKS, {"score": "confidence"}, chat=True, batch_size=batch_size),
        "likelihood": run_harness(["illada_choice"], LIKELIHOOD, chat=True, batch_size=batch_size),
        "documents": run_harness(DOCUMENT_TASKS, LIKELIHOOD, batch_size=batch_size),
    }


@pytest.fixture(scope="module")
def reference():
    return all_runs(batch_size=4)


@pytest.fixture(scope="module")
def model(embedded_model):
    return embedded_model


@pytest.fixture(scope="module")
def tokenizer(embedded_tokenizer):
    return embedded_tokenizer


@pytest.fixture(scope="module")
def harness_model():
    return MaskedDiffusionLM(EMBEDDED_CHECKPOINT, device="cpu", batch_size=4)


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("a_task", 3, 1))


def chat_prompt(tokenizer, text):
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


# --- the harness against plain loops ---


def choice_pairs(tokenizer, run):
    """The pairs of a run. The harness counts white space at the end of a prompt as part of what follows."""
    pairs = []
    for document in (sample["doc"] for sample in run["illada_choice"]["samples"]):
        prompt = chat_prompt(tokenizer, document["prompt"])
        newline = prompt.pop()
        assert tokenizer.decode([newline]) == "\n"
        choices = tokenizer(document["choices"], add_special_tokens=False)["input_ids"]
        pairs += [(prompt, [newline, *choice]) for choice in choices]
    return pairs


def accuracy(scores, run):
    golds = [sample["doc"]["gold"] for sample in run["illada_choice"]["samples"]]
    picks = torch.tensor(scores).view(len(golds), -1).argmax(1).tolist()
    return sum(pick == gold for pick, gold in zip(picks, golds)) / len(golds)


def test_multiple_choice_by_confidence_equals_a_loop(model, tokenizer, reference):
    run = reference["chat"]
    pairs = choice_pairs(tokenizer, run)
    scores = [confidence_score(model, [pair])[0] for pair in pairs]
    assert len(pairs) == 12
    for (score, _), expected in zip(run["illada_choice"]["responses"], scores, strict=True):
        assert score == pytest.approx(expected.score, abs=1e-4)
    assert [greedy for _, greedy in run["illada_choice"]["responses"]] == is_greedy(model, pairs)
    assert run["illada_choice"]["metrics"]["acc,none"] == accuracy([score.score for score in scores], run)


def test_multiple_choice_by_likelihood_equals_a_loop(model, tokenizer, reference):
    run = reference["likelihood"]
    settings = {"num_samples": 4, "sampling": "stratified"}
    scores = []
    for pair in choice_pairs(tokenizer, run):
        generator = torch.Generator().manual_seed(1234)  # the harness's own default for torch
        scores.append(monte_carlo_log_likelihood(model, [pair], generator=generator, **settings)[0].log_likelihood)
    assert [score for score, _ in run["illada_choice"]["responses"]] == pytest.approx(scores, abs=1e-4)
    assert run["illada_choice"]["metrics"]["acc,none"] == accuracy(scores, run)


def test_generation_equals_a_loop(model, tokenizer, reference):
    examples = [e for e in held_out_examples("ordering", 32) if e.prompt.endswith("From the back?")][:3]
    texts = []
    for example in examples:
        prompt = torch.tensor([chat_prompt(tokenizer, example.prompt)])
        output = model.generate(prompt, max_new_tokens=64)
        text = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
        texts.append(text.split("\n")[0])
    assert reference["chat"]["illada_reversal"]["responses"] == texts
    expected = sum(example.is_correct(text) for example, text in zip(examples, texts)) / 3
    assert reference["chat"]["illada_reversal"]["metrics"]["acc,none"] == expected


def test_infilling_equals_a_loop(model, tokenizer, reference):
    examples = held_out_examples("sentence", 16)[:3]
    texts = []
    for example, ((ids, _),) in zip(examples, [encode(tokenizer, [example]) for example in examples]):
        blanked = example.text
        for start, end in reversed(example.blanks):
            blanked = blanked[:start] + tokenizer.mask_token + blanked[end:]
        prompt = torch.tensor([tokenizer.encode(blanked) + [tokenizer.eos_token_id]])
        assert prompt.shape[1] == len(ids)  # a blank of the family is one token
        texts.append(tokenizer.decode(model.generate(prompt, max_new_tokens=0)[0], skip_special_tokens=True))
    assert reference["documents"]["illada_infilling"]["responses"] == texts
    expected = sum(example.is_correct(text) for example, text in zip(examples, texts)) / 3
    assert reference["documents"]["illada_infilling"]["metrics"]["acc,none"] == expected


def test_rolling_log_likelihood_equals_a_loop(model, tokenizer, reference):
    scores = []
    for example in held_out_examples("sentence", 16)[:3]:
        text = tokenizer.encode(example.text, add_special_tokens=False)
        scores += rolling_log_likelihood(
            model,
            [text],
            prefix_token_id=tokenizer.bos_token_id,
            num_samples=4,
            sampling="stratified",
            generator=torch.Generator().manual_seed(1234),
        )
    responses = reference["documents"]["illada_perplexity"]["responses"]
    assert responses == pytest.approx([score.log_likelihood for score in scores], abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_second_run_and_other_batch_sizes_give_the_same(reference, batch_size):
    runs = all_runs(batch_size)
    for name, run in reference.items():
        assert_same(run, runs[name])
        if batch_size == 4:
            assert [run[task]["responses"] for task in run] == [runs[name][task]["responses"] for task in run]


def test_an_automatic_batch_size_gives_the_same(reference):
    automatic = {"chat": True, "batch_size": "auto", "max_batch_size": 8}
    assert_same(reference["chat"], run_harness(CHAT_TASKS, {"score": "confidence"}, **automatic))


def test_another_seed_gives_another_estimate(reference):
    again = run_harness(["illada_choice"], LIKELIHOOD, chat=True, torch_random_seed=7)
    assert again["illada_choice"]["responses"] != reference["likelihood"]["illada_choice"]["responses"]


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(reference, tmp_path):
    """As `accelerate launch` runs them, on the CPU: the second scores a part of every task's documents."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    # Accelerate's launcher starts several processes for GPUs alone; this variable puts them on the CPU.
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment = {**os.environ, **environment}
    subprocess.run([*command, __file__, str(tmp_path)], check=True, env=environment, timeout=300)
    runs = json.loads((tmp_path / "runs.json").read_text())
    requests = json.loads((tmp_path / "requests.json").read_text())
    assert requests == [2, 2]  # of 3 documents; the harness evens the processes out with a repeated one
    for name, run in reference.items():
        assert_same(run, runs[name])


# --- what the harness offers ---


def test_the_model_is_registered_under_its_name():
    assert get_model("illada") is MaskedDiffusionLM


def test_cached_requests_are_not_scored_again_and_a_cut_off_run_resumes(monkeypatch, tmp_path, reference):
    scored = []
    original = MaskedDiffusionLM._score_pairs

    def recorded(self, pairs):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(len(pairs))
        return original(self, pairs)

    monkeypatch.setattr(MaskedDiffusionLM, "_score_pairs", recorded)
    settings = {"chat": True, "batch_size": 1, "use_cache": str(tmp_path / "cache")}  # 4 batches are cached together
    with pytest.raises(KeyboardInterrupt):
        run_harness(["illada_choice"], {"score": "confidence"}, **settings)
    assert scored == [4, 4]

    scored.clear()
    run_harness(["illada_choice"], {"score": "confidence"}, **settings)
    assert scored == [4]
    scored.clear()
    resumed = run_harness(["illada_choice"], {"score": "confidence"}, **settings)
    assert scored == []
    assert_same({"illada_choice": reference["chat"]["illada_choice"]}, resumed)


def test_lora_adapters_are_scored(tmp_path, model, tokenizer):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'illada[eval]'")
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    run = run_harness(
        ["illada_choice"], {"score": "confidence", "peft": str(tmp_path / "adapter")}, chat=True, limit=1
    )
    pairs = choice_pairs(tokenizer, run)
    expected = [score.score for score in confidence_score(adapted, pairs)]
    assert [score for score, _ in run["illada_choice"]["responses"]] == pytest.approx(expected, abs=1e-4)
    assert expected != pytest.approx([score.score for score in confidence_score(model, pairs)], abs=0.1)


@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen"])
def test_an_adapter_that_would_be_loaded_by_half_is_an_error(tmp_path, model, fault):
    """PEFT itself drops what has no place, and leaves what is missing as it was initialised."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'illada[eval]'")
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED_CHECKPOINT)
    peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    if fault == "extra":
        name = name.replace("layers.1", "layers.99")
        tensors[name] = torch.ones(128, 4)
    elif fault == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.ones(3, 4)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    place = name.removeprefix("base_model.model.").removesuffix(".weight")
    with pytest.raises(ValueError, match=re.escape(place)):
        MaskedDiffusionLM(EMBEDDED_CHECKPOINT, peft=str(tmp_path), device="cpu")


def test_an_adapter_with_the_names_of_the_released_code_acts_in_full(tmp_path, model, tokenizer):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'illada[eval]'")
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED_CHECKPOINT)
    targets = ["q_proj", "o_proj", "gate_proj", "down_proj"]
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "standard")
    convert_adapter(tmp_path / "standard", tmp_path / "released", to="llada")
    lm = MaskedDiffusionLM(EMBEDDED_CHECKPOINT, peft=str(tmp_path / "released"), device="cpu")
    ids = torch.tensor([tokenizer.encode("Tom has 3 apples")])
    torch.testing.assert_close(lm.model(ids).logits, adapted(ids).logits)
    assert not torch.allclose(lm.model(ids).logits, model(ids).logits, atol=0.1)


def test_an_adapter_that_acts_on_prompts_is_refused_by_name(tmp_path, model):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'illada[eval]'")
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED_CHECKPOINT)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        MaskedDiffusionLM(EMBEDDED_CHECKPOINT, peft=str(tmp_path), device="cpu")


def test_a_chat_template_without_a_system_role_drops_that_message(tokenizer, reference):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    with pytest.raises(Exception, match="System role not supported"):
        tokenizer.apply_chat_template(messages)
    run = run_harness(["illada_reversal"], chat=True, system_instruction="Be brief.")
    assert_same({"illada_reversal": reference["chat"]["illada_reversal"]}, run)


def test_stop_strings_end_a_response(harness_model, tokenizer):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": held_out_examples("word_problem", 1)[0].prompt}],
        add_generation_prompt=True,
        tokenize=False,
    )
    whole, cut = (
        harness_model.generate_until([request("generate_until", prompt, {"until": until, "max_gen_toks": 64})])[0]
        for until in ([], [":"])
    )
    assert ":" in whole
    assert cut == whole.split(":")[0]


def test_a_context_that_does_not_fit_is_cut_on_its_left(model, tokenizer, harness_model):
    context, continuation = [7 + i % 300 for i in range(600)], [40, 41]
    (score, _), *_ = harness_model._loglikelihood_tokens([(("", ""), context, continuation)])
    kept = context[600 - (model.config.max_position_embeddings - 2) :]
    generator = torch.Generator().manual_seed(torch.initial_seed())
    expected = monte_carlo_log_likelihood(model, [(kept, continuation)], generator=generator)[0]
    assert score == pytest.approx(expected.log_likelihood, abs=1e-4)


def test_bos_and_eos_are_put_where_asked_for_and_once(model, tokenizer):
    lm = MaskedDiffusionLM(
        EMBEDDED_CHECKPOINT, device="cpu", score="confidence", append_eos=True, add_bos_token=True, batch_size=4
    )
    context, continuation = tokenizer.encode("Tom has 3", add_special_tokens=False), tokenizer.encode(" apples")[1:]
    expected = confidence_score(model, [(context, continuation)], append_eos=True, add_bos=True)[0].score
    with_bos = [tokenizer.bos_token_id, *context]
    results = lm._loglikelihood_tokens([(("", ""), ids, continuation) for ids in (context, with_bos)])
    assert [score for score, _ in results] == pytest.approx([expected, expected], abs=1e-4)
    assert lm.loglikelihood([request("loglikelihood", "Tom has 3", " apples")])[0][0] == pytest.approx(
        expected, abs=1e-4
    )
    long = context * 200  # cut on its left, after BOS
    kept = long[len(long) - (lm.max_length - len(continuation) - 2) :]
    for ids in (long, [tokenizer.bos_token_id, *long]):
        assert lm._fit(("", ""), ids, continuation) == ([tokenizer.bos_token_id, *kept], continuation)


def test_an_empty_context_is_the_prefix_token(model, tokenizer, harness_model):
    continuation = tokenizer.encode("Tom", add_special_tokens=False)
    ((score, greedy),) = harness_model.loglikelihood([request("loglikelihood", "", "Tom")])
    pair = ([tokenizer.bos_token_id], continuation)
    assert score == pytest.approx(monte_carlo_log_likelihood(model, [pair])[0].log_likelihood, abs=1e-4)
    assert greedy == is_greedy(model, [pair])[0]


# --- what is refused ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_id": 5}, r"unknown arguments \['mask_id'\]: it takes pretrained, score, num_samples"),
        ({"score": "loss"}, "`score` must be one of 'likelihood', 'confidence', got 'loss'"),
        ({"num_samples": 0}, "`num_samples` must be an integer of at least 1, got 0"),
        ({"sampling": "uniform"}, "`sampling` must be one of 'auto'"),
        ({"guidance_scale": -1.0}, "`guidance_scale` must be a number of at least 0, got -1.0"),
        ({"num_samples": "many"}, "`num_samples` must be an integer of at least 1, got 'many'"),
        ({"guidance_scale": "two"}, "`guidance_scale` must be a number of at least 0, got 'two'"),
        ({"append_eos": "no"}, "`append_eos` must be True or False, got 'no'"),
        ({"check_greedy": 0}, "`check_greedy` must be True or False, got 0"),
        ({"add_bos_token": "yes"}, "`add_bos_token` must be True or False, got 'yes'"),
        ({"softmax_dtype": "float16"}, "`softmax_dtype` has no effect .*got 'float16': scores are taken in fp32"),
        ({"logits_cache": True}, "`logits_cache` has no effect .*got True"),
        ({"batch_size": 0}, "`batch_size` must be a positive integer or 'auto', got 0"),
        ({"batch_size": "eight"}, "`batch_size` must be a positive integer or 'auto', got 'eight'"),
        ({"batch_size": "auto:4"}, "`batch_size` must be a positive integer or 'auto', got 'auto:4'"),
        ({"max_batch_size": 0}, "`max_batch_size` must be an integer of at least 1, got 0"),
        ({"device": "gpu"}, "`device` must be a device of torch's, such as cpu, .*got 'gpu'"),
        ({"device": "cuda:99"}, "`device` must be one that torch finds, got 'cuda:99'"),
        ({"peft": "a", "delta": "b"}, "`peft` and `delta` cannot both be given"),
        ({"backend": "seq2seq"}, "`backend` must be 'causal'.*got 'seq2seq'"),
    ],
)
def test_model_arguments_are_checked_before_anything_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskedDiffusionLM("no/such/checkpoint", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "bfloat16"}, "`dtype` is for loading a checkpoint: `pretrained` is a model that is loaded already"),
        ({"peft": "folder"}, "`peft` is for loading a checkpoint"),
        ({"device": "mps"}, "`device` must be that of the model, cpu, got 'mps'"),
        ({"max_length": 513}, r"`max_length` must be in \[2, 512\], the model's positions, got 513"),
    ],
)
def test_arguments_that_a_loaded_model_would_ignore_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskedDiffusionLM(model, **arguments)


def test_a_checkpoint_that_lacks_weights_is_an_error_naming_them(model, tokenizer, tmp_path):
    """Transformers would initialise them at random and go on."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj.weight"):
        MaskedDiffusionLM(str(tmp_path), device="cpu")


def test_the_embedded_model_is_not_taken_in_silence(caplog):
    MaskedDiffusionLM(device="cpu")
    assert "`pretrained` is not given: the embedded model is evaluated." in caplog.text
    caplog.clear()
    MaskedDiffusionLM(EMBEDDED_MODEL, device="cpu")
    assert "pretrained" not in caplog.text


def test_requests_that_cannot_be_scored_are_refused(harness_model):
    with pytest.raises(ValueError, match="Document 3 of task 'a_task' has an empty continuation"):
        harness_model.loglikelihood([request("loglikelihood", "Tom", "")])
    with pytest.raises(ValueError, match="A continuation of 600 tokens does not fit into the model's 512 positions"):
        harness_model._loglikelihood_tokens([(("", ""), [7], [8] * 600)])
    with pytest.raises(ValueError, match="has no tokens besides those of its context"):
        harness_model._loglikelihood_tokens([(("a", "b"), [7], [])])


@pytest.mark.parametrize(
    ("gen_kwargs", "message"),
    [
        ({"max_gen_toks": 512}, "`max_gen_toks` must be below the model's 512 positions.*got 512 in `gen_kwargs` of"),
        ({"max_gen_toks": -1}, "`max_gen_toks` must be .*not negative, got -1"),
        ({"num_steps": 3}, r"`num_steps` is an unknown argument.*\(Given in `gen_kwargs` of task 'a_task'.\)"),
        ({"block_length": 0}, "`block_length` must be .*got 0.*of task 'a_task'"),
        ({"do_sample": True, "temperature": 0.0}, "`temperature` must be above 0.*0.0.*of task 'a_task'"),
        ({"until": ["x", ""]}, r"`until` must be texts that are not empty, got \['x', ''\] in `gen_kwargs` of task"),
        ({"until": None}, "`until` must be texts"),
        ({"until": ["."], "infill": True}, r"`until` must be empty with `infill`, got \['.'\]"),
        ({"infill": "yes"}, "`infill` must be True or False, got 'yes'"),
        ({"num_return_sequences": 2}, "`num_return_sequences` cannot be set in .*got 2: use `repeats` of the task"),
        ({"stop_strings": ["."]}, "`stop_strings` cannot be set .*: use `until`"),
        ({"max_length": 64}, "`max_length` cannot be set .*: use `max_gen_toks`"),
        ({"return_dict_in_generate": True}, "`return_dict_in_generate` cannot be set"),
    ],
    ids=str,
)
def test_generation_arguments_are_checked_before_work_begins(harness_model, monkeypatch, gen_kwargs, message):
    """The bad ones are the second request's: the first is not begun."""
    monkeypatch.setattr(harness_model.model, "forward", lambda **arguments: pytest.fail("work has begun"))
    requests = [request("generate_until", "Tom", {"max_gen_toks": 8, **extra}) for extra in ({}, gen_kwargs)]
    with pytest.raises(ValueError, match=message):
        harness_model.generate_until(requests)


def test_the_context_is_not_searched_for_a_stop_string(harness_model):
    """One that begins in the context and ends in the answer does not cut it: here the last and the first character."""
    context = "Tom has 3"
    (answer,) = harness_model.generate_until([request("generate_until", context, {"max_gen_toks": 12})])
    until = [context[-1] + answer[0], context[-2:] + answer[:2]]
    assert len(answer) > 2 and not any(text in answer for text in until)
    arguments = {"max_gen_toks": 12, "until": until}
    assert harness_model.generate_until([request("generate_until", context, arguments)]) == [answer]


def test_an_automatic_batch_size_has_a_bound_where_the_command_gives_none(model):
    assert MaskedDiffusionLM(model, batch_size="auto", max_batch_size=None).max_batch_size == 64


# --- the presets and the command ---


@pytest.mark.parametrize(
    ("name", "max_gen_toks", "block_length", "boost"),
    [
        *[(f"base-{task}", 1024, 32, None) for task in ("bbh", "gsm8k", "math", "mbpp")],
        ("base-humaneval", 512, 512, None),
        ("instruct-gsm8k", 2048, 32, (100, 3)),
        ("instruct-humaneval", 2048, 32, (100, 1)),
        ("instruct-math", 4096, 32, (100, 3)),
        ("instruct-mmlu-pro", 4096, 32, (100, 3)),
        ("instruct-mbpp", 2048, 16, (100, 3)),
    ],
)
def test_published_generation_settings(name, max_gen_toks, block_length, boost):
    preset = PRESETS[name]
    settings = dict(preset.gen_kwargs)
    assert settings.pop("max_gen_toks") == max_gen_toks
    config = MaskedDiffusionGenerationConfig(**settings, end_think_token_ids=[7] if boost else None)
    assert config.canvas == "growing"
    assert config.block_length == config.max_denoising_steps == block_length
    assert (config.end_think_boost, config.end_think_power) == (boost or (None, None))
    assert (preset.pretrained, preset.chat) == ((INSTRUCT, True) if boost else (BASE, False))


@pytest.mark.parametrize(
    ("name", "score", "num_fewshot"),
    [
        ("base-arc-challenge", {"score": "confidence"}, 0),
        ("base-hellaswag", {"score": "confidence"}, 0),
        ("base-mmlu", {"score": "likelihood", "num_samples": 1}, 5),
        ("base-cmmlu", {"score": "likelihood", "num_samples": 1}, 5),
    ],
)
def test_published_score_settings(name, score, num_fewshot):
    expected = {**score, "append_eos": True, "add_bos_token": True}
    assert expected.items() <= PRESETS[name].model_args.items()
    assert (PRESETS[name].num_fewshot, PRESETS[name].chat, PRESETS[name].pretrained) == (num_fewshot, False, BASE)


def test_tables_hold_every_preset_once():
    assert sorted(row for rows in TABLES.values() for row in rows) == sorted(PRESETS)
    assert list(select_presets("base")) == TABLES["base"] and len(TABLES["base"]) == 9
    with pytest.raises(ValueError, match="`preset` must be one of base, instruct, tiny, base-mmlu.*got 'gsm8k'"):
        select_presets("gsm8k")


def test_every_preset_names_a_task_of_the_harness():
    names = {preset.tasks for name, preset in PRESETS.items() if not name.startswith("tiny-")}
    declaration = re.compile(rf"^(?:task|group): ({'|'.join(names)})$", re.MULTILINE)
    folder = Path(lm_eval.__file__).parent / "tasks"
    found = set()
    for part in ("arc", "hellaswag", "mmlu", "cmmlu", "bbh", "gsm8k", "mbpp", "humaneval", "mmlu_pro", "benchmarks"):
        found.update(*(declaration.findall(path.read_text()) for path in (folder / part).rglob("*.yaml")))
    assert found == names


def test_the_end_of_thinking_is_tokenised_for_the_model(monkeypatch, harness_model):
    seen = {}
    original = ContinuousBatchingManager.add_request

    def recorded(self, *arguments, **settings):
        seen.update(settings)
        return original(self, *arguments, **settings)

    monkeypatch.setattr(ContinuousBatchingManager, "add_request", recorded)
    harness_model.generate_until(
        [request("generate_until", "Tom", dict(PRESETS["instruct-mbpp"].gen_kwargs, max_gen_toks=9))]
    )
    assert harness_model.tok_decode(seen["end_think_token_ids"]) == "</think>"
    assert seen["max_new_tokens"] == 9
    assert "temperature" not in seen


def test_requests_of_different_settings_and_lengths_share_passes(harness_model, monkeypatch):
    """Static batches would take the sum of their longest rows; rows that come and go, no more than the longest text
    after the two that go before it."""
    forward, passes = harness_model.model.forward, []
    monkeypatch.setattr(harness_model.model, "forward", lambda *a, **k: passes.append(k) or forward(*a, **k))
    settings = [{"max_gen_toks": length, "min_new_tokens": length} for length in (4, 30, 8, 12, 2)]
    requests = [request("generate_until", f"Tom has {index}", kwargs) for index, kwargs in enumerate(settings)]
    harness_model.generate_until(requests)
    assert 30 <= len(passes) <= 32  # 4 rows: the fifth text takes the first that is free


def sampled(lm, names: list[str], doc_ids: list[int], repeats: int = 1, **gen_kwargs) -> dict[int, list[str]]:
    """The samples of each document."""
    kwargs = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 10, **gen_kwargs}
    requests = [
        Instance("generate_until", {}, (f"{names[doc_id]} has", kwargs), idx=0, metadata=("a_task", doc_id, repeats))
        for doc_id in doc_ids
        for _ in range(repeats)
    ]
    texts = iter(lm.generate_until(requests))
    return {doc_id: [next(texts) for _ in range(repeats)] for doc_id in doc_ids}


def test_a_sampled_request_depends_on_nothing_but_the_request(model):
    names = ["Tom", "Ann and Mia", "Ben", "The man that Sue and Tom like"]
    torch.manual_seed(1234)
    alone, many = (MaskedDiffusionLM(model, batch_size=rows) for rows in (1, 4))
    together = sampled(many, names, [0, 1, 2, 3])
    assert sampled(alone, names, [3, 1]) == {doc_id: together[doc_id] for doc_id in (3, 1)}
    twice = sampled(many, names, [2, 0], repeats=2)
    assert all(first != second for first, second in twice.values())
    assert {doc_id: texts[:1] for doc_id, texts in twice.items()} == {doc_id: together[doc_id] for doc_id in (2, 0)}
    assert sampled(many, ["Tom"] * 2, [0, 1])[0] != sampled(many, ["Tom"] * 2, [0, 1])[1]
    seeded = sampled(many, names, [0, 1], seed=7)
    assert seeded != {doc_id: together[doc_id] for doc_id in (0, 1)}
    torch.manual_seed(99)
    assert sampled(many, names, [0, 1]) != {doc_id: together[doc_id] for doc_id in (0, 1)}
    assert sampled(alone, names, [0, 1], seed=7) == seeded


def test_texts_are_kept_as_they_are_finished_and_an_error_is_raised(model, monkeypatch):
    lm, forward, kept, passes = MaskedDiffusionLM(model, batch_size=1), model.forward, [], []

    def failing(*arguments, **settings):
        passes.append(1)
        if len(passes) > 5:
            raise ArithmeticError("the third text's pass")
        return forward(*arguments, **settings)

    requests = [request("generate_until", f"Tom has {word}", {"max_gen_toks": 2}) for word in ("2 2 2", "2 2", "2")]
    monkeypatch.setattr(lm.cache_hook, "add_partial", lambda *arguments: kept.append(arguments))
    texts = lm.generate_until(requests)
    assert kept == [("generate_until", r.args, text) for r, text in zip(requests, texts)]  # the longest go first
    kept.clear()
    monkeypatch.setattr(model, "forward", failing)
    with pytest.raises(ArithmeticError, match="the third text's pass"):
        lm.generate_until(requests)
    assert kept == [("generate_until", r.args, text) for r, text in zip(requests[:2], texts)]


@pytest.fixture
def harness_arguments(monkeypatch):
    runs = []
    monkeypatch.setattr(cli, "run_harness", runs.append)
    return runs


def invoke(*arguments):
    app = typer.Typer()
    app.command(context_settings=cli.CONTEXT_SETTINGS)(cli.evaluate)
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_the_command_hands_presets_and_then_the_users_arguments_to_the_harness(harness_arguments):
    invoke("--batch_size", "8", "--preset", "base-mmlu", "--model_args", "pretrained=here", "-L", "3")
    invoke("--preset", "instruct")
    invoke("--preset", "tiny-chat", "--tasks", "illada_choice")
    invoke("--tasks", "illada_choice")
    first, *table, own_tasks, plain = harness_arguments
    assert first[:4] == ["--model", "illada", "--include_path", str(cli.TASK_FOLDER)]
    assert first[4:-6] == PRESETS["base-mmlu"].arguments()
    assert first[-6:] == ["--batch_size", "8", "--model_args", "pretrained=here", "-L", "3"]
    assert [run[4:] for run in table] == [PRESETS[name].arguments() for name in TABLES["instruct"]]
    assert own_tasks[4:] == [*PRESETS["tiny-chat"].arguments(with_tasks=False), "--tasks", "illada_choice"]
    assert plain[4:] == ["--tasks", "illada_choice"]


def test_the_command_lists_the_presets(harness_arguments):
    lines = invoke("--list-presets").output.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert harness_arguments == []


def test_the_command_refuses_unknown_presets_and_no_arguments(harness_arguments):
    with pytest.raises(ValueError, match="`preset` must be one of .*got 'mmlu'"):
        invoke("--preset", "mmlu")
    with pytest.raises(WrongUsage, match="needs `--preset NAME` or arguments"):
        invoke()
    assert harness_arguments == []


def test_the_command_runs_the_harness_and_names_unknown_tasks(tmp_path, monkeypatch):
    # The harness's own 12,000 task files are not read: that takes longer than the run.
    index = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, **settings: index(self, **{**settings, "include_defaults": False})
    )
    arguments = ["--preset", "tiny-chat", "--device", "cpu", "--limit", "2", "--output_path", str(tmp_path)]
    output = invoke(
        *arguments, "--tasks", "illada_choice", "--model_args", "num_samples=2", "--batch_size", "8"
    ).output
    assert re.search(r"\|illada_choice\|\s*1\|none", output)
    (path,) = tmp_path.rglob("results_*.json")
    results = json.loads(path.read_text())
    assert results["config"]["model_args"] == {
        "pretrained": EMBEDDED_CHECKPOINT,
        "score": "confidence",
        "num_samples": 2,
    }
    with pytest.raises(WrongUsage, match="Tasks not found: illada_poetry"):
        invoke("--tasks", "illada_poetry")
    with pytest.raises(WrongUsage, match="`score` must be one of .*got 'loss'"):
        invoke("--tasks", "illada_choice", "--model_args", "score=loss", "--limit", "1")
    with pytest.raises(WrongUsage, match="`block_length` must be .*got 0.*of task 'illada_reversal'"):
        invoke("--tasks", "illada_reversal", "--gen_kwargs", "block_length=0", "--limit", "1", "--device", "cpu")


def test_the_command_says_what_is_missing_without_the_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(ValueError, match=r"needs lm-eval: pip install 'illada\[eval\]'"):
        invoke("--tasks", "illada_choice")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limt", "2"], "`illada eval` cannot read its arguments: unrecognized arguments: --limt 2 "),
        (["--num_fewshot", "two"], "argument --num_fewshot/-f: invalid int value: 'two'|--num_fewshot.*'two'"),
    ],
)
def test_the_command_refuses_what_the_harness_does_not_know_in_one_sentence(capfd, arguments, message):
    with pytest.raises(WrongUsage, match=message):
        invoke("--preset", "tiny-chat", *arguments)
    assert capfd.readouterr().err == ""


def test_the_command_has_help():
    output = invoke("--help").output
    assert "--preset" in re.sub(r"\x1b\[[0-9;]*m", "", output) and "illada eval --preset" in output


def main(folder: Path):
    """Run by `accelerate launch` in two processes; the first writes the results."""
    generated = []
    original = MaskedDiffusionLM.generate_until

    def recorded(self, requests, **kwargs):
        generated.append(len(requests))
        return original(self, requests, **kwargs)

    MaskedDiffusionLM.generate_until = recorded
    runs = all_runs(batch_size=4)
    counts: list = [None, None]
    torch.distributed.all_gather_object(counts, generated[0])
    if torch.distributed.get_rank() == 0:
        (folder / "runs.json").write_text(json.dumps(runs, default=str))
        (folder / "requests.json").write_text(json.dumps(counts))
    torch.distributed.destroy_process_group()  # Gloo's threads may abort a process that ends before them


if __name__ == "__main__":
    main(Path(sys.argv[1]))
