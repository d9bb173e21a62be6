"""The Hugging Face plugin: importing it lets transformers' Auto classes load Infini models without remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from infini_train.model import InfiniConfig, InfiniForCausalLM, InfiniModel

AutoConfig.register(InfiniConfig.model_type, InfiniConfig, exist_ok=True)
AutoModel.register(InfiniConfig, InfiniModel, exist_ok=True)
AutoModelForCausalLM.register(InfiniConfig, InfiniForCausalLM, exist_ok=True)
