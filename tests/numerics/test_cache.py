"""Generation with a cache of constant size, against the reference loop and against recomputation without a cache."""

import copy
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from infini_train.model import InfiniCache, InfiniConfig, InfiniForCausalLM, configuration, generation
from infini_train.model.memory_rule import MemoryRule
from infini_train.model.rules import RULES
from tests.helpers.models import MODELS, VOCAB, S, build
from tests.helpers.reference import document_logits

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Output memories are written twice in a segment."""
    monkeypatch.setattr(configuration, "OUTPUT_CHUNK", S // 2)


@pytest.fixture(params=[model for model in MODELS if model[1] in (None, 9, S)], ids=str)
def model(request):
    memory, sliding = request.param
    return build(memory, sliding_window=sliding).eval()


def left_padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, T] and mask [B, T]; padding holds token 7, so that taking it for text shows."""
    length = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), length), 7), torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :], mask[row, length - len(prompt) :] = prompt, 1
    return ids, mask


def prompts(*lengths: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(VOCAB, (n,)) for n in lengths]


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 8))])
def test_any_cuts_and_any_padding_equal_the_loop(model, seed):
    """Rows of unequal length in calls of any width, padding anywhere in them: each row is as if alone."""
    draw = random.Random(seed)
    texts = prompts(*(draw.randint(1, 5 * S) for _ in range(3)))
    left, cache, logits, columns = [len(t) for t in texts], InfiniCache(model.config), [[], [], []], []
    while any(left):
        width = draw.choice([1, 1, 2, S - 1, S, 3 * S])
        mask = torch.zeros(3, width, dtype=torch.long)
        for row in range(3):
            # Tokens of this call, spread over its columns; alike in all rows for some of the calls.
            count = min(left[row], width if draw.random() < 0.5 else draw.randint(0, width))
            mask[row, sorted(draw.sample(range(width), count))] = 1
        ids = torch.full((3, width), 7)
        for row in range(3):
            done = len(texts[row]) - left[row]
            count = int(mask[row].sum())
            ids[row, mask[row].bool()] = texts[row][done : done + count]
            left[row] -= count
        columns.append(mask)
        with torch.set_grad_enabled(seed % 2 == 0):  # without gradients, single tokens are appended in place
            out = model(ids, attention_mask=torch.cat(columns, 1), past_key_values=cache)
        assert out.past_key_values is cache
        for row in range(3):
            logits[row].append(out.logits[row, mask[row].bool()])
    assert cache.get_seq_length() == sum(mask.shape[1] for mask in columns)
    for row, text in enumerate(texts):
        torch.testing.assert_close(torch.cat(logits[row]), document_logits(model, text), rtol=1e-9, atol=1e-9)


def test_padding_without_a_cache(model):
    texts = prompts(2, 3 * S + 1, S)
    ids, mask = left_padded(texts)
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    flipped = model(ids.flip(0), attention_mask=mask.flip(0)).logits.flip(0)
    for row, text in enumerate(texts):
        expected = document_logits(model, text)
        torch.testing.assert_close(logits[row, -len(text) :], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(flipped[row, -len(text) :], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(m, marks=[] if m in (MODELS[0], MODELS[-1]) else pytest.mark.slow)
        for m in MODELS
        if m[1] in (None, 9, S)
    ],
    indirect=True,
    ids=str,
)
def test_greedy_over_many_segments(model):
    """300 tokens, 50 segment boundaries, prompts of unequal length padded on the left: each as if alone."""
    texts = prompts(1, 4 * S + 2, S, 2 * S - 1)
    ids, mask = left_padded(texts)
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=300, **GREEDY)
    for row, text in enumerate(texts):
        alone = text[None]
        with torch.no_grad():
            for _ in range(300):  # recomputed from the start for every token
                alone = torch.cat((alone, model(alone, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
        assert torch.equal(batch[row, ids.shape[1] :], alone[0, len(text) :])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 1.5},
        {"repetition_penalty": 1.3, "eos_token_id": 3},
    ],
    ids=str,
)
def test_modes_equal_recomputation(model, options):
    ids, mask = left_padded(prompts(3, 2 * S + 1))
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        options = {**GREEDY, **options}
        results.append(model.generate(ids, attention_mask=mask, max_new_tokens=5 * S, use_cache=use_cache, **options))
    assert torch.equal(*results)


