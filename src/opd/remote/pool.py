"""A pool of servers that answer the same questions: asked in parallel, again after a fault, and never longer than is allowed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn, TypeVar

import anyio
import httpx
from tenacity import AsyncRetrying, RetryCallState, RetryError, retry_if_exception_type, wait_random_exponential

from opd.errors import ServerChangedError, ServerError
from opd.remote.address import Address, parse_addresses, warnings_of
from opd.remote.background import Background
from opd.remote.breaker import Breaker, Patience, Server
from opd.remote.keys import ApiKey
from opd.remote.questions import Answer, BadAnswer, ChangedAnswer, Question, RefusedError, Request, words_of

T = TypeVar("T")
CONNECT_SECONDS = 10.0  # a host that does not even take the connection is not slow but away
NOT_THERE = (502, 503, 504)  # a proxy or a server that is still loading: no fault of the question
BUSY = (408, 429)
SHORTEST_TRY_S = 0.05


class _Fault(Exception):
    """Something that may be better the next time."""

    def __init__(self, what: str, *, refusal: bool = False, changed: bool = False, wait: float = 0.0) -> None:
        super().__init__(what)
        self.refusal = refusal
        """The server answered, and the answer is an error or cannot be used."""
        self.changed = changed
        """The answer is another model's."""
        self.wait = wait
        """Seconds that the server asks for."""


