"""Transformers' own common tests of models, run on the classes of this package.

They are part of the source distribution of the installed Transformers, which `pip download` fetches. `.ci/run` runs
them (`pytest tests/outside_judge.py`); plain `pytest` does not collect this file, since it needs the network.
"""

import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers

from illada import ILLaDAConfig, ILLaDAForCausalLM, ILLaDAModel, LLaDAModelLM


def fetch_tests(folder: Path) -> Path:
    """The folder `tests` of the installed version's source distribution; skips, and says why, where pip has none."""
    requirement = f"transformers=={transformers.__version__}"
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=transformers"]
    result = subprocess.run([*download, "--dest", folder, requirement], capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip() or "no message").splitlines()[-1]
        pytest.skip(f"pip finds no source distribution of {requirement}: {reason}", allow_module_level=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("*/tests"))


def common_model_tests(tests: Path) -> type:
    """The class of the common tests. What they import on generation and export is not in the distribution."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(tests)]
    sys.modules[package.__name__] = package
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        absent = types.ModuleType(f"{package.__name__}.{name}")
        setattr(absent, mixin, type(mixin, (), {}))
        sys.modules[absent.__name__] = absent
    return import_module(f"{package.__name__}.test_modeling_common").ModelTesterMixin


FOLDER = tempfile.TemporaryDirectory(prefix="transformers-source-")  # deleted when the process ends
ModelTesterMixin = common_model_tests(fetch_tests(Path(FOLDER.name)))


class SmallModels:
    """What the common tests ask of a model's own tests: a small configuration, and inputs for it."""

    batch_size, seq_length = 3, 7
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, config_class: type[ILLaDAConfig], is_training: bool):
        self.config_class, self.is_training = config_class, is_training

    def get_config(self) -> ILLaDAConfig:
        return self.config_class(
            vocab_size=99,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=1,
            eos_token_id=2,
            mask_token_id=5,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[ILLaDAConfig, dict[str, torch.Tensor]]:
        input_ids = torch.randint(6, 99, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class CommonTests(ModelTesterMixin):
    all_generative_model_classes = ()  # their tests are not in the distribution

    def setUp(self):
        (model_class,) = self.all_model_classes
        self.model_tester = SmallModels(model_class.config_class, is_training=hasattr(model_class, "generate"))

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and self.model_tester.is_training:
            inputs["labels"] = inputs["input_ids"]  # the mixin goes by the names of Transformers' own classes
        return inputs


class ILLaDAForCausalLMTest(CommonTests, unittest.TestCase):
    all_model_classes = (ILLaDAForCausalLM,)


class ILLaDAModelTest(CommonTests, unittest.TestCase):
    all_model_classes = (ILLaDAModel,)


class LLaDAModelLMTest(CommonTests, unittest.TestCase):
    all_model_classes = (LLaDAModelLM,)
