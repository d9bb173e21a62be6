"""The tokenizer of an export: files that `transformers.AutoTokenizer` gives a dataset's own ids from."""

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


def write_tokenizer(tokenizer_file: Path, out: Path, *, bos_id: int, eos_id: int, max_length: int) -> None:
    """Write all tokenizer files of an export, from a sentencepiece model or a tokenizer.json, to the directory `out`.

    `AutoTokenizer.from_pretrained(out)` then encodes every text as `data_prep` does, pads on the left, with EOS
    if the tokenizer has no pad token of its own, and cuts nothing until `max_length` tokens.

    A sentencepiece model (copied to tokenizer.model) reads special tokens in a text as text, and
    `tokenizer(text)` puts BOS before it, as before each document in training. Most BPE models become a
    tokenizer.json; what has no exact equal there (all unigram models) runs sentencepiece itself, by code that
    needs `trust_remote_code=True`. A Hugging Face tokenizer stays as it is: special tokens in a text count, as
    chat templates need it, and BOS is added if it always was.

    Raises FileNotFoundError or ValueError for what is no tokenizer, for one with other ids of BOS and EOS, and if
    the files written do not give the ids of the original on texts made to find differences.
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
    processor = reference.processor
    pad_id = processor.pad_id()
    options: dict[str, Any] = {
        "bos_token": processor.id_to_piece(reference.bos_id),
        "eos_token": processor.id_to_piece(reference.eos_id),
        "unk_token": processor.id_to_piece(processor.unk_id()),
        "pad_token": processor.id_to_piece(pad_id if pad_id >= 0 else reference.eos_id),
        "add_bos_token": True,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": max_length,
    }
    model = ModelProto.FromString(reference.files[MODEL])
    if _has_equal(model):
        return PreTrainedTokenizerFast(tokenizer_object=_byte_pair_encoding(model), **options)
    SentencePieceTextTokenizer.register_for_auto_class()  # its code goes into the export
    return SentencePieceTextTokenizer(str(reference.path), **options)


def _of_hugging_face(reference: HuggingFaceTokenizer, max_length: int) -> PreTrainedTokenizerBase:
    options: dict[str, Any] = {
        "padding_side": "left",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    tokenizer = PreTrainedTokenizerFast.from_pretrained(reference.path.parent, **options)
    if tokenizer.bos_token is None:
        tokenizer.bos_token = reference.bos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = reference.eos_token
    return tokenizer


def _has_equal(model: ModelProto) -> bool:
    """Whether `_byte_pair_encoding` provably gives sentencepiece's ids: BPE that takes the text as it stands.

    Unigram models do not: sentencepiece adds their scores up in float32, `tokenizers` in float64, and where two
    ways to cut a text are equally good (a run of spaces), rounding decides.
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
        # sentencepiece merges two equal scores from left to right, whatever their pieces
        and len(set(scores)) == len(scores)
        # it merges characters that are no pieces themselves
        and names.issuperset("".join(names))
        # not told from a space, or from a byte, by the decoder
        and not any(" " in name or re.fullmatch("<0x..>", name) for name in names)
    )


def _byte_pair_encoding(model: ModelProto) -> tokenizers.Tokenizer:
    """The model in `tokenizers`; its pieces hold plain spaces, so that a space mark in the text stays one.

    Merges are ranked by the scores of the pieces that they make. A piece may be made of several pairs, but BPE
    comes by only one of them, whatever stands around: what happens inside a piece until it is made is what
    happens when it stands alone. So the order among pairs of the same piece is immaterial.
    """
    pieces = {piece.piece.replace(SPACE_MARK, " "): piece.score for piece in model.pieces}
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    never_made = {piece.piece for piece in model.pieces if piece.type != Piece.NORMAL}
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocabulary,
            generate_merges(vocabulary, pieces, never_made),
            unk_token=next(piece.piece for piece in model.pieces if piece.type == Piece.UNKNOWN),
            byte_fallback=True,
        )
    )
    made.add_special_tokens([piece.piece for piece in model.pieces if piece.type in (Piece.CONTROL, Piece.UNKNOWN)])
    bytes_to_text: list[decoders.Decoder] = [decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        made.normalizer = normalizers.Sequence([normalizers.Replace(SPACE_MARK, " "), normalizers.Prepend(" ")])
        made.decoder = decoders.Sequence([*bytes_to_text, decoders.Strip(" ", 1, 0)])
    else:
        made.decoder = decoders.Sequence(bytes_to_text)
    if not any(re.search("[^ ] ", piece) for piece in pieces):  # words can be looked up: four times as fast
        made.pre_tokenizer = pre_tokenizers.Split(Regex(" *[^ ]+| +"), "isolated")
    return made


def _check(written: PreTrainedTokenizerBase, reference: Tokenizer) -> None:
    """Raise ValueError if the tokenizer written disagrees with `reference` on a probe."""
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
        if (back := written.decode(ids)) != reference.decode(tokens):
            raise ValueError(f"tokenizer {reference.path}: transformers decodes {text[:80]!r} as {back[:80]!r}")
