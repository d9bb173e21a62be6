"""Models that score rows or tokens, as transformers' Auto classes make them: the decoder and a linear map."""

from torch import nn
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from .configuration import InfiniConfig
from .decoder import InfiniModel, InfiniPreTrainedModel


class InfiniForSequenceClassification(GenericForSequenceClassification, InfiniPreTrainedModel):
    """A score of each row, from its last token, as of a reward model; `config.num_labels` outputs.

    Rows of a batch are padded with `config.pad_token_id`, as in transformers' other models of this kind.
    """

    def __init__(self, config: InfiniConfig):
        # That of the generic class finds the decoder by AutoModel, which does not know remote code.
        InfiniPreTrainedModel.__init__(self, config)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self.model = InfiniModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class InfiniForTokenClassification(GenericForTokenClassification, InfiniPreTrainedModel):
    """Scores of every token; `config.num_labels` outputs."""

    def __init__(self, config: InfiniConfig):
        InfiniPreTrainedModel.__init__(self, config)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self.model = InfiniModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()
