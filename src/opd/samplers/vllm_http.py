"""The calls of a vLLM server, and what its answers mean. Every failure is a ServerError that says what to do, or a Disconnected."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from opd.errors import ServerError
from opd.remote.keys import ApiKey
from opd.remote.questions import words_of
from opd.samplers.vllm import Answer, Draw, Request, sampling_settings

CONNECT_S = 10.0
GENERATE = "/inference/v1/generate"
COMPLETIONS = "/v1/completions"
LOAD_ADAPTER, UNLOAD_ADAPTER = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
ADAPTERS = (
    "start it with --enable-lora, a --max-lora-rank that holds the student's, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
)
DEV_MODE = "start it with VLLM_SERVER_DEV_MODE=1 in its environment"
SETTLE_S = 1.0  # until an API knows that the engine behind it is dead


class Disconnected(Exception):
    """The server is not there, or went away before it answered."""


class VllmHttp:
    """One server's calls. Threads may share it."""

    def __init__(self, url: str, *, key: ApiKey | None, timeout: float, connections: int) -> None:
        """`timeout` is in seconds, for one answer."""
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.model = ""
        self.max_model_len = 0
        self.on_cpu = False
        self.tells_versions = False
        """Every answer carries the version of the weights that it came from."""
        self.adapter = ""
        """Name of the adapters that responses are drawn from; empty for the served model itself."""
        self._key = key
        self._client = httpx.Client(
            base_url=self.url,
            headers=None if key is None else key.headers,
            timeout=httpx.Timeout(timeout, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=connections + 4, max_keepalive_connections=connections + 4),
            trust_env=False,  # a proxy would see every prompt
        )

    def close(self) -> None:
        """Drop all connections; the server gives up what it is asked through them."""
        self._client.close()

    def healthy(self) -> bool:
        """The server answers."""
        try:
            return self._client.get("/health", timeout=CONNECT_S).status_code == 200
        except httpx.HTTPError:
            return False

    def meet(self) -> None:
        """Learn the served model, its context, and whether answers carry versions."""
        served = self._call("GET", "/v1/models")
        base = [one for one in served.get("data", ()) if one.get("parent") is None]
        if not base or not isinstance(base[0].get("max_model_len"), int):
            raise ServerError(
                f"{self.url} does not say which model it serves and how long its context is, so it is no vLLM server; point rollout.vllm.url "
                "to one."
            )
        about = self._post("/server_info", None, method="GET", parameters={"config_format": "json"})
        self.on_cpu = about.status_code == 200 and '"device_config":{"device":"cpu"' in about.text.replace(" ", "")
        self.model, self.max_model_len = str(base[0]["id"]), int(base[0]["max_model_len"])
        body = {"model": self.model, "token_ids": [0], "sampling_params": {"max_tokens": 1}}
        self.tells_versions = self._post(GENERATE, body).status_code == 200  # 403 or 404 without --enable-scale-out

    # --- weights ------------------------------------------------------------------------------------------------------

    def version(self) -> str:
        """The tag of the weights in use."""
        return str(self._call("GET", "/weight_info", advice=DEV_MODE).get("weight_version"))

    def load_weights(self, folder: str, tag: str) -> None:
        """The weights in this folder, under this tag, for every answer from now on. Raises ServerError where they did not arrive."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        not_seen = (
            f"it has to see the folder {folder} (rollout.vllm.sync_dir names one on a disk that both share) and to serve the student's own "
            "architecture"
        )
        self._change(tag, lambda: self._call("POST", "/collective_rpc", body, advice=not_seen))

    def load_adapter(self, folder: str, tag: str) -> None:
        """The adapters in this folder beside the served model, under this tag, for every answer from now on. Raises ServerError where
        they did not arrive."""

        def change() -> None:
            served = self._call("GET", "/v1/models").get("data", ())
            there = [str(one["id"]) for one in served if one.get("parent") is not None]
            # A name of its own for every version: one that is loaded in place is read from its folder again at every token.
            if tag not in there:
                self._call(
                    "POST", LOAD_ADAPTER, {"lora_name": tag, "lora_path": folder}, advice=ADAPTERS, in_words=True
                )
            for name in there:
                if name != tag:
                    self._call("POST", UNLOAD_ADAPTER, {"lora_name": name}, in_words=True)

        self._change(tag, change)
        self.adapter = tag

    def _change(self, tag: str, change: Callable[[], object]) -> None:
        """Other weights between two answers, and nothing of the old ones left."""
        self._call("POST", "/pause", parameters={"mode": "wait"}, advice=DEV_MODE)
        change()
        if self._call("POST", "/reset_prefix_cache").get("success") is False:
            raise ServerError(
                f"{self.url} did not empty its prefix cache after new weights, so it would answer with keys and values of the old ones. Somebody "
                "else is using it; give the run a server of its own."
            )
        self._call("POST", "/update_weight_version", {"new_version": tag})
        self._call("POST", "/resume")
        found = self.version()
        if found != tag:
            raise ServerError(
                f"{self.url} took new weights and still says version {found} in place of {tag}: another run loads weights into it, or it has "
                "several engines of which one did not follow. Give the run a server of its own, and go on with --resume."
            )

    # --- responses ----------------------------------------------------------------------------------------------------

    def draw(self, request: Request, draw: Draw) -> Answer:
        """One response. Its versions are empty where the server's answers carry none."""
        sampling = {**sampling_settings(draw), "seed": request.seed}
        ids = list(request.prompt_ids)
        model = self.adapter or self.model
        if self.tells_versions:
            body = {"model": model, "token_ids": ids, "sampling_params": sampling, "return_token_ids": True}
            return read_generated(self._call("POST", GENERATE, body), self.url)
        body = {"model": model, "prompt": ids, **sampling, "return_token_ids": True}
        return read_completion(self._call("POST", COMPLETIONS, body), self.url)

    def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        parameters: Mapping[str, str] | None = None,
        advice: str = "look at its log",
        in_words: bool = False,
    ) -> dict[str, Any]:
        """The answer; `in_words` is one that says "Success" and holds no JSON."""
        answer = self._post(path, body, method=method, parameters=parameters)
        if answer.status_code in (401, 403):
            raise ServerError(
                f"{self.url} refused the key ({answer.status_code} for {path}). Put it into an environment variable and name that in "
                "rollout.vllm.api_key_env."
            )
        if answer.status_code in (502, 503, 504):
            raise Disconnected(f"{path}: {answer.status_code}")
        if answer.status_code == 500 and self._died():
            raise Disconnected(f"{path}: its engine died")
        if answer.status_code != 200:
            words = words_of(answer.content)
            words = words if self._key is None else self._key.hidden(words)
            raise ServerError(f"{self.url} answered {answer.status_code} to {path}: {words}; {advice}.")
        try:
            found = answer.json() if answer.content and not in_words else {}
        except ValueError:
            raise ServerError(
                f"{self.url} answered {path} with no JSON ({answer.text[:80]!r}); is it a vLLM server?"
            ) from None
        return found if isinstance(found, dict) else {"results": found}

    def _died(self) -> bool:
        """The API still answers, and the engine behind it does not live."""
        if self.healthy():
            time.sleep(SETTLE_S)
        return not self.healthy()

    def _post(
        self,
        path: str,
        body: Mapping[str, Any] | None,
        *,
        method: str = "POST",
        parameters: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        try:
            return self._client.request(method, path, json=body, params=parameters)
        except (httpx.ReadTimeout, httpx.PoolTimeout, httpx.WriteTimeout) as error:
            raise ServerError(
                f"{self.url} did not answer {path} within {self.timeout:g} s. Raise rollout.vllm.timeout if it is only slow, or look at its "
                "log; then go on with --resume."
            ) from error
        except (httpx.HTTPError, RuntimeError) as error:  # the second: the client was closed meanwhile
            raise Disconnected(f"{path}: {type(error).__name__}: {error}") from error


def read_generated(found: Mapping[str, Any], name: str) -> Answer:
    """An answer of the token API."""
    choice = _choice(found, name)
    content = (choice.get("logprobs") or {}).get("content") or []
    ids = _ids(choice, name)
    if [one.get("token_id") for one in content] != list(ids):
        raise ServerError(
            f"{name} returned log-probs of other tokens than it sampled; look at its version and its log."
        )
    return Answer(
        prompt_ids=_prompt_ids(found.get("prompt_token_ids")),
        response_ids=ids,
        logp=_logps([one.get("logprob") for one in content], name),
        reason=str(choice.get("finish_reason")),
        versions=tuple(str(span.get("version")) for span in choice.get("weight_versions") or ()),
    )


def read_completion(found: Mapping[str, Any], name: str) -> Answer:
    """An answer of the completions API, which carries no version."""
    choice = _choice(found, name)
    logprobs = choice.get("logprobs") or {}
    return Answer(
        prompt_ids=_prompt_ids(choice.get("prompt_token_ids")),
        response_ids=_ids(choice, name),
        logp=_logps(logprobs.get("token_logprobs") or [], name),
        reason=str(choice.get("finish_reason")),
        versions=(),
    )


def _choice(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    choices = found.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise ServerError(
            f"{name} answered without the one choice that was asked for ({str(found)[:120]}); is it a vLLM server?"
        )
    return choices[0]


def _ids(choice: Mapping[str, Any], name: str) -> tuple[int, ...]:
    ids = choice.get("token_ids")
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
        raise ServerError(
            f"{name} returned text and no token ids: it ignores return_token_ids. opd reads ids alone, because text does not say which tokens "
            "were sampled; use a vLLM server."
        )
    return tuple(ids)


def _prompt_ids(ids: Any) -> tuple[int, ...] | None:
    return tuple(ids) if isinstance(ids, list) else None


def _logps(values: list[Any], name: str) -> tuple[float, ...]:
    if not all(isinstance(x, (int, float)) for x in values):
        raise ServerError(f"{name} returned a token without a log-prob; look for NaN in its log.")
    return tuple(float(x) for x in values)
