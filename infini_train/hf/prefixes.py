"""Lets a server continue from earlier requests: a prompt that begins with an earlier one is not read again."""

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig

from infini_train.model import InfiniCache, InfiniForCausalLM
from infini_train.model.generation import PREFILL


class KeptPrefixes:
    """The caches after the token sequences that were used last.

    A cache takes constant memory, whatever the number of its tokens, but it cannot forget any of them. It therefore
    serves those prompts only that begin with all of its tokens.

    Args:
        limit: number of sequences; the one that was not used for the longest time is dropped first.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._kept: list[tuple[Tensor, InfiniCache]] = []  # the one used last is at the end

    def longest(self, ids_T: Tensor) -> InfiniCache | None:
        """Return a copy of the cache after the longest kept sequence that the prompt `ids_T` continues, if any."""
        fitting = [i for i, (tokens, _) in enumerate(self._kept) if _continues(ids_T, tokens)]
        if not fitting:
            return None
        used = self._kept.pop(max(fitting, key=lambda i: len(self._kept[i][0])))
        self._kept.append(used)
        return copy.deepcopy(used[1])

    def keep(self, tokens_T: Tensor, cache: InfiniCache) -> None:
        """Keep `cache`, which nobody may change any more, after exactly the tokens `tokens_T`."""
        self._kept = [kept for kept in self._kept if not torch.equal(kept[0], tokens_T)]
        self._kept.append((tokens_T, cache))
        del self._kept[: -self._limit or None]


def _continues(ids_T: Tensor, tokens_T: Tensor) -> bool:
    """Whether `ids_T` is `tokens_T` and at least one more token."""
    return len(ids_T) > len(tokens_T) and torch.equal(ids_T[: len(tokens_T)], tokens_T)


class InfiniWithPrefixes(InfiniForCausalLM):
    """The language model, whose `generate` continues from the caches of earlier calls.

    Two caches of a call are kept. One is that after the prompt and the answer, with which the next turn of a
    conversation begins. The answer may have other tokens when a client sends it back as text; then the other cache
    serves, that at the end of the prompt's last whole segment.
    """

    prefixes: ClassVar[KeptPrefixes] = KeptPrefixes(0)

    @torch.no_grad()
    def generate(  # type: ignore[override]  # the arguments that the server passes
        self, input_ids: Tensor, generation_config: GenerationConfig, **options: Any
    ) -> Any:
        """Generate as every model does; see InfiniForCausalLM. Several rows or beams begin with an empty cache.

        A configuration with a temperature other than 0, or with top_p, samples: the server sets these as a request
        asks for them, but leaves `do_sample` as in the export, where it is false, so that they would change nothing.
        """
        generate: Any = super().generate  # type: ignore[misc]  # transformers types `self` by a protocol of its own
        asked = copy.copy(generation_config)
        if asked.temperature != 0 and not (asked.temperature is None and asked.top_p is None):
            asked.do_sample = True
        several = max(len(input_ids), asked.num_beams or 1, asked.num_return_sequences or 1) > 1
        if several or asked.use_cache is False:
            return generate(input_ids=input_ids, generation_config=asked, **options)
        ids_T, size = input_ids[0].cpu(), self.config.segment_length
        cache = self.prefixes.longest(ids_T)
        if cache is None:
            cache = InfiniCache(self.config)
        whole = (len(ids_T) - 1) // size * size  # `generate` needs a token to read
        if whole > (known := cache.get_seq_length()):
            for part_1T in input_ids[:, known:whole].split(max(PREFILL // size, 1) * size, dim=1):
                self(part_1T, past_key_values=cache, logits_to_keep=1)
            self.prefixes.keep(ids_T[:whole], copy.deepcopy(cache))
        made = generate(input_ids=input_ids, generation_config=asked, past_key_values=cache, **options)
        tokens_BT = made if isinstance(made, Tensor) else made.sequences
        self.prefixes.keep(tokens_BT[0, : cache.get_seq_length()].cpu(), cache)
        return made
