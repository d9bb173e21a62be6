"""Task files: prompts as long as asked, the answer where asked, the same by seed, whole or not at all."""

import json
import random
import re
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_prep.lm_eval_prompts import KeyValuePrompt, fill_prompt, sentence
from infini_train.evaluation.__main__ import main


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A byte-level BPE whose tokens cross the ends of sentences: those of parts do not add up to the whole's."""
    directory = tmp_path_factory.mktemp("tokenizer")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    draw = random.Random(0)
    lines = [sentence(draw) + " " + sentence(draw) for _ in range(200)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(lines, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    return directory


def run(out: Path, tokenizer: Path, *extra: str) -> int:
    return main(["tasks", str(out), "--tokenizer", str(tokenizer), *extra])


def records(out: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"{task}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("of_each_part", [-1, 0, 20])
def test_a_prompt_is_full_where_tokens_of_parts_do_not_add_up(of_each_part):
    """Characters count, and more or fewer for each text; a unit has 14 characters."""
    task = KeyValuePrompt(random.Random(0), 0.5, "<s>")
    prompt, tokens = fill_prompt(task, lambda text: len(text) + of_each_part, 1000, added=1)
    assert tokens == len(prompt) + of_each_part + 1
    assert 1000 - 14 < tokens <= 1000


@pytest.mark.parametrize("kind", ["passkey", "kv"])
def test_prompts_have_the_length_and_the_depth(tmp_path, tokenizer, kind):
    options = ["--lengths", "400", "1500", "--depths", "0", "0.5", "1", "--samples", "2"]
    assert run(tmp_path / "tasks", tokenizer, *options) == 0
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    targets = set()
    for length in (400, 1500):
        found = records(tmp_path / "tasks", f"infini_{kind}_{length}")
        assert [r["depth"] for r in found] == ["depth_0"] * 2 + ["depth_0.5"] * 2 + ["depth_1"] * 2
        for record in found:
            text = record["prompt"]
            # Ids of the prompt, where <s> is BOS itself and not three characters.
            ids = tokens(text, add_special_tokens=False).input_ids
            assert ids[0] == tokens.bos_token_id and tokens.bos_token_id not in ids[1:]
            # Not a token more than asked, and no room for another unit (under 60 tokens).
            assert len(ids) == record["tokens"]
            assert length - 60 < len(ids) <= length
            targets.add(record["target"])
            if kind == "passkey":
                assert re.findall(r"\d+", text) == [record["target"]] * 2
                body = text[text.index("\n\n") : text.rindex("\n\n")]
                at, of = body.index("The pass key"), len(body) - len("The pass key is 12345. ")
            else:
                pairs = dict(re.findall(r"^(\w+): (\d+)$", text, re.MULTILINE))
                asked = text[text.rindex("\n") + 1 : -1]
                assert pairs[asked] == record["target"]
                assert len(pairs) == len(re.findall(r"\d+", text)), "a name stands twice"
                at, of = list(pairs).index(asked), len(pairs) - 1
            depth = float(record["depth"].removeprefix("depth_"))
            assert at / of == pytest.approx(depth, abs=0.12 if length == 400 else 0.06)
    assert len(targets) == 12


def test_the_seed_determines_every_byte_and_lengths_do_not_depend_on_one_another(tmp_path, tokenizer):
    def content(out: str, *extra: str) -> dict[str, str]:
        assert run(tmp_path / out, tokenizer, "--samples", "1", *extra) == 0
        return {file.name: file.read_text() for file in (tmp_path / out).iterdir() if file.suffix == ".jsonl"}

    one = content("one", "--lengths", "400", "700")
    assert content("two", "--lengths", "400", "700") == one
    assert content("three", "--lengths", "700")["infini_kv_700.jsonl"] == one["infini_kv_700.jsonl"]
    other = content("four", "--lengths", "400", "700", "--seed", "1")
    assert all(other[name] != one[name] for name in one)


def test_documents_keep_their_text(tmp_path, tokenizer):
    texts = ["[1, 2]", "ends in a newline\n", "Grüße, \u2581 and 5\n\n"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    files = [str(tmp_path / f"{i}.txt") for i in range(3)]
    assert run(tmp_path / "tasks", tokenizer, "--lengths", "400", "--documents", *files) == 0
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    assert [(r["text"], r["tokens"]) for r in records(tmp_path / "tasks", "infini_documents")] == [
        (text, len(tokens(text, add_special_tokens=False).input_ids)) for text in texts
    ]


def test_a_group_names_the_tasks_that_are_there(tmp_path, tokenizer):
    assert run(tmp_path / "tasks", tokenizer, "--lengths", "400", "500", "--samples", "1") == 0
    group = yaml.safe_load((tmp_path / "tasks" / "infini_kv.yaml").read_text())
    assert group["task"] == ["infini_kv_400", "infini_kv_500"]
    assert all((tmp_path / "tasks" / f"{task}.yaml").is_file() for task in group["task"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--lengths", "20"], "lengths: found 20, expected at least"),
        (["--lengths", "400", "400"], "lengths: found [400, 400], expected each once"),
        (["--depths", "0", "1.5"], "depths: found 1.5, expected 0 to 1"),
        (["--samples", "0"], "samples: found 0, expected at least 1"),
        (["--documents", "{tmp}/none.txt"], "none.txt does not exist"),
        (["--documents", "{tmp}/empty.txt"], "document empty.txt: empty"),
        (["--documents", "{tmp}/latin.txt"], "document latin.txt: not_utf8"),
        (["--tokenizer", "{tmp}"], "no tokenizer_config.json in it"),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(tmp_path, tokenizer, capsys, extra, message):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    before = sorted(tmp_path.iterdir())
    assert run(tmp_path / "tasks", tokenizer, *(word.format(tmp=tmp_path) for word in extra)) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert message in error
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_directory_is_refused(tmp_path, tokenizer, capsys):
    (tmp_path / "tasks").mkdir()
    assert run(tmp_path / "tasks", tokenizer) == 2
    assert "exists" in capsys.readouterr().err
    assert not list((tmp_path / "tasks").iterdir())
