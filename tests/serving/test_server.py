"""`consa serve` and an OpenAI client on loopback; `consa bench --engine vllm`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM; run make test-vllm")

from consa import convert, load, rules
from consa.model.load import load_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
PROMPTS = ["The capital of France is", "def quicksort(items):\n" * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = load_model("smollm2-135m")
    shape = loaded.layout.num_layers, loaded.layout.num_kv_heads
    allocation = rules.uniform_heads(*shape, sparsity=0.67, granularity="kv_head", window=64, num_sink_tokens=4)
    folder = tmp_path_factory.mktemp("server") / "hybrid"
    convert(loaded.model, allocation, folder, tokenizer=loaded.tokenizer)
    return folder


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server that answers."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "consa", "serve", str(folder), "--", *options, "--max-model-len", "2048"]
        server = subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
        try:
            for _ in range(600):
                assert server.poll() is None, log.read_text()[-4000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(60)


def test_an_openai_client_gets_the_tokens_of_generate(address: str, folder: Path):
    from openai import OpenAI
    from transformers import AutoTokenizer

    client = OpenAI(base_url=address, api_key="none")
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    assert [found.id for found in client.models.list()] == [str(folder)]
    for prompt in PROMPTS:
        answer = client.completions.create(model=str(folder), prompt=prompt, max_tokens=20, temperature=0)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        wanted = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert answer.choices[0].text == tokenizer.decode(wanted, skip_special_tokens=True)
    message = {"role": "user", "content": "What is 2 + 2?"}
    chat = client.chat.completions.create(model=str(folder), messages=[message], max_tokens=20, temperature=0)
    ids = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    wanted = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert chat.choices[0].message.content == tokenizer.decode(wanted, skip_special_tokens=True)
    stream = client.completions.create(model=str(folder), prompt=PROMPTS[0], max_tokens=20, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in stream)


def test_bench(folder: Path, tmp_path: Path):
    options = ["--engine", "vllm", "--contexts", "300,600", "--batch-sizes", "2", "--decode-tokens", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "consa", "bench", folder, *options, "--repeats", "1", "--out", tmp_path],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 requests at once, 0 preemptions" in done.stdout and "by vLLM's own count" in done.stdout
    record = json.loads((tmp_path / "bench.json").read_text())
    rows = record["measurements"]
    assert [(row["context"], row["model"]) for row in rows] == [
        (context, model) for context in (300, 600) for model in ("dense", "hybrid")
    ]
    assert all(row["prefill_seconds"] > 0 and row["decode_tokens_per_second"] > 0 for row in rows)
    page, layers, heads, head_dim = 128, 30, 3, 64
    for row in rows[::2]:
        pages = -(-(row["context"] + 3) // page)
        assert row["cache_bytes"] == 2 * pages * page * layers * heads * head_dim * 2 * 4  # float32
    for name, generations in record["where"]["workloads"].items():
        assert [row["running_max"] for row in generations] == [2, 2]
        assert {row["plugin"] for row in generations} == {name == "hybrid"}  # the dense model is in stock vLLM
    assert record["where"]["dtype"] == "float32" and record["where"]["engine"].startswith("vLLM 0.32")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
