"""vLLM behind HTTP: a server of the user's, or one that opd runs. Weights go through a folder; a server that died is revived."""

from __future__ import annotations

import atexit
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from opd.errors import ServerError
from opd.models import base_model
from opd.samplers.base import SampledStudent
from opd.samplers.vllm import Answer, Draw, Request
from opd.samplers.vllm_http import Disconnected, VllmHttp
from opd.samplers.vllm_process import ServerProcess
from opd.samplers.vllm_weights import SyncFolder, has_tied_head, locked

REVIVALS = 3  # of one call, before the run stops
PATIENCE_S = 30.0  # that a server of the user's may take to come back
RETRY_S = 1.0
FRESH = "default"  # the version of a server that has only read its own model


class VllmServer:
    """An `Engine` that talks to a server. With `process` it starts that server, again when it died, and ends it."""

    def __init__(
        self,
        connect: Callable[[str], VllmHttp],
        sync: SyncFolder,
        *,
        url: str | None = None,
        process: ServerProcess | None = None,
        concurrency: int = 256,
        patience: float | None = None,
        adapters: bool = False,
    ) -> None:
        """One of `url` and `process`. `connect` makes the calls of an address; `patience` is in seconds. `adapters`: the server has the
        student's base once, and every update gives it the adapters alone."""
        assert (url is None) != (process is None)
        self.name = "The managed vLLM server" if url is None else f"The vLLM server at {url}"
        self.max_model_len = 0
        self.say: Callable[[str], None] = lambda _: None
        self.patience = PATIENCE_S if patience is None else patience
        self._connect, self._sync, self._process = connect, sync, process
        self._concurrency = concurrency
        self._adapters = adapters
        self._http: VllmHttp | None = None
        self._url = url
        self._lock: _Claim | None = None
        self._closed = False  # whoever still waits for an answer in another thread starts nothing again
        self._tag = ""  # of the weights that are in the server, as far as this run knows

    def load(self, student: SampledStudent, tag: str) -> None:
        """Writes a folder, and has the server read it. Raises ServerError."""
        atexit.register(self.close)
        self._closed = False
        self._claim()
        if self._adapters:
            self._sync.write_base(student.model)
            folder = self._sync.write_adapter(student.model, student.version)
        else:
            folder = self._sync.write(student.model, student.version)
        for attempt in range(REVIVALS + 1):
            try:
                self._hand_over(folder, tag)
                self._check_head(student.model)
                break
            except Disconnected as gone:
                self._again(gone, attempt, "took new weights")
        self._tag = tag
        self._sync.settle(folder)

    def generate(self, requests: Sequence[Request], draw: Draw) -> list[Answer]:
        """One answer per request, in order. Raises ServerError."""
        answers: dict[int, Answer] = {}
        for attempt in range(REVIVALS + 1):
            missing = [i for i in range(len(requests)) if i not in answers]
            try:
                self._ask(missing, requests, draw, answers)
                return [answers[i] for i in range(len(requests))]
            except Disconnected as gone:
                self._again(gone, attempt, "was sampling")
                assert self._sync.current is not None
                try:
                    self._hand_over(self._sync.current, self._tag, again=True)
                except Disconnected as still:
                    self._again(still, attempt, "came back")
        raise AssertionError("_again raises in the last round")

    def close(self) -> None:
        """Drop connections, end a managed server, delete the weights on disk."""
        atexit.unregister(self.close)
        self._closed = True
        self._give_up()
        if self._process is not None:
            self._process.stop()
        self._sync.remove()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # --- weights ------------------------------------------------------------------------------------------------------

    def _hand_over(self, folder: Path, tag: str, *, again: bool = False) -> None:
        """Have these weights in the server under this tag, starting it where it has to be. Raises Disconnected."""
        fresh = False
        if self._process is not None and not self._process.running:
            fresh = True
            self._start(self._process, self._sync.base or folder)
        http = self._calls()
        found = http.version()
        if again and found == tag:
            return  # the connection was lost, not the server
        if self._tag and not fresh and found not in (self._tag, tag, FRESH):
            raise ServerError(
                f"{self.name} has weights {found}, and this run loaded {self._tag} last: two runs share the server, and each would sample from "
                "the other's student. Give every run a server of its own (rollout.vllm.mode=managed starts one), and go on with --resume."
            )
        if self._adapters:
            http.load_adapter(str(folder), tag)
        else:
            http.load_weights(str(folder), tag)

    def _calls(self) -> VllmHttp:
        """The connection, made anew after it was given up. Raises Disconnected."""
        if self._http is None:
            self._http = self._connect(self._url or (self._process.url if self._process is not None else ""))
        if self._adapters:
            self._http.adapter = self._tag
        if not self._http.model:
            self._http.meet()
            self.max_model_len = self._http.max_model_len
        return self._http

    def _give_up(self) -> None:
        """Drop the connection; the server abandons what it is asked through it."""
        if self._http is not None:
            self._http.close()
        self._http = None

    def _check_head(self, model: PreTrainedModel) -> None:
        """vLLM 0.32 packs a tied output layer when it starts on a CPU, and a reload of the embedding leaves the packed one as it was."""
        assert self._http is not None
        moves = has_tied_head(model) and base_model(model).get_input_embeddings().weight.requires_grad
        if self._url is not None and self._http.on_cpu and moves:
            raise ServerError(
                f"{self.name} runs on a CPU, where vLLM gives an output layer that is tied to the embedding no new weights, so it would sample "
                "from an old one. Use rollout.vllm.mode=managed, which unties it, train adapters (student.lora), or serve on a GPU."
            )

    def _start(self, process: ServerProcess, folder: Path) -> None:
        def is_ready(url: str) -> bool:
            if self._http is None or self._http.url != url:
                self._give_up()
                self._http = self._connect(url)
            return self._http.healthy()

        assert self._sync.root is not None
        process.say = self.say
        process.start(folder, self._sync.root / "server.log", is_ready)

    def _again(self, gone: Disconnected, attempt: int, doing: str) -> None:
        """Wait until another try makes sense. Raises ServerError where none does."""
        if self._closed:
            raise ServerError(f"{self.name} was given up while it {doing}, because the run ended.")
        if self._process is not None:
            if attempt < REVIVALS:
                time.sleep(RETRY_S)  # a dying server takes its answers along before it is gone
                if not self._process.running or (self._http is not None and not self._http.healthy()):
                    self.say("warning: the vLLM server died; starting it again")
                    self._process.stop()
                return
            raise ServerError(
                f"{self.name} died {REVIVALS + 1} times while it {doing} ({gone}). The end of its log:\n{self._process.tail()}"
            )
        until = time.monotonic() + self.patience
        while attempt < REVIVALS and time.monotonic() < until:
            time.sleep(RETRY_S)
            if self._http is not None and self._http.healthy():
                return
        raise ServerError(
            f"{self.name} is not there, or broke off while it {doing} ({gone}). Start it again, look at its log for why it ended, and go on "
            "with --resume; rollout.vllm.mode=managed lets opd start one."
        )

    def _claim(self) -> None:
        """Keep other runs on this machine from the same server. Raises ServerError where one is there before."""
        if self._lock is not None or self._url is None:
            return
        name = hashlib.blake2b(self._url.encode(), digest_size=8).hexdigest()
        claim = _Claim(Path(tempfile.gettempdir(), f"opd-vllm-{name}.lock"))
        try:
            taken = claim.take()
        except OSError:
            return  # another user's; the versions tell such runs apart
        if not taken:
            raise ServerError(
                f"{self.name} is in use by another run of opd on this machine, and a server has the weights of one student at a time. Wait for "
                "that run, or give this one another server (rollout.vllm.mode=managed starts one)."
            )
        self._lock = claim

    # --- responses ----------------------------------------------------------------------------------------------------

    def _ask(self, missing: Sequence[int], requests: Sequence[Request], draw: Draw, answers: dict[int, Answer]) -> None:
        """Put the answers of `missing` into `answers`. Raises the first failure, when all requests have ended."""
        http = self._calls()
        before = "" if http.tells_versions else http.version()
        found: dict[int, Answer] = {}
        pool = ThreadPoolExecutor(max_workers=max(1, min(len(missing), self._concurrency)))
        futures = {pool.submit(http.draw, requests[i], draw): i for i in missing}
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            failed = next((f for f in futures if f.done() and f.exception() is not None), None)
            for future in futures if failed is not None else ():
                future.cancel()
            wait(futures)
        except BaseException:  # a signal: what is on its way is given up
            self._give_up()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        for future, i in futures.items():
            if not future.cancelled() and future.exception() is None:
                found[i] = future.result()
        if http.tells_versions:
            answers |= {i: answer for i, answer in found.items() if answer.versions != (FRESH,)}
        elif failed is None or http.version() == before:  # a version for all of them, because they carry none
            after = http.version()
            answers |= {i: replace(answer, versions=tuple({before, after})) for i, answer in found.items()}
        if failed is not None:
            failed.result()
        if any(answer.versions == (FRESH,) for answer in found.values()):
            raise Disconnected("it was started again, without this run's weights")


class _Claim:
    """A lock file that goes when its holder lets go; what a killed holder leaves is taken over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1

    def take(self) -> bool:
        """False where another process holds it. Raises OSError where the file cannot be opened."""
        while (lock := locked(self.path, os.O_RDWR | os.O_CREAT, 0o666)) is not None:
            # A holder that let go while this one opened the file has deleted the one that is locked here.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), self.path.stat()):
                    self._file = lock
                    return True
            os.close(lock)
        return False

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._file)
