"""Exports a dataset's tokenizer as files from which `transformers.AutoTokenizer` gives exactly the dataset's ids."""

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]  # made at import
from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from infini_train.tokenizer.loading import (
    MODEL,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from infini_train.tokenizer.sentencepiece_text import SPACE_MARK
from infini_train.tokenizer.tokenization_sentencepiece import SentencePieceTextTokenizer

Piece = ModelProto.SentencePiece
PROBES = [
    "",
    " ",
    "\n",
    "  two  spaces at both ends  ",
    "".join(map(chr, range(256))),
    *(" " * n + "x" + "\t" * n + "\r\n" * n for n in range(1, 40)),
    "x<0x0A><0xe2>x",
    f"{SPACE_MARK} {SPACE_MARK}{SPACE_MARK}a{SPACE_MARK}\n{SPACE_MARK}",
    "e\u0301 \ufb01 \u3000 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea 漢字 \ufeff \U0010ffff",
    "a" * 1000 + "=" * 1000 + "3.14159, 2,718; 12345678901234567890",
]


def export_tokenizer(tokenizer_file: Path, out: Path, *, bos_id: int, eos_id: int, max_length: int) -> None:
    """Write all tokenizer files of an export, from a sentencepiece model or a tokenizer.json.

    `AutoTokenizer.from_pretrained(out)` then encodes every text as `infini-train prep` does, except that it encodes
    special tokens in a text as those tokens, which chat templates and fine-tuning need; `split_special_tokens=True`
    encodes them as text, too. It pads on the left, with the tokenizer's own pad token, else the unknown token, else
    EOS, and truncates nothing shorter than `max_length` tokens.

    With a tokenizer from a sentencepiece model (copied to tokenizer.model), `tokenizer(text)` puts BOS before the
    text, as before each document in training. Most BPE models are converted to a tokenizer.json. Models that cannot
    be converted exactly, such as all unigram models, run sentencepiece itself, by code that needs
    `trust_remote_code=True`. A Hugging Face tokenizer stays as it is, and adds BOS if the original adds it.

    Args:
        tokenizer_file: the tokenizer, as `load_tokenizer` takes it.
        out: existing directory to write to.
        bos_id: expected id of BOS.
        eos_id: expected id of EOS.
        max_length: `model_max_length` of the tokenizer, in tokens.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: the file is not a tokenizer, it has other ids of BOS and EOS, or the files written do not give the
            ids of the original on texts that are made to find differences.
    """
    reference = load_tokenizer(tokenizer_file)
    if (reference.bos_id, reference.eos_id) != (bos_id, eos_id):
        raise ValueError(
            f"tokenizer {tokenizer_file}: BOS and EOS are {reference.bos_id} and {reference.eos_id}, "
            f"expected {bos_id} and {eos_id}"
        )
    if isinstance(reference, HuggingFaceTokenizer):
        tokenizer = _of_hugging_face(reference, max_length)
    else:
        assert isinstance(reference, SentencePieceTokenizer)
        tokenizer = _of_sentencepiece(reference, max_length)
        (out / MODEL).write_bytes(reference.files[MODEL])
    tokenizer.save_pretrained(out)
    _check(type(tokenizer).from_pretrained(out), reference)


def _of_sentencepiece(reference: SentencePieceTokenizer, max_length: int) -> PreTrainedTokenizerBase:
    """Make the transformers tokenizer of a sentencepiece model."""
    processor = reference.processor
    options: dict[str, Any] = {
        "bos_token": processor.id_to_piece(reference.bos_id),
        "eos_token": processor.id_to_piece(reference.eos_id),
        "unk_token": processor.id_to_piece(processor.unk_id()),
        "pad_token": processor.id_to_piece(reference.pad_id),
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": max_length,
    }
    model = ModelProto.FromString(reference.files[MODEL])
    if _has_exact_conversion(model):
        return PreTrainedTokenizerFast(tokenizer_object=_byte_pair_encoding(model), **options)
    SentencePieceTextTokenizer.register_for_auto_class()  # save_pretrained then copies its code
    return SentencePieceTextTokenizer(str(reference.path), **options)


def _of_hugging_face(reference: HuggingFaceTokenizer, max_length: int) -> PreTrainedTokenizerBase:
    """Load a Hugging Face tokenizer with BOS, a pad token and our options."""
    options: dict[str, Any] = {
        "padding_side": "left",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    tokenizer = PreTrainedTokenizerFast.from_pretrained(reference.path.parent, **options)
    if tokenizer.bos_token is None:
        tokenizer.bos_token = reference.bos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = reference.pad_token
    return tokenizer


def _has_exact_conversion(model: ModelProto) -> bool:
    """Tell whether `_byte_pair_encoding` gives exactly sentencepiece's ids: for BPE that does not change the text.

    Unigram models have no exact conversion: sentencepiece sums their scores in float32 and `tokenizers` in float64,
    so that rounding decides between equally good segmentations, for instance of a run of spaces.
    """
    normal = [piece for piece in model.pieces if piece.type == Piece.NORMAL]
    names = {piece.piece for piece in normal}
    scores = [piece.score for piece in normal if len(piece.piece) > 1]
    return (
        model.trainer_spec.model_type == TrainerSpec.BPE
        and not model.trainer_spec.treat_whitespace_as_suffix
        and not model.normalizer_spec.precompiled_charsmap
        and not model.normalizer_spec.remove_extra_whitespaces
        and model.normalizer_spec.escape_whitespaces
        and not model.denormalizer_spec.precompiled_charsmap
        and {piece.type for piece in model.pieces} == {Piece.NORMAL, Piece.CONTROL, Piece.UNKNOWN, Piece.BYTE}
        and sum(piece.type == Piece.BYTE for piece in model.pieces) == 256
        # Scores differ: sentencepiece applies merges of equal score from left to right, whatever their pieces.
        and len(set(scores)) == len(scores)
        # All characters are pieces: sentencepiece also merges characters that are not pieces themselves.
        and names.issuperset("".join(names))
        # The decoder can tell all pieces from a space and from a byte.
        and not any(" " in name or re.fullmatch("<0x..>", name) for name in names)
    )


def _byte_pair_encoding(model: ModelProto) -> tokenizers.Tokenizer:
    """Convert a model to `tokenizers`. Its pieces contain plain spaces, so that a space mark in the text stays one.

    Merges are ranked by the scores of the pieces that they produce. Several pairs may produce the same piece, but BPE
    reaches a piece through only one of them, whatever text surrounds it: until a piece is complete, the merges inside
    it are those of the piece alone. The order among pairs of the same piece therefore does not matter.
    """
    pieces = {piece.piece.replace(SPACE_MARK, " "): piece.score for piece in model.pieces}
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    unmergeable = {piece.piece for piece in model.pieces if piece.type != Piece.NORMAL}
    converted = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocabulary,
            generate_merges(vocabulary, pieces, unmergeable),
            unk_token=next(piece.piece for piece in model.pieces if piece.type == Piece.UNKNOWN),
            byte_fallback=True,
        )
    )
    special = (Piece.CONTROL, Piece.UNKNOWN)
    converted.add_special_tokens([piece.piece for piece in model.pieces if piece.type in special])
    bytes_to_text: list[decoders.Decoder] = [decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        converted.normalizer = normalizers.Sequence([normalizers.Replace(SPACE_MARK, " "), normalizers.Prepend(" ")])
        converted.decoder = decoders.Sequence([*bytes_to_text, decoders.Strip(" ", 1, 0)])
    else:
        converted.decoder = decoders.Sequence(bytes_to_text)
    # If no piece contains a space after another character, encoding word by word gives the same ids. It is four times
    # as fast, because words are looked up in a cache.
    if not any(re.search("[^ ] ", piece) for piece in pieces):
        converted.pre_tokenizer = pre_tokenizers.Split(Regex(" *[^ ]+| +"), "isolated")
    return converted


def _check(written: PreTrainedTokenizerBase, reference: Tokenizer) -> None:
    """Raise ValueError if the tokenizer written disagrees with `reference`: in BOS, EOS, size, or the ids of a probe.

    The probes are PROBES, special tokens as text, every piece alone, random pieces in a row, and random repetitions.
    """
    found = written.bos_token_id, written.eos_token_id, max(written.get_vocab().values()) + 1
    if found != (expected := (reference.bos_id, reference.eos_id, reference.vocab_size)):
        raise ValueError(
            f"tokenizer {reference.path}: BOS, EOS, size are {found} in transformers, expected {expected}"
        )
    pieces = [reference.decode(np.array([i])) for i in range(reference.vocab_size)]
    draw = random.Random(0)
    mixed = ["".join(draw.choices(pieces, k=100)) for _ in range(len(pieces) // 50)]
    runs = ["".join(piece * draw.randrange(4) for piece in draw.choices(pieces, k=100)) for _ in range(100)]
    special = [f"x{token}x {token}\n{token}" for token in written.all_special_tokens]
    texts = [*PROBES, *special, *pieces, *mixed, *runs]
    encoded = written(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    for text, ids in zip(texts, encoded, strict=True):
        tokens = reference.encode(text)[1:-1]
        if ids != tokens.tolist():
            raise ValueError(
                f"tokenizer {reference.path}: {text[:80]!r} has the ids {ids[:20]} in transformers, "
                f"expected {tokens[:20].tolist()}"
            )
        if (decoded := written.decode(ids)) != reference.decode(tokens):
            raise ValueError(f"tokenizer {reference.path}: transformers decodes {text[:80]!r} as {decoded[:80]!r}")
