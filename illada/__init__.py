from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForMultimodalLM

from .configuration_illada import ILLaDAConfig
from .configuration_llada import LLaDAConfig
from .modeling_illada import ILLaDAForCausalLM, ILLaDAModel, ILLaDAPreTrainedModel
from .modeling_llada import LLaDAModelLM

for config_class, model_class in ((ILLaDAConfig, ILLaDAForCausalLM), (LLaDAConfig, LLaDAModelLM)):
    AutoConfig.register(config_class.model_type, config_class)
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForMultimodalLM):
        auto_class.register(config_class, model_class)
