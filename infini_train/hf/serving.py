"""`infini-train serve`: an OpenAI-compatible server for an export, which is that of transformers."""

from functools import partial
from pathlib import Path
from typing import Any

import jsonargparse
from transformers import AutoTokenizer
from transformers.utils import logging
from transformers.utils.import_utils import is_accelerate_available, is_serve_available

from infini_train.commands import PROGRAM
from infini_train.errors import reported
from infini_train.model.loading import read_config
from infini_train.parsing import Parser

from .prefixes import InfiniWithPrefixes, KeptPrefixes


def serve(
    export: Path,
    host: str = "localhost",
    port: int = 8000,
    device: str = "auto",
    dtype: str = "auto",
    prefixes: int = 16,
) -> None:
    """Serve an export through the OpenAI API (completions, chats, the list of models), whole and streamed.

    Requests are answered one after the other. A chat needs a chat template among the export's tokenizer files.

    Args:
        export: Directory of the exported or imported model. Clients name the model by it, as it is written here.
        host: Address to listen on.
        port: Port to listen on.
        device: Where to run the model, for instance cpu or cuda:0; auto: on GPUs where there are any.
        dtype: Type of the weights, for instance bfloat16; auto: as in the export.
        prefixes: Number of prompts and answers that are kept, so that a prompt that begins with one, such as the next
            turn of a conversation, is read from there on; a conversation takes one or two. 0: none.

    Raises:
        ValueError, OSError: for a directory that holds no Infini model, and where packages are missing.
    """
    if prefixes < 0:
        raise ValueError(f"prefixes: found {prefixes}, expected at least 0")
    if not (export / "config.json").is_file():
        raise FileNotFoundError(f"{export}: expected an exported model (no config.json in it)")
    read_config(export / "config.json")
    if not (is_serve_available() and is_accelerate_available()):
        raise ValueError("serving needs further packages: pip install 'transformers[serving]'")
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    manager: Any = model_manager  # Any, because two of its attributes are replaced
    InfiniWithPrefixes.prefixes = KeptPrefixes(prefixes)
    # The server looks for the class of a model in the module transformers.
    manager.transformers.InfiniForCausalLM = InfiniWithPrefixes
    # It lists the models of the hub's cache, and would fail where there is no cache.
    name = str(export)
    listed = [{"id": name, "object": "model", "created": 0, "owned_by": "local"}]
    manager.ModelManager.get_gen_models = staticmethod(lambda cache_dir=None: listed)
    tokenizer = AutoTokenizer.from_pretrained(export)
    if tokenizer.chat_template is None:
        print(f"{export}: no chat template, so /v1/chat/completions is not available")
    if not tokenizer.is_fast:
        print(f"{export}: no tokenizer.json, so answers cannot be streamed")
    Serve(force_model=name, host=host, port=port, device=device, dtype=dtype)


def main(words: list[str]) -> int:
    """Run the command with its options and return the exit code."""
    logging.disable_progress_bar()
    name = f"{PROGRAM} serve"
    return reported(name, partial(jsonargparse.auto_cli, serve, args=words, prog=name, parser_class=Parser))
