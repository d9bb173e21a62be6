"""The decoder: torch and transformers' base classes only (DESIGN section 2)."""

from infini_train.model.cache import InfiniCache
from infini_train.model.configuration import InfiniConfig
from infini_train.model.modeling import InfiniForCausalLM, InfiniModel

__all__ = ["InfiniCache", "InfiniConfig", "InfiniForCausalLM", "InfiniModel"]
