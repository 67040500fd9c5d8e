"""A server with vLLM's calls and a tiny model behind them, for every fault that a real one may have. `python -m fake_vllm --model …`
takes vLLM's arguments."""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

Tamper = Callable[[str, dict[str, Any]], Any]
"""Called with the path and the answer: returns another answer, a status (with words), or None to break the connection off."""


class FakeVllm(ThreadingHTTPServer):
    """`asked` are the bodies of all calls; `tamper` spoils answers."""

    daemon_threads = True

    def __init__(
        self, model: str, port: int = 0, *, context: int = 64, versions: bool = True, key: str | None = None
    ) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.context, self.versions, self.key = context, versions, key
        self.version, self.paused = "default", False
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.computing = 0
        self.counting = threading.Lock()
        self.adapters: dict[str, Any] = {}
        self.raw = False
        self.ignores_weights = False
        self.tamper: Tamper = lambda _, answer: answer
        self.load(model)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        pass  # a client that went away

    def settle(self) -> None:
        """Wait until no thread computes: one that does while Python ends takes the process down."""
        until = time.monotonic() + 20
        while self.computing and time.monotonic() < until:
            time.sleep(0.01)

    def load_adapter(self, name: str, folder: str) -> Any:
        if name in self.adapters:
            return 400, f"The lora adapter '{name}' has already been loaded"
        base = AutoModelForCausalLM.from_pretrained(self.folder)
        self.adapters[name] = PeftModel.from_pretrained(base, folder).eval()
        return {}

    def load(self, folder: str) -> None:
        self.folder = folder
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def die_at(self, path: str, version: str) -> None:
        """Answer nothing more, from the first call of this path on that comes when the weights' version ends so."""

        def die(asked: str, answer: dict[str, Any]) -> Any:
            dead = self.version.endswith(version) and asked == path
            if dead:
                self.tamper = lambda *_: None
            return None if dead else answer

        self.tamper = die

    @torch.no_grad()
    def sample(self, model: str, prompt: list[int], settings: dict[str, Any]) -> tuple[list[int], list[float], str]:
        generator = torch.Generator().manual_seed(settings["seed"])
        ids: list[int] = []
        logps: list[float] = []
        while len(ids) < min(settings["max_tokens"], self.context - len(prompt)):
            logits = self.adapters.get(model, self.model)(torch.tensor([[*prompt, *ids]])).logits[0, -1].double()
            for i, bias in (settings.get("logit_bias") or {}).items():
                logits[int(i)] += bias
            temperature = settings["temperature"]
            tempered = logits / (temperature or 1.0)
            if settings["top_k"]:
                tempered[tempered < tempered.topk(settings["top_k"]).values[-1]] = -torch.inf
            drawn = int(torch.multinomial(tempered.softmax(-1), 1, generator=generator))
            ids.append(int(logits.argmax()) if temperature == 0 else drawn)
            logps.append(float((logits if self.raw else tempered).log_softmax(-1)[ids[-1]]))
            if ids[-1] in settings["stop_token_ids"]:
                return ids, logps, "stop"
        return ids, logps, "length"


class Handler(BaseHTTPRequestHandler):
    server: FakeVllm
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        size = int(self.headers.get("content-length", 0))
        self._answer(json.loads(self.rfile.read(size)) if size else {})

    def _answer(self, body: dict[str, Any]) -> None:
        server, path = self.server, urlsplit(self.path).path
        server.asked.append((path, body))
        if server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
            found: Any = 401
        else:
            with server.counting:
                server.computing += 1
            try:
                found = self._call(path, body)
            finally:
                with server.counting:
                    server.computing -= 1
            if isinstance(found, dict):
                found = server.tamper(path, found)
        if found is None:
            self.close_connection = True
            self.connection.close()
            return
        status, words = found if isinstance(found, tuple) else (found if isinstance(found, int) else 200, "no")
        content = found if isinstance(found, dict) else {"error": {"message": words}}
        in_words = status == 200 and path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
        text = b"Success: it is done." if in_words else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _call(self, path: str, body: dict[str, Any]) -> Any:
        server = self.server
        if path == "/v1/models":
            served: list[dict[str, Any]] = [{"id": "it", "parent": None, "max_model_len": server.context}]
            return {"data": [*served, *({"id": name, "parent": "it"} for name in server.adapters)]}
        if path == "/v1/load_lora_adapter":
            return server.load_adapter(body["lora_name"], body["lora_path"])
        if path == "/v1/unload_lora_adapter":
            return {} if server.adapters.pop(body["lora_name"], None) is not None else 404
        if path == "/weight_info":
            return {"weight_version": server.version}
        if path == "/update_weight_version":
            server.version = body["new_version"]
        if path == "/collective_rpc" and not server.ignores_weights:
            server.load(body["kwargs"]["weights_path"])
        if path in ("/pause", "/resume"):
            server.paused = path == "/pause"
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == "/inference/v1/generate":
            return self._generated(body) if server.versions else 403
        if path == "/v1/completions":
            return self._completed(body)
        return {}

    def _generated(self, body: dict[str, Any]) -> dict[str, Any]:
        if len(body["sampling_params"]) == 1:  # the question whether this call is there
            return {}
        ids, logps, reason = self.server.sample(body["model"], body["token_ids"], body["sampling_params"])
        content = [{"token_id": i, "logprob": x} for i, x in zip(ids, logps, strict=True)]
        versions = [{"version": self.server.version, "start": 0, "end": len(ids)}]
        choice = {
            "token_ids": ids,
            "finish_reason": reason,
            "weight_versions": versions,
            "logprobs": {"content": content},
        }
        return {"prompt_token_ids": body["token_ids"], "choices": [choice]}

    def _completed(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, logps, reason = self.server.sample(body["model"], body["prompt"], body)
        choice = {"token_ids": ids, "finish_reason": reason, "logprobs": {"token_logprobs": logps}}
        return {"choices": [{**choice, "prompt_token_ids": body["prompt"], "text": "…"}]}


@contextmanager
def serving(model: str, port: int = 0, **options: Any) -> Iterator[FakeVllm]:
    """A server in a thread."""
    server = FakeVllm(model, port, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        server.settle()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--port", type=int)
    parser.add_argument("--max-model-len", type=int, default=64)
    parser.add_argument("--fail", action="store_true")
    known, _ = parser.parse_known_args()
    if known.fail:
        raise SystemExit("ValueError: no memory for the KV cache")
    torch.set_num_threads(1)
    with serving(known.model, known.port, context=known.max_model_len):
        time.sleep(600)
