"""The Hugging Face plugin: importing it lets transformers' Auto classes load Infini models without remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from infini_train.model import InfiniConfig, InfiniForCausalLM, InfiniModel
from infini_train.tokenizer.tokenization_sentencepiece import SentencePieceTextTokenizer

AutoConfig.register(InfiniConfig.model_type, InfiniConfig, exist_ok=True)
AutoModel.register(InfiniConfig, InfiniModel, exist_ok=True)
AutoModelForCausalLM.register(InfiniConfig, InfiniForCausalLM, exist_ok=True)
# Only exports whose tokenizer needs sentencepiece itself name this class; others are transformers' own.
AutoTokenizer.register(InfiniConfig, slow_tokenizer_class=SentencePieceTextTokenizer, exist_ok=True)
