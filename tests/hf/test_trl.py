"""TRL's trainers on an Infini model: packed documents are trained as if each were alone."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

import infini_train.hf  # noqa: F401 (the Auto classes)
from tests.helpers.exports import tiny_export
from tests.helpers.models import VOCAB, S, build

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


def test_sft_with_packing(tmp_path, tokenizer):
    """The loss and the gradients of a step over packed rows are those of the documents, one by one."""
    model = build("selective-delta", torch.float32, sliding_window=9)
    alone = build("selective-delta", torch.float32, sliding_window=9).train()
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
    for name, p in alone.named_parameters():
        step = before[name] - dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(step, p.grad, rtol=1e-4, atol=1e-5, msg=name)


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


def test_two_steps_of_dpo(tmp_path):
    """The reference's log-probabilities are those of each answer alone, and the policy's in the first step."""
    export = tiny_export(tmp_path / "export", memory="selective-delta", sliding_window=8)
    model, alone = (AutoModelForCausalLM.from_pretrained(export).eval() for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(export)
    wanted = {}
    for side in ("chosen", "rejected"):
        of_side = []
        for prompt, answer in zip(PREFERENCES["prompt"], PREFERENCES[side], strict=True):
            ids = torch.tensor(tokenizer(prompt + answer + tokenizer.eos_token).input_ids)
            begin = len(tokenizer(prompt).input_ids)
            assert begin > 0 and ids[:begin].tolist() == tokenizer(prompt).input_ids
            with torch.no_grad():
                log_p = alone(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            of_side.append(log_p.gather(1, ids[1:, None])[begin - 1 :].sum().item())
        wanted[side] = of_side
    batch = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-2, "optim": "sgd"}
    arguments = DPOConfig(**options(tmp_path, beta=0.1, precompute_ref_log_probs=False, **batch))
    data = Dataset.from_dict(PREFERENCES)
    trainer = DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
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
        assert one[f"logps/{side}"] == pytest.approx(sum(of_side) / 2, rel=1e-4)
        assert one[f"rewards/{side}"] == pytest.approx(0, abs=1e-5)  # the reference gives the same
    assert one["loss"] == pytest.approx(0.6931, abs=1e-4)  # log 2: no preference yet
    assert two["loss"] < one["loss"] and two["rewards/margins"] > 0
    for name, p in trainer.ref_model.named_parameters():
        assert torch.equal(p, alone.get_parameter(name)), name


def test_a_step_of_grpo(tmp_path):
    """The entropy of its answers is that of each alone, recomputed without cache and padding."""
    export = tiny_export(tmp_path / "export", memory="selective-delta", sliding_window=8)
    model, alone = (AutoModelForCausalLM.from_pretrained(export).eval() for _ in range(2))
    tokenizer, answers = AutoTokenizer.from_pretrained(export), []

    def length(prompts, completion_ids, **_):
        answers.extend(zip(prompts, completion_ids, strict=True))
        return [float(len(set(ids))) for ids in completion_ids]

    sizes = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 12}
    arguments = GRPOConfig(**options(tmp_path, beta=0.1, learning_rate=1e-3, **sizes))
    data = Dataset.from_dict({"prompt": PREFERENCES["prompt"]})
    trainer = GRPOTrainer(model, length, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert len(answers) == 4 and len({len(prompt) for prompt, _ in answers}) == 2
    entropies = []
    for prompt, ids in answers:
        known = tokenizer(prompt).input_ids
        with torch.no_grad():
            log_p = alone(torch.tensor([[*known, *ids]]), use_cache=False).logits[0].log_softmax(-1)
        entropies.append(-(log_p.exp() * log_p).sum(-1)[len(known) - 1 : -1])
    logged = trainer.state.log_history[0]
    assert logged["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-3)
    assert logged["kl"] == pytest.approx(0, abs=1e-5)  # the reference is the policy, yet


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
    with pytest.raises(ValueError, match="hidden states: found an output memory"):
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