class ServerPool:
    """Asks the servers behind `urls`. `section` is the place of the keys in a recipe ("teacher"), which messages name.

    Times are seconds: `timeout` of one try, from the connection to the last byte; `deadline` of one question with all its tries.
    Raises ServerError that says which server, what happened, and what to look at. After the last server has rested for as long as a
    question may take, every question ends so at once.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        section: str,
        api_key: ApiKey | None = None,
        concurrency: int = 16,
        timeout: float = 120.0,
        deadline: float = 600.0,
        max_answer_bytes: int = 1 << 31,
        patience: Patience | None = None,
    ) -> None:
        """Connects to nothing yet. Raises ConfigError for addresses that cannot be used."""
        key = f"{section}.url"
        addresses = parse_addresses(urls if isinstance(urls, str) else list(urls), key)
        self.section = section
        self.concurrency = concurrency
        self.timeout = timeout
        self.deadline = deadline
        self.warnings: tuple[str, ...] = tuple(warnings_of(addresses, key, keyed=api_key is not None))
        self.admission: Question[None] | None = None
        """Asked of a server that comes back after a fault, before anything else is: it may have started again as another."""
        self._key = api_key
        self._max_bytes = max_answer_bytes
        self._patience = patience or Patience()
        self._breaker = Breaker([Server(one, self._patience) for one in addresses], last_answer=time.monotonic())
        self._background = Background(f"opd {section} servers")
        self._reader = ThreadPoolExecutor(1, f"opd {section} answers")
        self._clients: dict[str, httpx.AsyncClient] = {}
        self._free: asyncio.Semaphore | None = None

    @property
    def addresses(self) -> tuple[Address, ...]:
        return tuple(server.address for server in self._breaker.servers)

    @property
    def answers(self) -> dict[str, int]:
        """Questions that each server has answered."""
        return {str(server.address): server.answers for server in self._breaker.servers}

    @property
    def faults(self) -> int:
        """Failures of all servers so far; while it stands still, no server can have gone and come back unseen."""
        return sum(server.faults for server in self._breaker.servers)

    def __repr__(self) -> str:
        return f"ServerPool({', '.join(map(str, self.addresses))})"

    def ask(self, question: Question[T], *, deadline: float | None = None) -> T:
        """The answer of any server."""
        return self.ask_all([question], deadline=deadline)[0]

    def ask_all(self, questions: Sequence[Question[T]], *, deadline: float | None = None) -> list[T]:
        """The answers in order, `concurrency` questions at a time. Nothing is left out: the first that fails for good stops the rest."""
        return self._background.run(self._together(((question, None) for question in questions), deadline))

    def ask_each(
        self, question: Question[T], *, deadline: float | None = None, resting: bool = True
    ) -> dict[Address, T]:
        """Every server's own answer to one question; the first that has none stops the rest. `resting=False` leaves out servers that
        are taken out."""
        servers = [server for server in self._breaker.servers if resting or not server.out]
        answers = self._background.run(self._together(((question, server) for server in servers), deadline))
        return {server.address: answer for server, answer in zip(servers, answers, strict=True)}

    def close(self) -> None:
        """Close the connections. The next question opens new ones."""
        self._background.run(self._close())
        self._free = None
        self._background.stop()

    async def _close(self) -> None:
        clients, self._clients = self._clients, {}
        for client in clients.values():
            await client.aclose()

    async def _together(
        self, questions: Iterable[tuple[Question[T], Server | None]], deadline: float | None
    ) -> list[T]:
        limit = self.deadline if deadline is None else deadline
        tasks = [asyncio.create_task(self._ask(question, server, limit)) for question, server in questions]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, question: Question[T], only: Server | None, deadline: float) -> T:
        """One question until it is answered, refused, or out of time."""
        self._free = self._free or asyncio.Semaphore(self.concurrency)
        async with self._free:
            tries = _Tries(question.request, only, deadline)

            def pause(state: RetryCallState) -> float:
                return min(self._pause(state), max(0.0, tries.left))

            def hopeless(_: RetryCallState) -> bool:
                return tries.refusals >= self._patience.refusals or tries.left <= 0

            retrying = AsyncRetrying(retry=retry_if_exception_type(_Fault), wait=pause, stop=hopeless)
            try:
                return await retrying(self._try, question, tries)
            except RetryError:
                within = f"within {deadline:g} s" if tries.left <= 0 else f"in {tries.count} tries"
                self._give_up(tries, within)

    def _pause(self, state: RetryCallState) -> float:
        """Seconds before the next try: drawn below a limit that doubles, and no less than the server asks for."""
        drawn = wait_random_exponential(multiplier=self._patience.first_wait, max=self._patience.longest_wait)(state)
        fault = None if state.outcome is None else state.outcome.exception()
        return max(drawn, fault.wait) if isinstance(fault, _Fault) else drawn

    async def _try(self, question: Question[T], tries: _Tries) -> T:
        """One try with one server. Raises _Fault for what may be better the next time."""
        server = await self._turn(tries)
        tries.count, tries.server = tries.count + 1, server
        server.asked += 1
        try:
            if server.suspect and self.admission is not None:
                await self._read(self.admission, await self._answer(server, self.admission.request, tries.left))
                server.suspect = False
            result = await self._read(question, await self._answer(server, question.request, tries.left))
        except BadAnswer as error:
            changed = isinstance(error, ChangedAnswer)
            raise self._failed(server, tries, _Fault(f"it gave {error}", refusal=True, changed=changed)) from None
        except _Fault as fault:
            raise self._failed(server, tries, fault) from None
        finally:
            server.asked -= 1
        server.worked()
        self._breaker.last_answer = time.monotonic()
        return result

    async def _read(self, question: Question[T], answer: Answer) -> T:
        """What the answer says. Long ones take seconds to read, and the connections must not stand still meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, question.read, answer)

    async def _turn(self, tries: _Tries) -> Server:
        """The server to ask, once one may be asked."""
        while True:
            now = time.monotonic()
            if tries.left <= 0:
                self._give_up(tries, f"within {tries.deadline:g} s")
            if tries.only is not None:
                return tries.only
            if self._breaker.broken(now, self.deadline):
                self._give_up(tries, f"for {self.deadline:g} s")
            server = self._breaker.choose(now, () if tries.server is None else (tries.server,))
            if server is not None:
                return server
            await asyncio.sleep(max(0.02, min(self._breaker.wait(now), 1.0, tries.left)))

    def _failed(self, server: Server, tries: _Tries, fault: _Fault) -> _Fault:
        tries.last = fault
        tries.refusals += fault.refusal
        if not isinstance(fault, _Busy):
            server.failed(time.monotonic(), str(fault))
        return fault

    async def _answer(self, server: Server, request: Request, left: float) -> Answer:
        """The body, with a status of success. Raises _Fault, or ServerError for what will not change."""
        limit = max(0.0, min(self.timeout, left))
        try:
            # Not asyncio.wait_for, which before Python 3.12 may swallow a cancellation.
            with anyio.fail_after(limit):
                response, content = await self._send(server, request)
        except TimeoutError:
            raise _Fault(f"no answer within {limit:.3g} s ({self.section}.timeout={self.timeout:g})") from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise ServerError(
                    f"{self.section}.url: the certificate of {server.address} is not trusted ({error}). Add its authority to the file that "
                    "the environment variable SSL_CERT_FILE names."
                ) from None
            raise _Fault(_described(error)) from None
        self._check_status(server, request, response, content)
        return Answer(server=server.address, content=content, headers=response.headers)

    async def _send(self, server: Server, request: Request) -> tuple[httpx.Response, bytes]:
        client = self._client(server)
        url = f"{server.address}{request.path}"
        async with client.stream(
            request.method, url, headers=dict(request.headers), content=request.content, json=request.json
        ) as response:
            parts, size = [], 0
            async for part in response.aiter_bytes():
                parts.append(part)
                size += len(part)
                if size > self._max_bytes:
                    raise ServerError(
                        f"{self.section}.url: {server.address} answers {request.path} with more than {self._max_bytes} bytes; it is no server "
                        "of the kind that is asked for."
                    )
        return response, b"".join(parts)

    def _client(self, server: Server) -> httpx.AsyncClient:
        root = str(server.address)
        if root not in self._clients:
            self._clients[root] = httpx.AsyncClient(
                headers=None if self._key is None else self._key.headers,
                timeout=httpx.Timeout(None, connect=min(CONNECT_SECONDS, self.timeout)),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=self.concurrency),
                trust_env=not server.address.loopback,  # a proxy of the environment does not reach this machine
            )
        return self._clients[root]

    def _check_status(self, server: Server, request: Request, response: httpx.Response, content: bytes) -> None:
        status = response.status_code
        if 200 <= status < 300:
            return
        words = words_of(content)
        words = self._key.hidden(words) if self._key is not None else words
        what = f"status {status} ({words or response.reason_phrase})"
        if status in BUSY:
            raise _Busy(what, wait=_retry_after(response))
        if status in NOT_THERE:
            raise _Fault(what, wait=_retry_after(response))
        if status >= 500 and status != 501:
            raise _Fault(what, refusal=True)
        where = f"{self.section}.url: {server.address} refuses {request.path} with {what}."
        raise RefusedError(f"{where} {self._advice(status, request, response)}", status, words)

    def _advice(self, status: int, request: Request, response: httpx.Response) -> str:
        if 300 <= status < 400:
            return f"It sends on to {response.headers.get('location', 'elsewhere')!r}; give {self.section}.url that address."
        if status in (401, 403):
            named = f"is {self._key!r}" if self._key is not None else "is not set"
            return f"Its key comes from the environment variable that {self.section}.api_key_env names, which {named}."
        if status in (404, 405, 501):
            return f"See that it is the right kind of server ({self.section}.api) and the right model ({self.section}.served_model)."
        if status == 413:
            return f"The request is too large for it; raise its limit, or that of the proxy before it ({request.path})."
        return "Asking again would not help: its own words say what to change."

    def _give_up(self, tries: _Tries, when: str) -> NoReturn:
        """Raise the ServerError of a question that nobody has answered."""
        servers = [tries.only] if tries.only is not None else self._breaker.servers
        faults = {str(s.address): s.last_fault for s in servers if s.last_fault}
        if tries.server is not None and tries.last is not None:
            faults[str(tries.server.address)] = str(tries.last)
        shown = "; ".join(f"{address}: {fault}" for address, fault in faults.items()) or "no server was free"
        first = next(iter(faults), str(servers[0].address))
        look = f"See whether the server runs (curl {first}/health) and what its log says"
        if tries.last is not None and tries.last.refusal:
            look = "The server's log may say why"
        kind = ServerChangedError if tries.last is not None and tries.last.changed else ServerError
        raise kind(
            f"{self.section}.url: no usable answer to {tries.request.path} {when}. The last: {shown}. {look}; where answers just take "
            f"long, raise {self.section}.timeout and {self.section}.deadline."
        ) from None


class _Busy(_Fault):
    """The server is well, and has too much to do."""


class _Tries:
    """What has happened to one question."""

    def __init__(self, request: Request, only: Server | None, deadline: float) -> None:
        self.request = request
        self.deadline = deadline
        self._end = time.monotonic() + deadline
        self.only = only
        self.server: Server | None = None
        self.last: _Fault | None = None
        self.count = 0
        self.refusals = 0
        """Answers of no use."""

    @property
    def left(self) -> float:
        """Seconds until its deadline; 0 where they are too few for a try, whose failure would say nothing."""
        rest = self._end - time.monotonic()
        return rest if rest >= min(SHORTEST_TRY_S, self.deadline / 100) else 0.0


def _described(error: httpx.HTTPError) -> str:
    said = str(error) or "the connection broke"
    return f"{type(error).__name__} ({said})"


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to be left alone; 0 where it says nothing that can be read."""
    try:
        return min(60.0, max(0.0, float(response.headers.get("retry-after", "0"))))
    except ValueError:
        return 0.0
