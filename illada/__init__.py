"""iLLaDA and LLaDA, masked diffusion language models, as Transformers models.

Importing the package registers its classes with the Auto classes, so that released checkpoints load with
`from_pretrained` and without `trust_remote_code`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForMultimodalLM

from .configuration_illada import ILLaDAConfig
from .configuration_llada import LLaDAConfig
from .denoising import DenoisingStep
from .evaluation import decide
from .frozen_cache import FrozenCache
from .generation import MaskedDiffusionGenerationMixin, MaskedDiffusionGenerationOutput
from .generation_config import MaskedDiffusionGenerationConfig
from .modeling_illada import ILLaDAForCausalLM, ILLaDAModel, ILLaDAPreTrainedModel, masked_diffusion_loss
from .modeling_llada import LLaDAModelLM
from .revision import RevisionOutput
from .tiny import EMBEDDED_MODEL

__version__ = "0.1.0"

# The release's `AutoModel` has logits, and `transformers serve` loads the multimodal class.
for _config_class, _model_class in ((ILLaDAConfig, ILLaDAForCausalLM), (LLaDAConfig, LLaDAModelLM)):
    AutoConfig.register(_config_class.model_type, _config_class)
    for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForMultimodalLM):
        _auto_class.register(_config_class, _model_class)

__all__ = [
    "EMBEDDED_MODEL",
    "DenoisingStep",
    "FrozenCache",
    "ILLaDAConfig",
    "ILLaDAForCausalLM",
    "ILLaDAModel",
    "ILLaDAPreTrainedModel",
    "LLaDAConfig",
    "LLaDAModelLM",
    "MaskedDiffusionGenerationConfig",
    "MaskedDiffusionGenerationMixin",
    "MaskedDiffusionGenerationOutput",
    "RevisionOutput",
    "decide",
    "masked_diffusion_loss",
]