def test_streamer_and_scores(model):
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer, (text,) = Collect(), prompts(S + 2)
    out = model.generate(
        text[None],
        max_new_tokens=2 * S,
        streamer=streamer,
        return_dict_in_generate=True,
        output_logits=True,
        output_hidden_states=True,
        **GREEDY,
    )
    assert streamer.ended and streamer.tokens == out.sequences[0].tolist()
    expected = document_logits(model, out.sequences[0])[len(text) - 1 : -1]
    torch.testing.assert_close(torch.cat(out.logits), expected.float(), rtol=1e-5, atol=1e-5)
    assert isinstance(out.past_key_values, InfiniCache)
    assert [len(states) for states in out.hidden_states] == [model.config.num_hidden_layers + 1] * 2 * S
    if model.lm_head.memory is None:
        torch.testing.assert_close(model.lm_head(out.hidden_states[-1][-1])[:, -1].float(), out.logits[-1])


def test_long_prompts_are_read_in_pieces(model):
    widths, forward = [], model.model.forward
    ids, mask = left_padded(prompts(7 * S + 3, 5 * S))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "PREFILL", 2 * S + 1)
        patch.setattr(
            model.model, "forward", lambda *a, **k: widths.append(k["input_ids"].shape[1]) or forward(*a, **k)
        )
        pieces = model.generate(ids, attention_mask=mask, max_new_tokens=S, **GREEDY)
    assert widths == [2 * S, 2 * S, 2 * S, S + 3] + [1] * (S - 1)
    assert torch.equal(pieces, model.generate(ids, attention_mask=mask, max_new_tokens=S, use_cache=False, **GREEDY))


def test_another_turn_and_a_shared_prefix(model):
    """A cache goes on where it stopped; a copy of it serves another continuation."""
    (text,) = prompts(3 * S + 2)
    cache = InfiniCache(model.config)
    model.generate(text[None, : 2 * S + 3], past_key_values=cache, max_new_tokens=1, **GREEDY)
    for _ in range(2):
        own = copy.deepcopy(cache)
        out = model.generate(text[None], past_key_values=own, max_new_tokens=S, **GREEDY)
        assert torch.equal(out, model.generate(text[None], max_new_tokens=S, use_cache=False, **GREEDY))
    made = out[:, :-1]  # the last token was never read
    for again in (made, made[:, :-3]):  # as for another answer to the same prompt
        with pytest.raises(ValueError, match=f"found a cache of {made.shape[1]} tokens and a sequence of"):
            model.generate(again, past_key_values=own, max_new_tokens=1, **GREEDY)
    only_new = torch.stack(prompts(5))
    known = torch.ones(1, made.shape[1] + 5, dtype=torch.long)
    found = model.generate(only_new, attention_mask=known, past_key_values=own, max_new_tokens=S, **GREEDY)
    expected = model.generate(torch.cat((made, only_new), 1), max_new_tokens=S, use_cache=False, **GREEDY)
    assert torch.equal(found[0, 5:], expected[0, made.shape[1] + 5 :])
    cache.reset()
    again = model.generate(text[None], past_key_values=cache, max_new_tokens=S, **GREEDY)
    assert torch.equal(again, out)


def test_constant_size_and_what_it_holds(model):
    """The memory of a padded row is that of the row alone; the cache of 30 segments is no larger than that of 3."""

    def numbers(cache):
        return sum(x.numel() for layer in cache.layers for x in (layer.keys, layer.values, *layer.memory.values()))

    def storage(cache):
        return sum(
            x.untyped_storage().nbytes() // x.element_size()
            for layer in cache.layers
            for x in (layer.keys, layer.values)
        )

    short, long = (model(p[None], use_cache=True).past_key_values for p in prompts(3 * S + 2, 30 * S + 2))
    assert numbers(short) == numbers(long)
    assert storage(short) == storage(long)

    texts = prompts(3 * S + 2, S + 1)
    ids, mask = left_padded(texts)
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    for row, text in enumerate(texts):
        whole = len(text) // S * S
        alone = model(text[None, :whole], use_cache=False).memory
        for layer, state in zip(cache.layers, alone, strict=True):
            for name, value in state.items():
                torch.testing.assert_close(layer.memory[name][row], value[0], rtol=1e-9, atol=1e-9)


def test_tokens_are_appended_in_place(model):
    """Token by token, without and with gradients and in inference mode in turn; a copy goes its own way."""
    (text,), cache, logits, last, in_place = prompts(4 * S), InfiniCache(model.config), [], None, 0
    modes = [
        torch.no_grad,
        torch.no_grad,
        torch.inference_mode,
        torch.inference_mode,
        torch.no_grad,
        torch.enable_grad,
    ]
    for t, token in enumerate(text):
        if t == 4:  # later a graph is part of the memory
            model(torch.tensor([[7]]), past_key_values=copy.deepcopy(cache))
        with modes[t % len(modes)]():
            logits.append(model(token.view(1, 1), past_key_values=cache).logits[0].detach().clone())
        local = cache.layers[1].local
        in_place += bool(local and last and local[0].all().data_ptr() == last[0].all().data_ptr())
        last = local
    torch.testing.assert_close(torch.cat(logits), document_logits(model, text), rtol=1e-9, atol=1e-9)
    assert in_place >= 4


