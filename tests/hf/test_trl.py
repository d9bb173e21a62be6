"""TRL's trainers on an Infini model: documents are trained as if each were alone, and with an output memory."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer.utils import add_fused_lm_head

import infini_train.hf  # noqa: F401 (the Auto classes)
from infini_train.hf import trl_logits
from infini_train.hf.trl_logits import use_model_logits
from tests.helpers.exports import tiny_export
from tests.helpers.models import OUTPUT, VOCAB, S, build

LENGTHS = (2 * S + 1, 3, S, 2, 3, 3 * S - 1, 4 * S, 5)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def texts() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(4, VOCAB, (n,)) for n in LENGTHS]


def options(directory, **given) -> dict:
    quiet = {"report_to": "none", "use_cpu": True, "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no"}
    return {"output_dir": str(directory), "max_steps": 1, "bf16": False, "seed": 0, **quiet, **given}


@pytest.fixture
def model_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """`use_model_logits`, which ends with the test."""
    for name in trl_logits.TRAINERS:
        monkeypatch.setattr(f"trl.trainer.{name}_trainer.add_fused_lm_head", add_fused_lm_head)
    use_model_logits()


def assert_stepped_by(model, before, expected) -> None:
    """A step of plain descent at a learning rate of 1 was by the gradients of `expected`."""
    for name, p in expected.named_parameters():
        step = before[name] - dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(step, p.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("memory", ["selective-delta", "selective-delta" + OUTPUT])
def test_sft_with_packing(tmp_path, tokenizer, memory, model_logits):
    """The loss and the gradients of a step over packed rows are those of the documents, one by one."""
    model = build(memory, torch.float32, sliding_window=9)
    alone = build(memory, torch.float32, sliding_window=9).train()
    logits = [alone(text[None], use_cache=False).logits[0, :-1] for text in texts()]
    total = sum(F.cross_entropy(x, text[1:], reduction="sum") for x, text in zip(logits, texts(), strict=True))
    loss = total / (sum(LENGTHS) - len(LENGTHS))
    loss.backward()
    packing = {"packing": True, "max_length": 5 * S, "per_device_train_batch_size": 8}
    arguments = SFTConfig(**options(tmp_path, learning_rate=1.0, optim="sgd", max_grad_norm=1e9, **packing))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = Dataset.from_dict({"input_ids": [text.tolist() for text in texts()]})
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    assert len(trainer.train_dataset) < len(LENGTHS), "several documents are in one row"
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(loss.item(), rel=1e-4)  # TRL rounds it
    assert_stepped_by(model, before, alone)


def test_sft_on_completions(tmp_path, tokenizer, model_logits):
    """With an output memory, the loss and the gradients of an accumulated step over padded rows of prompts and
    completions are those of the model's own `forward` with labels on the completions, row by row."""
    model, alone = (build("selective-delta" + OUTPUT, torch.float32).train() for _ in range(2))
    prompts = [len(text) // 3 for text in texts()]
    total = torch.zeros(())
    for text, prompt in zip(texts(), prompts, strict=True):
        labels = text.masked_fill(torch.arange(len(text)) < prompt, -100)
        wanted = (labels[1:] != -100).sum()
        total = total + alone(text[None], labels=labels[None], use_cache=False).loss * wanted
    labels = sum(min(len(text) - prompt, len(text) - 1) for text, prompt in zip(texts(), prompts, strict=True))
    (total / labels).backward()
    rows = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "completion_only_loss": True}
    arguments = SFTConfig(**options(tmp_path, learning_rate=1.0, optim="sgd", max_grad_norm=1e9, **rows))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = [[int(i >= prompt) for i in range(len(text))] for text, prompt in zip(texts(), prompts, strict=True)]
    data = Dataset.from_dict({"input_ids": [text.tolist() for text in texts()], "completion_mask": masks})
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total.item() / labels, rel=1e-4)
    assert_stepped_by(model, before, alone)


