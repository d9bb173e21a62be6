"""What `generate` asks a model for before it begins: a cache of the right kind, and pieces of a long prompt."""

from transformers import GenerationMixin

from .cache import InfiniCache
from .configuration import InfiniConfig

PREFILL = 8192  # number of tokens of a prompt that `generate` reads at once; at least one segment


class InfiniGenerationMixin(GenerationMixin):
    """`generate` with an InfiniCache. transformers recognises a model that generates by the end of this name."""

    config: InfiniConfig

    def _prepare_generation_config(self, generation_config, **kwargs):
        """Called by `generate`: refuse other caches, also "hybrid", which transformers would drop without a word."""
        for source in (kwargs, vars(generation_config or self.generation_config)):
            if (kind := source.get("cache_implementation")) is not None:
                raise ValueError(f"cache_implementation: found {kind!r}, expected none: the cache is InfiniCache")
        return super()._prepare_generation_config(generation_config, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args, **kwargs):
        """Called by `generate_batch`, whose cache of pages holds keys and values alone."""
        raise ValueError("continuous batching: found an Infini model, expected one without a memory; use `generate`")

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args) -> None:  # type: ignore[override]
        """Called by `generate`, whose default caches would hold every key. It adds tokens after the last column of
        `attention_mask`, which has the columns of the cache and those that follow."""
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        if mask is not None and mask.dim() == 2 and not mask[:, -1].all():
            raise ValueError(
                "attention_mask: found padding at the end of a row, expected it at the start (without a mask, tokens "
                "that are pad_token_id count as padding)"
            )
        # `generate` drops a mask without padding, but keeps its length.
        columns = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        if isinstance(cache, InfiniCache) and columns is not None and cache.get_seq_length() >= columns:
            raise ValueError(
                f"past_key_values: found a cache of {cache.get_seq_length()} tokens and a sequence of {columns}, "
                "expected all that is in the cache and at least one token more: a cache cannot forget any, but a "
                "copy of an earlier one serves"
            )
        if generation_config.use_cache is False:
            return
        if cache is None:
            model_kwargs["past_key_values"] = InfiniCache(self.config)
        # Read a long prompt in pieces, so that it takes no more memory than PREFILL tokens.
        if generation_config.prefill_chunk_size is None and model_kwargs.get("inputs_embeds") is None:
            size = self.config.segment_length
            generation_config.prefill_chunk_size = max(PREFILL // size, 1) * size

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs) -> None:  # type: ignore[override]
        """Called by `generate`: positions are counted from the mask and the cache, so it need not pass any."""
