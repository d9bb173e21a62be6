"""`infini-train serve` with the real `openai` client: the text that `generate` makes, streamed or not."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import infini_train.hf  # noqa: F401 (the Auto classes)
from tests.helpers.exports import tiny_export

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
GREEDY = {"max_tokens": 12, "temperature": 0}
CHAT = [{"role": "user", "content": "def f(x):"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    export = tiny_export(tmp_path_factory.mktemp("serving") / "export", memory="selective-delta")
    (export / "chat_template.jinja").write_text(TEMPLATE)
    # No bytes, which random weights would not put together to UTF-8, and no EOS.
    generation = json.loads((export / "generation_config.json").read_text()) | {"suppress_tokens": [*range(259)]}
    (export / "generation_config.json").write_text(json.dumps(generation))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = ["serve", str(export), "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "infini_train", *words], env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    try:
        for _ in range(1000):
            assert process.poll() is None, "the server has ended"
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health")
                break
            except OSError:
                time.sleep(0.1)
        client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
        tokenizer = AutoTokenizer.from_pretrained(export)
        yield SimpleNamespace(export=str(export), client=client, process=process, tokenizer=tokenizer)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def expected(server: SimpleNamespace, text: str, seed: int = 0, **options: Any) -> str:
    """What `generate` makes, by default greedily."""
    model = AutoModelForCausalLM.from_pretrained(server.export).eval()
    prompt = server.tokenizer(text, return_tensors="pt")
    torch.manual_seed(seed)
    made = model.generate(**prompt, max_new_tokens=GREEDY["max_tokens"], **{"do_sample": False, **options})
    return server.tokenizer.decode(made[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_completions_are_what_generate_makes(server: SimpleNamespace) -> None:
    client, model = server.client, server.export
    assert [m.id for m in client.models.list()] == [model]
    texts = ["def f(x):", "import os\n" * 20]
    wanted = [expected(server, text) for text in texts]
    assert wanted[0] != wanted[1]
    whole = client.completions.create(model=model, prompt=texts[0], **GREEDY)
    assert whole.choices[0].text == wanted[0]
    assert whole.usage.prompt_tokens == len(server.tokenizer(texts[0]).input_ids)

    def streamed(text: str) -> tuple[str, int]:
        parts = [
            chunk.choices[0].text
            for chunk in client.completions.create(model=model, prompt=text, stream=True, **GREEDY)
        ]
        return "".join(parts), len(parts)

    with ThreadPoolExecutor(2) as two:  # at once
        found = list(two.map(streamed, texts))
    assert [text for text, _ in found] == wanted
    assert all(parts > 2 for _, parts in found)


@pytest.mark.parametrize("asked", [{"temperature": 1.5}, {"top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}])
def test_a_request_with_a_temperature_or_top_p_samples(server: SimpleNamespace, asked: dict[str, float]) -> None:
    """As `generate` does from the same seed; a temperature of 0 is greedy, and so is a request that says nothing."""
    text, found = "import os\n" * 20, []
    for seed in (1, 2):
        options: dict[str, Any] = {"model": server.export, "prompt": text, "max_tokens": 12, "seed": seed}
        found.append(server.client.completions.create(**options, **asked).choices[0].text)
        assert found[-1] == expected(server, text, seed, do_sample=True, **asked)
    greedy = expected(server, text)
    assert len({*found, greedy}) == 3
    for plain in ({}, {"temperature": 0, "top_p": 0.9}):
        assert server.client.completions.create(**options, **plain).choices[0].text == greedy


def test_an_answer_ends_at_a_stop_string(server: SimpleNamespace) -> None:
    whole = expected(server, "def f(x):")
    stop = whole[2:4]
    found = server.client.completions.create(model=server.export, prompt="def f(x):", stop=[stop], **GREEDY)
    assert found.choices[0].text == whole[: whole.index(stop) + 2] != whole


def test_chats_use_the_template_and_bos(server: SimpleNamespace) -> None:
    client, model = server.client, server.export
    wanted = expected(server, "user: def f(x):\nassistant:")  # the tokenizer puts BOS before it
    whole = client.chat.completions.create(model=model, messages=CHAT, **GREEDY)
    assert whole.choices[0].message.content == wanted
    chunks = client.chat.completions.create(model=model, messages=CHAT, stream=True, **GREEDY)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted


def test_the_next_turn_of_a_conversation(server: SimpleNamespace) -> None:
    """It continues from the turn before (test_prefixes.py), and gives what `generate` makes of the whole text."""
    client, model = server.client, server.export
    answer = client.chat.completions.create(model=model, messages=CHAT, **GREEDY).choices[0].message.content
    chat = [*CHAT, {"role": "assistant", "content": answer}, {"role": "user", "content": "import os"}]
    wanted = expected(server, f"user: def f(x):\nassistant: {answer}\nuser: import os\nassistant:")
    whole = client.chat.completions.create(model=model, messages=chat, **GREEDY)
    assert whole.choices[0].message.content == wanted
    chunks = client.chat.completions.create(model=model, messages=chat, stream=True, **GREEDY)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted


def test_two_conversations_at_once(server: SimpleNamespace) -> None:
    """Each answer is that to its own conversation, turn after turn, while the turns of the other come in between."""

    def talk(said: str) -> list[tuple[str, str]]:
        chat: list[dict[str, str]] = []
        turns, text = [], ""
        for turn in range(3):
            chat.append({"role": "user", "content": f"{said} {turn}"})
            text += f"user: {said} {turn}\nassistant:"
            parts = server.client.chat.completions.create(model=server.export, messages=chat, stream=True, **GREEDY)
            answer = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
            turns.append((text, answer))
            chat.append({"role": "assistant", "content": answer})
            text += f" {answer}\n"
        return turns

    with ThreadPoolExecutor(2) as two:
        conversations = list(two.map(talk, ("def f(x):", "import os")))
    assert conversations[0][0][1] != conversations[1][0][1]
    for text, answer in (turn for turns in conversations for turn in turns):
        assert answer == expected(server, text), text


@pytest.mark.slow
def test_memory_does_not_grow_with_the_prompt(server: SimpleNamespace) -> None:
    def peak(tokens: int) -> int:
        text = "x" * tokens
        made = server.client.completions.create(model=server.export, prompt=text, **GREEDY)
        assert made.usage.prompt_tokens > tokens / 2
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0])

    first = peak(20_000)
    assert peak(200_000) < 1.1 * first


def test_another_model_is_refused(server: SimpleNamespace) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        server.client.completions.create(model="other", prompt="x")
    assert "Server is pinned to" in refused.value.response.json()["detail"]
