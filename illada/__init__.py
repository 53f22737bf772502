from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForMultimodalLM

from .configuration_illada import ILLaDAConfig
from .modeling_illada import ILLaDAForCausalLM, ILLaDAModel, ILLaDAPreTrainedModel

AutoConfig.register("illada", ILLaDAConfig)
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForMultimodalLM):
    auto_class.register(ILLaDAConfig, ILLaDAForCausalLM)