def test_the_head_of_model_logits_is_that_of_trl():
    """For a model without an output memory, which TRL's own head serves, all fields and gradients are the same."""
    fields = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    ids = torch.stack([text[:17] for text in texts() if len(text) > 16]).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, 11:] = 0  # on either side
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, :7] = labels[3] = -100  # the whole of a row
    results = []
    for add in (add_fused_lm_head, trl_logits.add_logits_head):
        model = build("selective-delta", torch.float32)
        add(model, temperature=0.7, outputs=fields)
        out = model(ids, attention_mask=mask, labels=labels, fused_lm_head=True, num_items_in_batch=37)
        (out.loss + (out.log_probs.sum() + out.entropy.sum()) / 37).backward()
        found = [out.loss, out.label_mask, *(out[field] for field in fields)]
        results.append([*(x.detach() for x in found), *(p.grad for p in model.parameters())])
        assert 0 < out.is_top1.sum() < out.label_mask.sum() and not out.log_probs[3].any()
        assert model(ids, attention_mask=mask, labels=labels).logits.shape == (*ids.shape, VOCAB), "as it was"
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_its_loss_is_the_own_loss_of_a_model_with_an_output_memory():
    """Also where rows are padded on the left and their first token, which nothing predicts, is labelled."""
    model = build("selective-delta" + OUTPUT, torch.float32)
    ids = torch.stack([text[:17] for text in texts() if len(text) > 16])
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, 11:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    wanted = model(**batch).loss
    trl_logits.add_logits_head(model, 1.0, ())
    torch.testing.assert_close(model(**batch, fused_lm_head=True).loss, wanted)


def test_a_batch_without_labels_gives_zeros():
    model = build("paper-linear" + OUTPUT, torch.float32)
    trl_logits.add_logits_head(model, 1.0, ())
    ids = texts()[0][None]
    model(ids, labels=torch.full_like(ids, -100), fused_lm_head=True).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    with pytest.raises(ValueError, match="labels: found none or shifted ones"):
        model(ids, shift_labels=ids, fused_lm_head=True)
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32: found True, expected False"):
        trl_logits.add_head(model, cast_lm_head_to_fp32=True)


def test_all_trainers_of_trl_that_multiply_weights_are_known():
    directory = Path(trl.__file__).parent / "trainer"
    using = {file.stem for file in directory.glob("*_trainer.py") if "add_fused_lm_head(" in file.read_text()}
    assert using == {f"{name}_trainer" for name in trl_logits.TRAINERS}


def test_reward_model_with_lora(tmp_path, tokenizer):
    """The first loss is that of each answer's score, computed alone; LoRA changes the model, and merges exactly."""
    build("selective-delta", torch.float32).save_pretrained(tmp_path / "model")
    load = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", **load).eval()
    chosen, rejected = texts()[::2], texts()[1::2]
    scores = [torch.cat([model(text[None]).logits[0] for text in side]) for side in (chosen, rejected)]
    loss = -F.logsigmoid(scores[0] - scores[1]).mean()
    names = ("chosen_ids", "rejected_ids")
    data = Dataset.from_dict(
        {name: [text.tolist() for text in side] for name, side in zip(names, (chosen, rejected), strict=True)}
    )
    arguments = RewardConfig(**options(tmp_path, per_device_train_batch_size=4, learning_rate=1e-2))
    adapter = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], modules_to_save=["score"])
    trainer = RewardTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, peft_config=adapter)
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(loss.item(), rel=1e-3)
    adapted = trainer.model.eval()
    after = adapted(chosen[0][None]).logits
    assert not torch.allclose(after[0], scores[0][:1])
    torch.testing.assert_close(adapted.merge_and_unload()(chosen[0][None]).logits, after)


PREFERENCES = {
    "prompt": ["def f(x):\n    # twice the argument\n", "import"],
    "chosen": ["    return 2 * x", " os"],
    "rejected": ["    pass", " everything that there is, from everywhere"],
}


