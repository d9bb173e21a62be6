"""Shows what a model writes during training: the continuation of a document, printed and in TensorBoard."""

import numpy as np
import torch
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from infini_train.data.batches import Batch
from infini_train.model import InfiniForCausalLM

from ..module import InfiniModule
from ..step_callback import StepCallback
from .throughput import Throughput

PROMPT, NEW = 512, 64  # tokens


class Samples(StepCallback):
    """Continues a document every so many optimizer steps, always from the same place.

    The document is the longest of validation, or of training where there is no validation. Training is not affected:
    the random state is restored, and no lane's memory is touched. Every rank generates the same tokens, because a
    model that ZeRO-3 has split runs on all ranks or none.

    Args:
        every: number of optimizer steps between two samples.
        throughput: measures the speed of training, without the samples.

    Raises:
        ValueError: `every` is less than 1.
    """

    def __init__(self, every: int, throughput: Throughput):
        if every < 1:
            raise ValueError(f"sample_every: found {every}, expected at least 1, or null")
        self.every, self.throughput = every, throughput

    @torch.compiler.set_stance("force_eager")  # each length would be compiled anew
    def on_step_end(self, trainer: Trainer, module: InfiniModule, batch: Batch) -> None:
        step = trainer.global_step
        if step % self.every:
            return
        tokenizer, prompt_T = trainer.datamodule.opening(PROMPT)  # type: ignore[attr-defined]
        with trainer.precision_plugin.val_step_context():
            new_T = continuation(module.model, prompt_T, NEW, eos_id=tokenizer.eos_id, seed=step)
        told, written = tokenizer.decode(prompt_T[-NEW // 2 :]), tokenizer.decode(new_T)
        text = f"{indented(told, '|')}\n{indented(written, '>')}"
        if trainer.is_global_zero:
            print(
                f"step {step:>{len(str(trainer.max_steps))}}/{trainer.max_steps}  sample: the end of a prompt of "
                f"{len(prompt_T)} tokens (|) and its continuation (>)\n{text}",
                flush=True,
            )
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text("sample", text, step)
        self.throughput.leave_out()


def continuation(model: InfiniForCausalLM, prompt_T: np.ndarray, count: int, *, eos_id: int, seed: int) -> np.ndarray:
    """Return `count` tokens that follow a prompt, drawn at temperature 0.7, int64 [count].

    EOS is not drawn, so that the number of tokens is the same on all ranks.

    Args:
        model: the model, in training mode before and after.
        prompt_T: the tokens of the prompt.
        count: number of tokens to generate.
        eos_id: the token that ends a document.
        seed: of the random numbers; the global random state stays as it is.
    """
    ids = torch.from_numpy(prompt_T.astype(np.int64)).to(model.device)[None]
    model.eval()
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(  # type: ignore[misc]  # transformers' annotation of self
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=count,
            max_new_tokens=count,
            eos_token_id=eos_id,
            pad_token_id=eos_id,
            do_sample=True,
            temperature=0.7,
            top_k=0,
        )
    model.train()
    return out[0, len(prompt_T) :].cpu().numpy()


def indented(text: str, mark: str) -> str:
    """Return the lines of a text behind a mark, as a block of code in Markdown, which TensorBoard renders."""
    return "\n".join(f"    {mark} {line}" for line in text.splitlines())