def test_a_rule_that_overrides_append_equals_the_default(model, monkeypatch):
    """Token by token over several segments, in two rows; under autocast it is as far from float32 as the default."""
    texts = torch.stack(prompts(3 * S, 3 * S))

    def logits(model, autocast: bool) -> torch.Tensor:
        cache, found = InfiniCache(model.config), []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for token in texts.split(1, dim=1):
                found.append(model(token, past_key_values=cache).logits)
        return torch.cat(found, dim=1)

    rounded = copy.deepcopy(model).float()
    own, own_rounded = logits(model, False), logits(rounded, True)
    calls = []
    monkeypatch.setattr(
        RULES[model.config.memory], "append", lambda rule, *a: calls.append(1) or MemoryRule.append(rule, *a)
    )
    torch.testing.assert_close(own, logits(model, False), rtol=1e-9, atol=1e-9)
    assert (own_rounded - own).norm() < 1.5 * (logits(rounded, True) - own).norm()
    assert len(calls) == 2 * 2 * 3 * (S - 2)  # not the first and the last token of a segment


def test_rows_of_which_one_has_a_segment_before():
    """The rows have as many tokens in their segment, but do not see as many."""
    model = build("selective-delta", sliding_window=9).eval()
    texts = prompts(2, S + 2)
    ids, mask = left_padded(texts)
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        for token in prompts(2 * S)[0]:
            texts = [torch.cat((text, token[None])) for text in texts]
            logits = model(token.repeat(2, 1), past_key_values=cache).logits[:, -1]
            expected = torch.stack([document_logits(model, text)[-1] for text in texts])
            torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sliding", [None, 32])
