import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the Hub
if "PYTEST_XDIST_WORKER" in os.environ:  # there is a worker for each core: one thread each, and in what they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"


def pytest_report_header(config: pytest.Config) -> str | None:
    if config.option.markexpr == "not slow and not by_hand":
        return "left out: `pytest -m slow` (as in .ci/run), and full counts, `pytest -m by_hand`"


@pytest.fixture(autouse=True)
def standard_logging():
    """The command silences Transformers and the Hub for its process, which here is that of all tests."""
    yield
    import huggingface_hub
    from transformers.utils import logging

    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_warning()


@pytest.fixture
def golden_illada() -> Path:
    """Outputs of the released code on a tiny random checkpoint in the iLLaDA release's on-disk form."""
    return FIXTURES / "illada"


@pytest.fixture(scope="session")
def embedded_model():
    """The package's own model, in fp32, loaded once: only to be read."""
    from transformers import AutoModelForCausalLM

    from illada import EMBEDDED_MODEL

    return AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)


@pytest.fixture(scope="session")
def embedded_tokenizer():
    """Its tokenizer: only to be read."""
    from transformers import AutoTokenizer

    from illada import EMBEDDED_MODEL

    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture
def tiny_config():
    from illada import ILLaDAConfig

    return ILLaDAConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
    )


@pytest.fixture
def tiny_model(tiny_config):
    from illada import ILLaDAForCausalLM

    torch.manual_seed(0)
    return ILLaDAForCausalLM(tiny_config).eval()