class FirstGradients(TrainerCallback):
    """Keeps the gradients of a trainer's first step."""

    def on_pre_optimizer_step(self, args, state, control, model, **_) -> None:
        if state.global_step == 0:
            self.kept = {name: p.grad.clone() for name, p in model.named_parameters()}

    def assert_those_of(self, expected) -> None:
        for name, p in expected.named_parameters():
            torch.testing.assert_close(self.kept[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)


OUTPUT_MEMORY = pytest.mark.parametrize("output_memory_dim", [None, 4])


def load(export, copies=2):
    return [AutoModelForCausalLM.from_pretrained(export).eval() for _ in range(copies)]


def log_probabilities(alone, tokenizer) -> dict[str, torch.Tensor]:
    """The log-probability of each answer, chosen or rejected, computed alone and without padding."""
    wanted = {}
    for side in ("chosen", "rejected"):
        of_side = []
        for prompt, answer in zip(PREFERENCES["prompt"], PREFERENCES[side], strict=True):
            ids = torch.tensor(tokenizer(prompt + answer + tokenizer.eos_token).input_ids)
            begin = len(tokenizer(prompt).input_ids)
            assert begin > 0 and ids[:begin].tolist() == tokenizer(prompt).input_ids
            log_p = alone(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            of_side.append(log_p.gather(1, ids[1:, None])[begin - 1 :].sum())
        wanted[side] = torch.stack(of_side)
    return wanted


@OUTPUT_MEMORY
def test_two_steps_of_dpo(tmp_path, output_memory_dim, model_logits):
    """The reference's log-probabilities are those of each answer alone, and the policy's in the first step, whose
    gradients are those of the formula."""
    memory = {"memory": "selective-delta", "sliding_window": 8, "output_memory_dim": output_memory_dim}
    export = tiny_export(tmp_path / "export", **memory)
    model, alone = load(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    wanted = log_probabilities(alone, tokenizer)
    scores = wanted["chosen"] - wanted["rejected"]
    (-F.logsigmoid(0.1 * (scores - scores.detach()))).mean().backward()
    batch = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-2, "optim": "sgd"}
    arguments = DPOConfig(**options(tmp_path, beta=0.1, precompute_ref_log_probs=False, max_grad_norm=1e9, **batch))
    data, gradients = Dataset.from_dict(PREFERENCES), FirstGradients()
    given = {"processing_class": tokenizer, "callbacks": [gradients]}
    trainer = DPOTrainer(model, args=arguments, train_dataset=data, **given)
    first = next(iter(trainer.get_train_dataloader()))
    rows = [tokenizer.decode(row[mask > 0]) for row, mask in zip(first["input_ids"], first["attention_mask"])]  # noqa: B905
    trainer.train()
    one, two = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert sorted(rows) == sorted(
        f"<s>{prompt}{answer}</s>"
        for side in ("chosen", "rejected")
        for prompt, answer in zip(PREFERENCES["prompt"], PREFERENCES[side], strict=True)
    )
    for side, of_side in wanted.items():
        assert one[f"logps/{side}"] == pytest.approx(of_side.mean().item(), rel=1e-4)
        assert one[f"rewards/{side}"] == pytest.approx(0, abs=1e-5)  # the reference gives the same
    assert one["loss"] == pytest.approx(0.6931, abs=1e-4)  # log 2: no preference yet
    assert two["loss"] < one["loss"] and two["rewards/margins"] > 0
    gradients.assert_those_of(alone)
    for name, p in trainer.ref_model.named_parameters():
        assert torch.equal(p, alone.get_parameter(name)), name


@OUTPUT_MEMORY
def test_a_step_of_kto(tmp_path, output_memory_dim, model_logits):
    """Log-probabilities are those of each answer alone, and the gradients those of the formula."""
    export = tiny_export(tmp_path / "export", memory="selective-delta", output_memory_dim=output_memory_dim)
    model, alone = load(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    wanted = log_probabilities(alone, tokenizer)
    (
        1
        - torch.cat(
            [(sign * 0.1 * (x - x.detach())).sigmoid() for sign, x in zip((1, -1), wanted.values(), strict=True)]
        )
    ).mean().backward()
    data = Dataset.from_dict(
        {
            "prompt": PREFERENCES["prompt"] * 2,
            "completion": PREFERENCES["chosen"] + PREFERENCES["rejected"],
            "label": [True] * 2 + [False] * 2,
        }
    )
    arguments = KTOConfig(**options(tmp_path, beta=0.1, per_device_train_batch_size=4, max_grad_norm=1e9))
    given = {"processing_class": tokenizer, "callbacks": [gradients := FirstGradients()]}
    trainer = KTOTrainer(model, args=arguments, train_dataset=data, **given)
    trainer.train()
    logged = trainer.state.log_history[0]
    for side, of_side in wanted.items():
        assert logged[f"logps/{side}"] == pytest.approx(of_side.mean().item(), rel=1e-4)
    assert logged["loss"] == pytest.approx(0.5, abs=1e-4) and logged["kl"] == pytest.approx(0, abs=1e-5)
    gradients.assert_those_of(alone)


@pytest.mark.parametrize(
    ("trainer", "config", "output_memory_dim"),
    [(GRPOTrainer, GRPOConfig, None), (GRPOTrainer, GRPOConfig, 4), (RLOOTrainer, RLOOConfig, 4)],
)
def test_a_step_of_sampling(tmp_path, trainer, config, output_memory_dim, model_logits):
    """The entropy of the sampled answers is that of each alone, recomputed without cache and padding; the gradients
    of GRPO are those of the formula."""
    memory = {"memory": "selective-delta", "sliding_window": 8, "output_memory_dim": output_memory_dim}
    export = tiny_export(tmp_path / "export", **memory)
    model, alone = load(export)
    tokenizer, answers, rewards = AutoTokenizer.from_pretrained(export), [], []

    def variety(prompts, completion_ids, **_):
        answers.extend(zip(prompts, completion_ids, strict=True))
        rewards.extend(float(len(set(ids))) for ids in completion_ids)
        return rewards

    sizes = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 12}
    arguments = config(**options(tmp_path, beta=0.1, learning_rate=1e-3, max_grad_norm=1e9, **sizes))
    data = Dataset.from_dict({"prompt": PREFERENCES["prompt"]})
    given = {"processing_class": tokenizer, "callbacks": [gradients := FirstGradients()]}
    made = trainer(model, variety, args=arguments, train_dataset=data, **given)
    made.train()
    assert len(answers) == 4 and len({len(prompt) for prompt, _ in answers}) == 2
    of_group = torch.tensor(rewards).view(2, 2)
    advantages = (of_group - of_group.mean(1, keepdim=True)) / (of_group.std(1, keepdim=True) + 1e-4)
    assert advantages.any()
    entropies, log_ps = [], []
    for prompt, ids in answers:
        known = tokenizer(prompt).input_ids
        log_p = alone(torch.tensor([[*known, *ids]]), use_cache=False).logits[0, len(known) - 1 : -1].log_softmax(-1)
        entropies.append(-(log_p.exp() * log_p).sum(-1).detach())
        log_ps.append(log_p.gather(1, torch.tensor(ids)[:, None]).sum())
    logged = made.state.log_history[0]
    assert logged["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-3)
    assert logged["kl"] == pytest.approx(0, abs=1e-5)  # the reference is the policy, yet
    if trainer is GRPOTrainer:
        (-(advantages.flatten() * torch.stack(log_ps)).sum() / len(torch.cat(entropies))).backward()
        gradients.assert_those_of(alone)


@pytest.mark.parametrize("trainer", ["sft", "dpo", "grpo"])
def test_a_loss_without_the_output_memory_is_refused(tmp_path, trainer):
    export = tiny_export(tmp_path / "export", output_memory_dim=4)
    tokenizer, model = AutoTokenizer.from_pretrained(export), AutoModelForCausalLM.from_pretrained(export)
    given = {"processing_class": tokenizer}
    data = Dataset.from_dict(PREFERENCES if trainer == "dpo" else {"prompt": PREFERENCES["prompt"]})
    match trainer:
        case "sft":
            data = Dataset.from_dict({"text": PREFERENCES["prompt"]})
            made = SFTTrainer(model, SFTConfig(**options(tmp_path)), train_dataset=data, **given)
        case "dpo":
            made = DPOTrainer(model, args=DPOConfig(**options(tmp_path)), train_dataset=data, **given)
        case _:
            sizes = {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 4}
            arguments = GRPOConfig(**options(tmp_path, **sizes))
            rewards = lambda completions, **_: [float(len(text)) for text in completions]  # noqa: E731
            made = GRPOTrainer(model, rewards, args=arguments, train_dataset=data, **given)
    with pytest.raises(
        ValueError, match=r"found an output memory, .* infini_train\.hf\.trl_logits\.use_model_logits\(\)"
    ):
        made.train()


def test_sft_without_the_output_memory(tmp_path, tokenizer):
    """Loaded without it, an export is trained as a model that never had one."""
    model = build("paper-linear", torch.float32)
    with_memory = build("paper-linear + output", torch.float32)
    with_memory.load_state_dict(model.state_dict(), strict=False)
    with_memory.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_memory_dim=None)
    data = Dataset.from_dict({"input_ids": [text.tolist() for text in texts()]})
    losses = []
    for one in (model, loaded):
        arguments = SFTConfig(**options(tmp_path, max_length=5 * S))
        trainer = SFTTrainer(one, arguments, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1]
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in model.named_parameters())
