"""Checkpoints of the Llama family as Infini models: their tensors have our names, only the gates are new."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from infini_train.files import check_new
from infini_train.model import InfiniConfig
from infini_train.model.loading import INDEX as WEIGHTS_INDEX
from infini_train.model.loading import read_safetensors
from infini_train.model.rules import RULES

from .export import write_model

FAMILY = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "infini": "InfiniForCausalLM"}
# Of the original's configuration; the rest is how transformers runs it, or the context, which the memory lengthens.
KEPT = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters"),
    *("attention_bias", "mlp_bias", "attention_dropout", "tie_word_embeddings", "initializer_range"),
    *("bos_token_id", "eos_token_id"),
]
# A memory that nothing has trained must not speak with half the voice: sigmoid(-4) = 0.018.
GATE_INIT = -4.0
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # either is a whole tokenizer
PROBE = "Call me Ishmael.\n\n  déjà vu, 你好, 1,234.5 — <s>x</s>\tif x: return"


def import_model(
    source: Path,
    out: Path,
    segment_length: int | None = None,
    memory: str | None = None,
    gate_init: float | None = None,
    gguf_file: str | None = None,
) -> InfiniConfig:
    """Write the model in `source` as an Infini model directory; the command line's `import` says what may be there.

    Raises:
        FileNotFoundError: no model there, or a part of it missing.
        FileExistsError: `out` exists.
        ValueError: something an Infini model cannot represent, or damaged files; the message names it.
    """
    check_new(out)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or directory")
    gguf = find_gguf(source, gguf_file)
    original = read_gguf_config(gguf) if gguf else read_config(source)
    given = {"segment_length": segment_length, "memory": memory, "gate_init": gate_init}
    given = {name: value for name, value in given.items() if value is not None}
    config = infini_config(original, given, source)
    weights = read_gguf(gguf, original) if gguf else read_safetensors(source)
    # Old files hold this buffer.
    weights = {name: value for name, value in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    if original.model_type != "infini" or gate_init is not None:
        dtype = weights["model.norm.weight"].dtype if "model.norm.weight" in weights else torch.float32
        for layer in range(config.num_hidden_layers):
            gate = torch.full((config.num_attention_heads,), config.gate_init, dtype=dtype)
            weights[f"model.layers.{layer}.self_attn.gate"] = gate
    if original.model_type != "infini":
        for layer in range(config.num_hidden_layers):
            rule = RULES[config.memory](config)
            rule.keep_local_attention()
            for name, value in rule.state_dict().items():
                weights[f"model.layers.{layer}.self_attn.rule.{name}"] = value.to(weights["model.norm.weight"].dtype)

    def add_files(directory: Path) -> None:
        if original.model_type == "infini":
            copy_other_files(source, directory)
        else:
            write_tokenizer(source, gguf, config, directory)

    write_model(
        config,
        weights,
        out,
        source=source,
        add_files=add_files,
        special=special_ids(source, original),
    )
    return config


def find_gguf(source: Path, gguf_file: str | None) -> Path | None:
    """The GGUF file to read; None where safetensors are (or should be) in the directory."""
    if source.is_file() or gguf_file:
        path = source if source.is_file() else source / str(gguf_file)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        if path.suffix != ".gguf":
            raise ValueError(f"{path}: expected a directory or a .gguf file")
    else:
        files = sorted(source.glob("*.gguf"))
        if not files or any(source.glob("*.safetensors")):
            return None
        if len(files) > 1:
            raise ValueError(f"{source}: found {', '.join(f.name for f in files)}; --gguf_file says which to read")
        path = files[0]
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError(f"{path}: reading GGUF needs the package gguf: pip install gguf") from None
    return path


def read_config(source: Path) -> PreTrainedConfig:
    """The configuration of a directory. Raises ValueError for what is not a dense Llama with full attention."""
    path = source / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the directory of a Hugging Face model")
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
        model_type, architectures = raw.get("model_type"), raw.get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a JSON object: {error}") from error
    if model_type not in FAMILY:
        raise ValueError(f"{path}: model_type: found {model_type!r}, expected one of {', '.join(FAMILY)}")
    if architectures not in ([], [FAMILY[model_type]]):
        raise ValueError(f"{path}: architectures: found {architectures}, expected {FAMILY[model_type]}")
    if raw.get("quantization_config"):
        raise ValueError(f"{path}: quantization_config: found a quantised model, expected plain float weights")
    try:
        if model_type == "infini":
            return InfiniConfig.from_pretrained(source)
        return AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_gguf_config(path: Path) -> PreTrainedConfig:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
        scaling = [name for name in reader.fields if ".rope.scaling." in name]
        if architecture == "llama" and not scaling:
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:  # the reader fails with whatever error the first wrong byte leads to
        raise ValueError(f"{path}: truncated or damaged, no GGUF of a Llama: {error!r}") from error
    if scaling:
        raise ValueError(f"{path}: {scaling[0]}: RoPE scaling is not read from GGUF; expected safetensors")
    raise ValueError(f"{path}: general.architecture: found {architecture!r}, expected 'llama'")


def read_gguf(path: Path, config: PreTrainedConfig) -> dict[str, Tensor]:
    """Dequantised to float32. (from_pretrained would do the same, but asks for the package accelerate.)"""
    from gguf import GGUFReader
    from transformers import modeling_gguf_pytorch_utils as utils

    with torch.device("meta"):
        model = LlamaForCausalLM(config)  # type: ignore[arg-type]  # any with Llama's fields will do, here and below
    known = utils.get_gguf_hf_weights_map(model, utils.TensorProcessor())
    # transformers skips tensors that it has no place for, rope_freqs.weight (scaled RoPE) and experts among them.
    unknown = [tensor.name for tensor in GGUFReader(path).tensors if tensor.name not in known]
    if unknown:
        raise ValueError(f"{path}: tensors: found {', '.join(unknown[:5])}, which a plain Llama does not have")
    try:
        return utils.load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    except Exception as error:
        raise ValueError(f"{path}: truncated or damaged: {error!r}") from error


def special_ids(source: Path, original: PreTrainedConfig) -> dict[str, Any]:
    """bos, eos and pad ids for generation, which may end at other tokens than the configuration's."""
    ids = {name: getattr(original, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if (source / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(source)
        ids |= {name: found for name in ids if (found := getattr(generation, name)) is not None}
    return ids


def infini_config(original: PreTrainedConfig, given: dict[str, Any], source: Path) -> InfiniConfig:
    """Ours from the original's; RoPE inside a segment is compared, not presumed."""
    longest, limit = original.max_position_embeddings, "max_position_embeddings"
    if isinstance(original, InfiniConfig):
        kept, longest, limit = original.to_dict(), original.segment_length, "segment_length"
    else:
        kept = {name: getattr(original, name) for name in KEPT if hasattr(original, name)} | {"gate_init": GATE_INIT}
    if getattr(original, "sliding_window", None) is not None:
        raise ValueError(f"{source}: sliding_window: found {original.sliding_window}, expected none")
    try:
        config = InfiniConfig.from_dict({**kept, **given})
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{source}: {error}") from error
    if config.segment_length > longest:
        raise ValueError(
            f"segment_length: found {config.segment_length}, expected at most {longest}, {limit} of {source}"
        )
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"{source}: hidden_act: found {config.hidden_act!r}, which transformers does not know")
    positions = torch.arange(config.segment_length)[None]
    tables = [LlamaRotaryEmbedding(c)(torch.zeros(1), positions) for c in (original, config)]  # type: ignore[arg-type]
    if not all(torch.equal(a, b) for a, b in zip(*tables, strict=True)):
        raise ValueError(
            f"{source}: rope_parameters: {config.rope_parameters} depend on max_position_embeddings, which an Infini "
            f"model makes long; give the factor explicitly"
        )
    return config


def copy_other_files(source: Path, directory: Path) -> None:
    """The tokenizer and its code from an Infini directory: what `directory` lacks, but for weights and card."""
    for file in source.iterdir():
        wanted = file.suffix in (".json", ".model", ".jinja", ".py") and file.name != WEIGHTS_INDEX
        if wanted and not (directory / file.name).exists():
            shutil.copyfile(file, directory / file.name)


def write_tokenizer(source: Path, gguf: Path | None, config: InfiniConfig, directory: Path) -> None:
    """The original's tokenizer, if it has one: loaded, for the model's type may name its class, and written again.

    tokenizer.json and tokenizer.model stay the same bytes, so that datasets made with them are recognised.
    """
    kept = [] if gguf else [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not (gguf or kept or (source / "vocab.json").is_file()):
        return
    where = gguf.parent if gguf else source
    arguments: dict[str, Any] = {"gguf_file": gguf.name} if gguf else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False, **arguments)
    except Exception as error:  # whatever a damaged file leads to, in any of many tokenizer classes
        raise ValueError(f"{source}: its tokenizer cannot be loaded: {error!r}") from error
    size = max(tokenizer.get_vocab().values()) + 1
    if size > config.vocab_size:
        raise ValueError(f"{source}: tokenizer of {size} tokens, expected at most {config.vocab_size}")
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(directory)
    for name in kept:
        shutil.copyfile(source / name, directory / name)
    written = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if written(PROBE).input_ids != tokenizer(PROBE).input_ids:
        raise ValueError(f"{source}: its tokenizer gives other tokens once its model type is 'infini'")
