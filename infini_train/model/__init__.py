"""The decoder. Its files need torch and transformers only, because they travel in every export."""

from infini_train.model.cache import InfiniCache
from infini_train.model.classification import InfiniForSequenceClassification, InfiniForTokenClassification
from infini_train.model.configuration import InfiniConfig
from infini_train.model.decoder import InfiniModel
from infini_train.model.modeling import InfiniForCausalLM

__all__ = [
    "InfiniCache",
    "InfiniConfig",
    "InfiniForCausalLM",
    "InfiniForSequenceClassification",
    "InfiniForTokenClassification",
    "InfiniModel",
]
