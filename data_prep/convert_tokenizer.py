"""Makes a tokenizer.json of a file of tiktoken or of a tekken.json, and compares it with the file's own library."""

import base64
import binascii
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter

from infini_train.files import new_directory
from infini_train.tokenizer.loading import CONFIG, JSON, ROUND_TRIPS, load_tokenizer

# How encodings split a text into words, as Oniguruma, which `tokenizers` uses, takes it: its `{1,3}+` is another.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    ),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
# The pattern, and the id of <|endoftext|>, of the encodings whose files OpenAI calls so.
ENCODINGS = {
    "r50k_base": ("gpt2", 50256),
    "p50k_base": ("gpt2", 50256),
    "cl100k_base": ("cl100k", 100257),
    "o200k_base": ("o200k", 199999),
}
END_OF_TEXT = "<|endoftext|>"
SAMPLES = 500  # texts of random tokens that both encode
TEXTS = (
    *ROUND_TRIPS,
    "It's 1234567 o'clock, isn't it? I'LL see: 3.14159...\n\n\n  Yes!!\t\t\r\n\r\nend  ",
    "def f(x):\n    return x ** 2  # comment\n\n\nclass A:\n\tpass\n",
    "Der Müller aß Äpfel; ça va? Привет, мир! 漢字かな交じり文。 مرحبا 안녕하세요 नमस्ते 😀👩‍👩‍👧",
    "https://example.org/a/b?c=d&e=f#g//h\n/usr/bin\n",
)

Ranks = dict[bytes, int]


class Converter(TikTokenConverter):
    """transformers' converter, for ranks that are known and whose ids begin at `first`."""

    def __init__(self, ranks: Ranks, pattern: str, first: int, special: dict[str, int]) -> None:
        super().__init__(vocab_file="", pattern=pattern)
        self.ranks, self.first, self.special = ranks, first, special

    def load_tiktoken_bpe(self, tiktoken_url: str) -> Ranks:  # type: ignore[override]
        return self.ranks

    def extract_vocab_merges_from_model(self, tiktoken_url: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
        vocabulary, merges = super().extract_vocab_merges_from_model(tiktoken_url)
        return {token: self.first + rank for token, rank in vocabulary.items()} | self.special, merges


def convert_tokenizer(
    path: Path, output: Path, pattern: str | None = None, bos: str | None = None, eos: str | None = None
) -> None:
    """Make a directory with the tokenizer.json that is equal to a tokenizer of tiktoken or tekken.

    Args:
        path: a file of tiktoken (*.tiktoken; Llama 3's tokenizer.model is one, too), or a tekken.json.
        output: directory to make.
        pattern: how a file of tiktoken splits a text into words, a name of PATTERNS or a regular expression; None if
            the file is called as one of ENCODINGS, or is a tekken.json, which tells.
        bos: text of BOS, which gets the first id behind those of the file; None if EOS is used as BOS, too.
        eos: text of EOS, which gets the next id; None for that of the encoding.

    Raises:
        FileExistsError: `output` exists.
        FileNotFoundError: `path` does not exist.
        ValueError: it is no such file, an argument is missing or not used, a package is missing, or the result
            encodes one of the texts that are tried in another way than the file's own library.
    """
    content = path.read_bytes()
    if content.lstrip()[:1] == b"{":
        if pattern or bos or eos:
            raise ValueError(
                f"{path}: found --pattern, --bos or --eos, expected none: a tekken.json tells them itself"
            )
        made, config, peer = _tekken(path, content)
    else:
        made, config, peer = _tiktoken(path, content, pattern, bos, eos)
    with new_directory(output) as directory:
        made.save(str(directory / JSON))
        (directory / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        tokenizer = load_tokenizer(directory)
        texts = [*TEXTS, *_random_texts(made)]
        for text in texts:
            if (found := tokenizer.encode(text)[1:-1].tolist()) != (expected := peer(text)):
                raise ValueError(
                    f"{path} cannot be converted: it encodes {text!r} as {expected}, tokenizer.json as {found}"
                )
    print(f"{output}: {tokenizer.vocab_size:,} tokens; encodes {len(texts):,} texts as {path} does")


def _tiktoken(
    path: Path, content: bytes, pattern: str | None, bos: str | None, eos: str | None
) -> tuple[tokenizers.Tokenizer, dict[str, str], Callable[[str], list[int]]]:
    """Return the converted tokenizer, its configuration, and the function of tiktoken that encodes a text."""
    ranks = _ranks(path, content)
    known = ENCODINGS.get(path.stem)
    if known and not (pattern or bos or eos):
        pattern, special = known[0], {END_OF_TEXT: known[1]}
    elif pattern and eos:
        special = {token: len(ranks) + number for number, token in enumerate(filter(None, (bos, eos)))}
    else:
        raise ValueError(
            f"{path}: a file of tiktoken does not tell how a text is split into words, nor its EOS: give --pattern "
            f"({', '.join(PATTERNS)} or a regular expression), --eos and, if it has one, --bos"
        )
    expression = PATTERNS.get(pattern, pattern)
    tiktoken = _package("tiktoken")
    try:
        peer = tiktoken.Encoding(path.stem, pat_str=expression, mergeable_ranks=ranks, special_tokens={})
    except ValueError as error:
        raise ValueError(f"pattern: found {pattern!r}, expected a regular expression: {error}") from None
    last = list(special)[-1]
    config = {"bos_token": next(iter(special)), "eos_token": last}
    return _converted(ranks, expression, 0, special), config, lambda text: peer.encode(text, disallowed_special=())


def _tekken(path: Path, content: bytes) -> tuple[tokenizers.Tokenizer, dict[str, str], Callable[[str], list[int]]]:
    """Return the converted tokenizer, its configuration, and the function of mistral-common that encodes a text."""
    _package("mistral_common")
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    try:
        about = json.loads(content)
        pattern, first = about["config"]["pattern"], about["config"]["default_num_special_tokens"]
        size = about["config"]["default_vocab_size"] - first
        ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in about["vocab"][:size]}
        peer = Tekkenizer.from_file(path)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path}: found no tekken.json: {type(error).__name__}: {error}") from None
    special = {peer.id_to_piece(number): number for number in range(first)}
    config = {"bos_token": peer.id_to_piece(peer.bos_id), "eos_token": peer.id_to_piece(peer.eos_id)}
    return _converted(ranks, pattern, first, special), config, lambda text: peer.encode(text, bos=False, eos=False)


def _ranks(path: Path, content: bytes) -> Ranks:
    """Read a file of tiktoken: a line for each token, with its bytes in base64 and its rank."""
    ranks: Ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path}, line {number}: found {line[:40]!r}, expected a token in base64 and its rank"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError(f"{path}: found {len(ranks):,} tokens, expected all 256 bytes and ranks without a gap")
    return ranks


def _converted(ranks: Ranks, pattern: str, first: int, special: dict[str, int]) -> tokenizers.Tokenizer:
    made = Converter(ranks, pattern, first, special).converted()
    made.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in special])
    return made


def _package(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise ValueError(
            f"the package {name.replace('_', '-')} is missing, with which the result is compared: "
            "pip install 'infini-train[tokenizers]'"
        ) from None


def _random_texts(made: tokenizers.Tokenizer) -> list[str]:
    """Return texts of random tokens, always the same ones."""
    draw = random.Random(0)
    size = made.get_vocab_size()
    return [made.decode(draw.choices(range(size), k=draw.randrange(1, 12))) for _ in range(SAMPLES)]
