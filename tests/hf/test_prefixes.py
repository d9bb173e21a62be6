"""The model of `infini-train serve` continues from earlier calls; the tokens are those of `generate` from scratch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from infini_train.hf.prefixes import InfiniWithPrefixes, KeptPrefixes
from infini_train.model import InfiniCache, InfiniForCausalLM
from tests.helpers.exports import SIZES, tiny_export

S = SIZES["segment_length"]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", params=[{"memory": "selective-delta", "sliding_window": 8}, {"output_memory_dim": 4}])
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("prefixes") / "export", **request.param)


@pytest.fixture
def asked(export: Path) -> Callable[..., tuple[Tensor, int]]:
    """Generates from a prompt, compares with a model that keeps nothing, and counts the prompt's tokens read."""
    InfiniWithPrefixes.prefixes = KeptPrefixes(4)
    plain, kept = (c.from_pretrained(export).eval() for c in (InfiniForCausalLM, InfiniWithPrefixes))
    read = []
    kept.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape[1]))

    def ask(prompt: Tensor, **options: int) -> tuple[Tensor, int]:
        read.clear()
        config = GenerationConfig(**GREEDY | options)
        found = kept.generate(prompt, generation_config=config, attention_mask=torch.ones_like(prompt))
        torch.testing.assert_close(found, plain.generate(prompt, generation_config=config))
        return found, sum(read) - (config.max_new_tokens - 1)

    return ask


def tokens(count: int, seed: int) -> Tensor:
    return torch.randint(3, 288, (1, count), generator=torch.Generator().manual_seed(seed))


def test_the_next_turn_reads_what_is_new(asked: Callable[..., tuple[Tensor, int]]) -> None:
    first, read = asked(tokens(3 * S + 2, 0))
    assert read == 3 * S + 2
    other, _ = asked(tokens(2 * S, 1))  # a conversation between the turns
    second, read = asked(torch.cat((first, tokens(7, 2)), dim=1))
    assert read == 1 + 7  # the last token of an answer was never read
    _, read = asked(torch.cat((second, tokens(3 * S, 3)), dim=1))
    assert read == 1 + 3 * S
    _, read = asked(torch.cat((other, tokens(1, 4)), dim=1))
    assert read == 2 * S + 6, "four are kept, which are of the other conversation now"


def test_an_answer_with_other_tokens_and_the_same_prompt_again(asked: Callable[..., tuple[Tensor, int]]) -> None:
    prompt = tokens(2 * S + 3, 0)
    asked(prompt)
    _, read = asked(torch.cat((prompt, tokens(6, 1)), dim=1))
    assert read == 3 + 6  # from the last whole segment of the prompt
    assert asked(prompt)[1] == 3
    assert asked(prompt[:, :S])[1] == S, "no token of a cache can be forgotten"
    assert asked(torch.cat((prompt, prompt)), num_beams=1)[1] == 2 * S + 3, "rows of a batch are read"
    assert asked(tokens(S, 5), num_beams=2)[0].shape == (1, S + 5)


def test_the_number_of_kept_prefixes() -> None:
    kept, caches = KeptPrefixes(2), [object() for _ in range(4)]
    ids = [torch.tensor(x) for x in ([1], [1, 2], [3], [3, 4])]
    for some, cache in zip(ids[:2], caches, strict=False):
        kept.keep(some, cache)  # type: ignore[arg-type]
    assert [len(some) for some, _ in kept._kept] == [1, 2]
    assert kept.longest(ids[0]) is None  # it has no further token
    assert kept.longest(ids[1]) is not None  # continues [1], which is used last now
    kept.keep(ids[2], caches[2])  # type: ignore[arg-type]
    assert [some.tolist() for some, _ in kept._kept] == [[1], [3]]
    kept.keep(ids[2], caches[3])  # type: ignore[arg-type]
    assert len(kept._kept) == 2 and kept._kept[-1][1] is caches[3]
    none = KeptPrefixes(0)
    none.keep(ids[0], InfiniCache.__new__(InfiniCache))
    assert none.longest(ids[1]) is None
