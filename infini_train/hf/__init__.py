"""Importing this package registers Infini models with transformers' Auto classes, so that no remote code is run.

What `save_pretrained` then writes holds the code of model and tokenizer, so that others can load it as remote code.
PEFT, where it is installed, puts adapters on the same layers by default as in a Llama, whose names they have.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.utils.import_utils import is_peft_available

from infini_train.model import (
    InfiniConfig,
    InfiniForCausalLM,
    InfiniForSequenceClassification,
    InfiniForTokenClassification,
    InfiniModel,
)
from infini_train.tokenizer.tokenization_sentencepiece import SentencePieceTextTokenizer

AutoConfig.register(InfiniConfig.model_type, InfiniConfig, exist_ok=True)
AutoModel.register(InfiniConfig, InfiniModel, exist_ok=True)
AutoModelForCausalLM.register(InfiniConfig, InfiniForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(InfiniConfig, InfiniForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(InfiniConfig, InfiniForTokenClassification, exist_ok=True)
# Only exports whose tokenizer runs sentencepiece itself name this class; the others use a class of transformers.
AutoTokenizer.register(InfiniConfig, slow_tokenizer_class=SentencePieceTextTokenizer, exist_ok=True)

# `save_pretrained` copies the code of classes that are registered in this way.
InfiniConfig.register_for_auto_class()
InfiniModel.register_for_auto_class("AutoModel")
InfiniForCausalLM.register_for_auto_class("AutoModelForCausalLM")
InfiniForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
InfiniForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
SentencePieceTextTokenizer.register_for_auto_class()

if is_peft_available():
    from peft.utils import constants

    for targets in list(vars(constants).values()):  # one mapping from model types to layers for each kind of adapter
        if isinstance(targets, dict) and "llama" in targets:
            targets.setdefault(InfiniConfig.model_type, targets["llama"])
