"""A hub id is refused by its config.json alone: the hub's own client against a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from tests.support.tiny import write_data

ROOT = Path(__file__).resolve().parents[2]

CONFIGS = {
    "someone/quantised": {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}},
    "someone/gpt": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2},
    "someone/encoder": {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 4},
    "someone/unheard": {"model_type": "unheard-of"},
}
SENTENCES = {
    "someone/quantised": "is quantised (gptq): give the 16-bit or 32-bit model that it was made from",
    "someone/gpt": "is a gpt2 model, whose layers are transformers' Conv1D",
    "someone/encoder": "is no causal language model: bert is an encoder",
    "someone/unheard": "model type `unheard-of` but Transformers does not recognize this architecture",
    "someone/gated": "its config.json cannot be fetched from the hub: You are trying to access a gated repo",
}
COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """Serves config.json of CONFIGS, and a gated model; notes every path that is asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        self.server.asked.append(self.path)
        repository, _, file = self.path.strip("/").partition("/resolve/main/")
        body = b""
        if repository == "someone/gated":
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
        elif repository in CONFIGS and file == "config.json":
            body = json.dumps(CONFIGS[repository]).encode()
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{abs(hash(body)):040x}"')
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


SCRIPT = """
import sys
from dynrank_ds.cli import main
for name in sys.argv[1:]:
    assert main(["prepare", "--recipe", "r.yaml", f"model.path={name}"]) == 2
"""


@pytest.mark.slow
def test_prepare_refuses_a_hub_model_before_anything_but_its_configuration_is_asked_for(
    hub: Hub, tmp_path: Path
) -> None:
    write_data(tmp_path / "data.jsonl", samples=4)
    recipe = {
        "model": {"path": "someone/else"},
        "data": {"source": "data.jsonl"},
        "method": {"name": "lora"},
        "train": {"steps": 2},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    variables = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(ROOT),
    }
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, *SENTENCES],
        cwd=tmp_path,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ran.returncode == 0, ran.stderr
    errors = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(SENTENCES)
    for (name, sentence), error in zip(SENTENCES.items(), errors, strict=True):
        assert error.startswith(f"error: model.path {name}") and sentence in error, error
    # Beside files, the hub's client asks for what the hub says of a repository.
    assert {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path} == {"config.json"}
