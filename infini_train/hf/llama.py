"""Imports checkpoints of Llama and its relatives as Infini models; tensor names are the same, and gates are added."""

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
from infini_train.model.loading import read_object, read_safetensors, refusal
from infini_train.model.output_memory import OutputMemory
from infini_train.model.rules import RULES

from .export import write_model

# Fields copied from the original configuration. The others tell transformers how to run the model, or limit the
# context length, which the memory extends.
KEPT = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters"),
    *("attention_bias", "mlp_bias", "attention_dropout", "tie_word_embeddings", "initializer_range"),
    *("bos_token_id", "eos_token_id"),
]
# An untrained memory gets a small share of the output: sigmoid(-4) = 0.018.
GATE_INIT = -4.0
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # each of these is a complete tokenizer
PROBE = "Call me Ishmael.\n\n  déjà vu, 你好, 1,234.5 — <s>x</s>\tif x: return"


def import_model(
    source: Path,
    out: Path,
    segment_length: int | None = None,
    memory: str | None = None,
    gate_init: float | None = None,
    sliding_window: int | None = None,
    output_memory_dim: int | None = None,
    gguf_file: str | None = None,
) -> InfiniConfig:
    """Write the model in `source` as an Infini model directory.

    Args:
        source: model directory or GGUF file, as for `infini-train import` (hf/commands.py).
        out: directory to write, which must not exist.
        segment_length: tokens of a segment; None: the default, or the Infini model's own.
        memory: the memory rule; None: the default, or the Infini model's own.
        gate_init: initial value of all gates, before the sigmoid; None: GATE_INIT, or the Infini model's own gates.
        sliding_window: tokens that local attention sees; None: the original's own, or its segment only.
        output_memory_dim: features of an output memory; None: none, or the Infini model's own.
        gguf_file: name of the GGUF file, if the directory holds several.

    Returns:
        The configuration of the model written.

    Raises:
        FileNotFoundError: there is no model, or a part of it is missing.
        FileExistsError: `out` exists.
        ValueError: an Infini model cannot represent the original, or a file is damaged; the message says which.
    """
    check_new(out)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or directory")
    gguf = find_gguf(source, gguf_file)
    original = read_gguf_config(gguf) if gguf else read_config(source)
    given: dict[str, Any] = {"segment_length": segment_length, "memory": memory, "gate_init": gate_init}
    given |= {"sliding_window": sliding_window, "output_memory_dim": output_memory_dim}
    given = {name: value for name, value in given.items() if value is not None}
    config = infini_config(original, given, source)
    weights = read_gguf(gguf, original) if gguf else read_safetensors(source)
    # Old checkpoints contain this buffer, which is computed now.
    weights = {name: value for name, value in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    if original.model_type == "gemma":
        weights = plain_gemma(weights, original)
    # Of what is added. Where the norm is missing, `write_model` says so.
    dtype = weights["model.norm.weight"].dtype if "model.norm.weight" in weights else torch.float32
    if original.model_type != "infini" or gate_init is not None:
        for layer in range(config.num_hidden_layers):
            gate = torch.full((config.num_attention_heads,), config.gate_init, dtype=dtype)
            weights[f"model.layers.{layer}.self_attn.gate"] = gate
    if original.model_type == "qwen2":
        for layer in range(config.num_hidden_layers):
            zeros = torch.zeros(config.hidden_size, dtype=dtype)
            weights[f"model.layers.{layer}.self_attn.o_proj.bias"] = zeros
    if original.model_type != "infini":
        # Parameters of the rule that act on local attention start as the identity, so that it stays the original's.
        for layer in range(config.num_hidden_layers):
            rule = RULES[config.memory](config)
            rule.keep_local_attention()
            for name, value in rule.state_dict().items():
                weights[f"model.layers.{layer}.self_attn.rule.{name}"] = value.to(dtype)

    if config.output_memory_dim and "lm_head.memory.scale" not in weights:
        added = OutputMemory(config.hidden_size, config.output_memory_dim).state_dict()
        weights |= {f"lm_head.memory.{name}": value.to(dtype) for name, value in added.items()}

    def add_files(directory: Path) -> None:
        if original.model_type == "infini":
            copy_other_files(source, directory)
        else:
            copy_tokenizer(source, gguf, config, directory)

    write_model(config, weights, out, source=source, add_files=add_files, special=special_ids(source, original))
    return config


def plain_gemma(weights: dict[str, Tensor], original: PreTrainedConfig) -> dict[str, Tensor]:
    """Return the weights of a Gemma as those of a Llama, in float32.

    A Gemma's norms multiply by 1 + weight, in float32, and 1 + weight may need more digits than bfloat16 has. Its
    embeddings are multiplied by sqrt(hidden_size), in their dtype. Its output weights, if tied, are the embeddings
    without that factor.
    """
    plain = {
        name: value.float() + 1 if name.endswith("norm.weight") else value.float() for name, value in weights.items()
    }
    if (embeddings := weights.get("model.embed_tokens.weight")) is not None:
        scale = torch.tensor(original.hidden_size**0.5).to(embeddings.dtype)
        plain["model.embed_tokens.weight"] = (embeddings * scale).float()
        if original.tie_word_embeddings:
            plain["lm_head.weight"] = embeddings.float()
    return plain


def find_gguf(source: Path, gguf_file: str | None) -> Path | None:
    """Return the GGUF file to read, None if the model is (or should be) in safetensors."""
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
    """Read the configuration of a directory. Raises ValueError unless it is of a kind that can be imported."""
    path = source / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the directory of a Hugging Face model")
    raw = read_object(path)
    if reason := refusal(raw):
        raise ValueError(f"{path}: {reason}")
    try:
        if raw["model_type"] == "infini":
            return InfiniConfig.from_pretrained(source)
        return AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_gguf_config(path: Path) -> PreTrainedConfig:
    """Read the configuration of a GGUF file. Raises ValueError for other architectures and damaged files."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
        scaling = [name for name in reader.fields if ".rope.scaling." in name]
        if architecture == "llama" and not scaling:
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:  # damaged files make the reader raise errors of any type
        raise ValueError(f"{path}: truncated or damaged, not a GGUF file of a Llama: {error!r}") from error
    if scaling:
        raise ValueError(
            f"{path}: {scaling[0]}: found RoPE scaling, which is not read from GGUF; expected safetensors"
        )
    raise ValueError(f"{path}: general.architecture: found {architecture!r}, expected 'llama'")


def read_gguf(path: Path, config: PreTrainedConfig) -> dict[str, Tensor]:
    """Read the weights of a GGUF file, dequantised to float32.

    `from_pretrained` would do the same, but requires the package accelerate.
    """
    from gguf import GGUFReader
    from transformers import modeling_gguf_pytorch_utils as utils

    with torch.device("meta"):
        model = LlamaForCausalLM(config)  # type: ignore[arg-type]  # any configuration with Llama's fields works
    known = utils.get_gguf_hf_weights_map(model, utils.TensorProcessor())
    # transformers silently skips unknown tensors, among them rope_freqs.weight (scaled RoPE) and experts.
    unknown = [tensor.name for tensor in GGUFReader(path).tensors if tensor.name not in known]
    if unknown:
        raise ValueError(f"{path}: tensors: found {', '.join(unknown[:5])}, which a plain Llama does not have")
    try:
        return utils.load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    except Exception as error:
        raise ValueError(f"{path}: truncated or damaged: {error!r}") from error


def special_ids(source: Path, original: PreTrainedConfig) -> dict[str, Any]:
    """Return the BOS, EOS and pad ids for generation: those of generation_config.json, else of the configuration."""
    ids = {name: getattr(original, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if (source / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(source)
        ids |= {name: found for name in ids if (found := getattr(generation, name)) is not None}
    return ids


def infini_config(original: PreTrainedConfig, given: dict[str, Any], source: Path) -> InfiniConfig:
    """Make the Infini configuration from the original and the options given.

    Raises ValueError if the original cannot be represented. RoPE is compared numerically on a segment's positions.
    """
    longest, limit = original.max_position_embeddings, "max_position_embeddings"
    if isinstance(original, InfiniConfig):
        kept, longest, limit = original.to_dict(), original.segment_length, "segment_length"
    else:
        kept = {name: getattr(original, name) for name in KEPT if hasattr(original, name)}
        # The original's weights know of no memory: until there is something to read, they are left alone.
        kept |= {"gate_init": GATE_INIT, "memory_base": False}
        if original.model_type in ("qwen2", "qwen3"):
            # Qwen2 has biases everywhere but in the output projection, where they are added as zeros.
            kept |= {"attention_bias": True} if original.model_type == "qwen2" else {"qk_norm": True}
            if len(kinds := set(original.layer_types)) > 1:
                raise ValueError(
                    f"{source}: layer_types: found {', '.join(sorted(kinds))}, expected one for all layers"
                )
        if original.model_type == "gemma":
            kept["tie_word_embeddings"] = False  # the input embeddings are scaled (`plain_gemma`)
            if getattr(original, "use_bidirectional_attention", False):
                raise ValueError(f"{source}: use_bidirectional_attention: found true, expected causal attention")
        if (window := getattr(original, "sliding_window", None)) is not None:
            kept["sliding_window"] = window
            length = given.get("segment_length", InfiniConfig.segment_length)
            if window > length or given.get("sliding_window", window) != window:
                raise ValueError(
                    f"{source}: sliding_window: found {window}, expected the same here and at most segment_length = "
                    f"{length}: a segment sees no more of the one before than its own length"
                )
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
    positions = torch.arange(config.near_length + config.segment_length)[None]
    tables = [LlamaRotaryEmbedding(c)(torch.zeros(1), positions) for c in (original, config)]  # type: ignore[arg-type]
    if not all(torch.equal(a, b) for a, b in zip(*tables, strict=True)):
        raise ValueError(
            f"{source}: rope_parameters: found {config.rope_parameters}, which depend on max_position_embeddings; "
            "an Infini model increases that, so the factor must be given explicitly"
        )
    return config


def copy_other_files(source: Path, directory: Path) -> None:
    """Copy what `directory` lacks of an Infini model directory except weights and card: tokenizer files and code."""
    for file in source.iterdir():
        wanted = file.suffix in (".json", ".model", ".jinja", ".py") and file.name != WEIGHTS_INDEX
        if wanted and not (directory / file.name).exists():
            shutil.copyfile(file, directory / file.name)


def copy_tokenizer(source: Path, gguf: Path | None, config: InfiniConfig, directory: Path) -> None:
    """Write the original's tokenizer, if it has one.

    The tokenizer is loaded and saved, because its class may be given only by the original's model type. The bytes of
    tokenizer.json and tokenizer.model do not change, so that datasets made with them are recognised.
    """
    kept = [] if gguf else [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not (gguf or kept or (source / "vocab.json").is_file()):
        return
    where = gguf.parent if gguf else source
    arguments: dict[str, Any] = {"gguf_file": gguf.name} if gguf else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False, **arguments)
    except Exception as error:  # damaged files make the many tokenizer classes raise errors of any type
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
        raise ValueError(f"{source}: its tokenizer gives other tokens when it is loaded for the model type 'infini'")