@pytest.mark.parametrize(("memory", "more"), [("paper-linear", 0), ("paper-delta", 0), ("selective-delta", 19)])
def test_operators_of_a_new_token(memory, more, sliding):
    """A layer runs no more of them for a new token than Llama's, and selective-delta these for its convolution, norms
    and gates."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2}

    def of_a_layer(build_model, make_cache) -> int:
        counts = []
        for layers in (1, 2):
            model = build_model(layers).eval()
            cache, ids = make_cache(model.config), torch.zeros(1, 50, dtype=torch.long)
            with torch.no_grad():
                for _ in range(3):  # the first token of a segment prepares what the others share
                    model(ids, past_key_values=cache)
                    ids = ids[:, :1]
                with Operators() as operators:
                    model(ids, past_key_values=cache)
            counts.append(operators.count)
        return counts[1] - counts[0]

    def infini(layers: int) -> InfiniForCausalLM:
        options = {"segment_length": 32, "memory": memory, "sliding_window": sliding}
        return InfiniForCausalLM(InfiniConfig(**sizes, **options, num_hidden_layers=layers))

    def llama(layers: int) -> LlamaForCausalLM:
        return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers))

    allowed = of_a_layer(llama, lambda config: DynamicCache(config=config)) + more
    assert of_a_layer(infini, InfiniCache) <= allowed


def test_half_precision_keeps_the_memory_in_float32():
    model = build("paper-linear", torch.bfloat16).eval()
    cache = model(torch.stack(prompts(2 * S + 1)), use_cache=True).past_key_values
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert {x.dtype for x in cache.layers[0].memory.values()} == {torch.float32}


def test_tuple_output_and_logits_to_keep(model):
    ids = torch.stack(prompts(S + 2))
    full = model(ids).logits
    logits, cache = model(ids, return_dict=False, logits_to_keep=2)[:2]
    assert isinstance(cache, InfiniCache)
    torch.testing.assert_close(logits, full[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, full[:, [0, 4]])
    nothing = torch.empty(0, dtype=torch.long)  # a window of an evaluation in which nothing is asked
    assert model(ids, logits_to_keep=nothing).logits.shape == (*full[:, :0].shape[:2], full.shape[-1])


def test_training_mode_makes_no_cache(model):
    assert model.train()(torch.stack(prompts(S))).past_key_values is None


def test_what_is_refused(model):
    ids = torch.stack(prompts(4, 4))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="found DynamicCache, expected InfiniCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="found a cache of 2 rows, expected 1"):
        model(ids[:1], past_key_values=cache)
    for options in ({"num_hidden_layers": 1}, {"segment_length": 2 * S}):
        other = InfiniConfig.from_dict({**model.config.to_dict(), **options})
        with pytest.raises(ValueError, match=r"found a cache whose layers are written after .*, as of another model"):
            model(ids, past_key_values=InfiniCache(other))
    with pytest.raises(ValueError, match=r"attention_mask: found shape \(2, 3\), expected \(2, 4\)"):
        model(ids, attention_mask=torch.ones(2, 3))
    # Of a client that lost the cache, or whose cache is not the one that it thinks.
    with pytest.raises(ValueError, match=r"found shape \(2, 9\), expected \(2, 1\) without a cache of earlier calls"):
        model(ids[:, :1], attention_mask=torch.ones(2, 9))
    with pytest.raises(ValueError, match=r"found shape \(2, 9\), expected \(2, 1\), or 4 more columns"):
        model(ids[:, :1], attention_mask=torch.ones(2, 9), past_key_values=cache)
    with pytest.raises(ValueError, match="one token, no past_key_values and the unknown arguments paged"):
        model(ids[:, :1], use_cache=False, paged=object())  # as of a server that keeps keys and values itself
    model(ids[:, :1], use_cache=False, output_hidden_states=True, num_items_in_batch=4)
    with pytest.raises(ValueError, match="starts and memory"):
        model(ids, past_key_values=cache, starts=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="cache_implementation: found 'static'"):
        model.generate(ids, cache_implementation="static", max_new_tokens=1)
    with pytest.raises(ValueError, match=r"[Aa]ssisted generation"):
        model.generate(ids[:1], generation_config=GenerationConfig(prompt_lookup_num_tokens=2, max_new_tokens=4))


def test_rows_selected_and_repeated(model):
    texts = prompts(2 * S + 1, S + 4)
    ids, mask = left_padded([text[:-1] for text in texts])
    for select, order in (
        (lambda c: c.batch_select_indices(torch.tensor([1, 0, 1])), [1, 0, 1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
    ):
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        select(cache)
        logits = model(torch.stack([texts[i][-1:] for i in order]), past_key_values=cache).logits[:, -1]
        expected = torch.stack([document_logits(model, texts[i])[-1] for i in order])
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seeds", [range(4), pytest.param(range(4, 36), marks=pytest.mark.slow)], ids=("few", "many"))
@pytest.mark.parametrize(("memory", "sliding"), [m for m in MODELS if m[1] in (None, 4, 9)], ids=str)
def test_random_selections_equal_recomputation(memory, sliding, seeds):
    """Rows dropped, reordered, repeated and copied at random between calls with padding."""
    model = build(memory, sliding_window=sliding).eval()
    for seed in seeds:
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        texts, cache, columns = [[] for _ in range(3)], InfiniCache(model.config), None
        for _ in range(4):
            rows, width = len(texts), draw.choice([1, 1, 2, S, 2 * S + 1])
            ids = torch.randint(VOCAB, (rows, width), generator=generator)
            mask = torch.ones(rows, width, dtype=torch.long)
            if width > 1 and draw.random() < 0.7:
                mask = torch.randint(2, (rows, width), generator=generator)
            columns = mask if columns is None else torch.cat((columns, mask), dim=1)
            with torch.set_grad_enabled(seed % 2 == 0):
                found = model(ids, attention_mask=columns, past_key_values=cache).logits
            texts = [[*text, *row[m.bool()].tolist()] for text, row, m in zip(texts, ids, mask, strict=True)]
            for row in range(rows):
                if n := int(mask[row].sum()):
                    with torch.no_grad():
                        expected = model(torch.tensor([texts[row]]), use_cache=False).logits[0, -n:]
                    torch.testing.assert_close(found[row, mask[row].bool()], expected, rtol=1e-9, atol=1e-9)

            order = [draw.randrange(rows) for _ in range(draw.randint(1, 3))]
            match draw.choice(["none", "select", "reorder", "repeat", "copy"]):
                case "none":
                    continue
                case "select":
                    cache.batch_select_indices(torch.tensor(order))
                case "reorder":
                    order = draw.sample(range(rows), rows)
                    cache.reorder_cache(torch.tensor(order))
                case "repeat" if rows <= 3:
                    cache.batch_repeat_interleave(2)
                    order = [row for row in range(rows) for _ in range(2)]
                case _ if seed % 2:  # tensors with a graph cannot be copied
                    used, cache = cache, copy.deepcopy(cache)
                    used.batch_select_indices(torch.tensor([0]))
                    model(ids[:1], past_key_values=used)
                    order = list(range(rows))
                case _:
                    continue
            texts, columns = [texts[row] for row in order], columns[order]
