"""An inference server of the tests: a tiny model of transformers that answers as vLLM, SGLang and OpenAI's completions do.

Its answers are those that real servers were seen to give (vLLM 0.32), or document (SGLang).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remote.scripted import Asked, Reply

MAX_LOGPROBS = 32


class ModelServer:
    """Answers requests with what the model says. `change(asked, body)` may spoil an answer before it is sent."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "tiny",
        max_logprobs: int = MAX_LOGPROBS,
        change: Callable[[Asked, Any], Any] = lambda asked, body: body,
        context: int = 512,
        ends: Sequence[int] = (),
    ) -> None:
        """`ends` are the ids that end an answer that it writes itself; without them it refuses to write any."""
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.max_logprobs = max_logprobs
        self.change = change
        self.context = context
        self.ends = tuple(ends)
        self._draws = 0
        self._said: dict[tuple[object, ...], Any] = {}
        """Answers by question: many are asked again."""

    def __call__(self, asked: Asked) -> Reply | None:
        answers: dict[str, Callable[[Any], Any]] = {
            "/v1/models": self.models,
            "/v1/completions": self.completions,
            "/generate": self.generate,
            "/detokenize": lambda body: {"prompt": self.tokenizer.decode(body["tokens"])},
        }
        answer = answers.get(asked.path)
        if answer is None:
            return Reply(status=404, body={"detail": "Not Found"})
        made = answer(asked.body) if asked.path != "/v1/completions" else self._known(asked.body)
        reply = made if isinstance(made, Reply) else Reply(body=made)
        if reply.status == 200:
            changed = self.change(asked, reply.body)
            reply = changed if isinstance(changed, Reply) or changed is None else Reply(body=changed)
        return reply

    def _known(self, body: Mapping[str, Any]) -> Any:
        key = (id(self.model), json.dumps(body))
        if key not in self._said:
            self._said[key] = self.completions(body)
        return self._said[key]

    def models(self, _: object) -> Any:
        return {"data": [{"id": self.name, "max_model_len": self.context}]}

    @torch.no_grad()
    def logp(self, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
        """Row t is about token t + 1."""
        return (self.model(torch.tensor([ids])).logits[0].float() / temperature).log_softmax(-1)

    def completions(self, body: Mapping[str, Any]) -> Any:
        if body["model"] != self.name:
            return Reply(status=404, body={"error": {"message": f"The model `{body['model']}` does not exist."}})
        if "prompt_logprobs" not in body and not body.get("echo"):
            return self._written(body)
        k = body.get("prompt_logprobs", body.get("logprobs"))
        if k > self.max_logprobs:
            words = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            return Reply(status=400, body={"error": {"message": words}})
        one = self._echoed if body.get("echo") else self._prompt_scored
        return {"choices": [{"index": i, **one(ids, k)} for i, ids in enumerate(body["prompt"])]}

    @torch.no_grad()
    def _write(self, prompt: list[int], limit: int, temperature: float, seed: int) -> tuple[list[int], bool]:
        """Ids of an answer, the one that ends it included, and whether it ended."""
        generator, ids = torch.Generator().manual_seed(seed), list(prompt)
        while len(ids) < len(prompt) + limit:
            logits = self.model(torch.tensor([ids])).logits[0, -1].float()
            probabilities = (logits / max(temperature, 1e-6)).softmax(-1)
            ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
            if ids[-1] in self.ends:
                return ids[len(prompt) :], True
        return ids[len(prompt) :], False

    def _written(self, body: Mapping[str, Any]) -> Any:
        if not self.ends:
            return Reply(status=400, body={"error": {"message": "this server scores and does not write"}})
        ids, ended = self._write(body["prompt"], body["max_tokens"], body["temperature"], body["seed"])
        choice: dict[str, Any] = {"index": 0, "text": self.tokenizer.decode(ids, skip_special_tokens=True)}
        choice["finish_reason"] = "stop" if ended else "length"
        if body.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": body["prompt"]}
        if body.get("return_tokens_as_token_ids"):
            choice["logprobs"] = {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": [-1.0] * len(ids)}
        return {"choices": [choice]}

    def _generated(self, body: Mapping[str, Any]) -> Any:
        """SGLang's answer to one prompt; what ended it stands beside its ids."""
        if not self.ends:
            return Reply(status=400, body={"error": {"message": "this server scores and does not write"}})
        settings = body["sampling_params"]
        self._draws += 1
        ids, ended = self._write(body["input_ids"], settings["max_new_tokens"], settings["temperature"], self._draws)
        reason: dict[str, Any] = {"type": "stop", "matched": ids[-1]} if ended else {"type": "length"}
        kept = ids[:-1] if ended else ids
        meta = {"finish_reason": reason, "output_token_logprobs": [[-1.0, i, None] for i in kept]}
        return {"text": self.tokenizer.decode(kept), "meta_info": meta}

    def _prompt_scored(self, ids: list[int], k: int) -> dict[str, Any]:
        logp = self.logp(ids)
        entries: list[Any] = [None]
        for place, token in enumerate(ids[1:]):
            best = logp[place].topk(k)
            rank = int((logp[place] >= logp[place, token]).sum())
            table = {str(token): (float(logp[place, token]), rank)}
            table |= {
                str(int(i)): (float(v), n + 1) for n, (v, i) in enumerate(zip(best.values, best.indices, strict=True))
            }
            entries.append(
                {
                    key: {"logprob": value, "rank": place_in, "decoded_token": self.tokenizer.decode([int(key)])}
                    for key, (value, place_in) in table.items()
                }
            )
        return {"text": "", "prompt_token_ids": ids, "prompt_logprobs": entries, "finish_reason": "length"}

    def _echoed(self, ids: list[int], k: int) -> dict[str, Any]:
        logp = self.logp(ids)
        values: list[Any] = [None]
        tables: list[Any] = [None]
        for place, token in enumerate(ids[1:]):
            best = logp[place].topk(k)
            tables.append({f"token_id:{int(i)}": float(v) for v, i in zip(best.values, best.indices, strict=True)})
            tables[-1][f"token_id:{token}"] = float(logp[place, token])
            values.append(float(logp[place, token]))
        tokens = [f"token_id:{token}" for token in ids]
        return {"text": "", "logprobs": {"tokens": tokens, "token_logprobs": values, "top_logprobs": tables}}

    def generate(self, body: Mapping[str, Any]) -> Any:
        if not isinstance(body["input_ids"][0], list):
            return self._generated(body)
        answers = []
        for ids, start in zip(body["input_ids"], body["logprob_start_len"], strict=True):
            logp = self.logp(ids, body["sampling_params"]["temperature"])
            given: list[Any] = [[None, ids[start], None]]
            tables: list[Any] = [None]
            for place in range(start, len(ids) - 1):
                best = logp[place].topk(body["top_logprobs_num"])
                given.append([float(logp[place, ids[place + 1]]), ids[place + 1], None])
                tables.append([[float(v), int(i), None] for v, i in zip(best.values, best.indices, strict=True)])
            meta = {"prompt_tokens": len(ids), "input_token_logprobs": given}
            meta |= {"input_top_logprobs": tables} if body["top_logprobs_num"] else {}
            answers.append({"text": "", "meta_info": meta})
        return answers
