"""The processes that train one student together: one rank for each device of a machine. A process by itself is rank 0 of 1."""

from __future__ import annotations

import heapq
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from opd.errors import ConfigError, OpdError, RankError

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
WAIT = timedelta(hours=2)
"""Time that ranks wait for one that computes rewards or saves. A rank that died is noticed at once, by its closed connection."""
BUCKET = 2**24  # numbers of a gradient that are summed at a time: 64 MiB of float32
REAP_S = 2.0  # in which the process that started a dead rank takes note of it
STARTED_BY = "OPD_RANKS_STORE"
"""Environment variable of ranks that `opd train --devices` started: the file over which they find each other."""


class Ranks:
    """One process by itself: every question to all ranks is answered by this one."""

    rank = 0
    world = 1

    @property
    def alone(self) -> bool:
        return self.world == 1

    @property
    def first(self) -> bool:
        """The rank that writes and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in the order of the ranks. Every rank has to ask. Raises the OpdError that ended another rank."""
        return [value]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, where alone it is called."""
        return self.gather(make() if self.first else None)[0]  # pyright: ignore[reportReturnType]  # rank 0 has one

    def share(self, costs: Sequence[int]) -> list[int]:
        """The places that are this rank's, in order, such that all ranks have about the same sum of costs; every rank is asked with the
        same costs."""
        return shares(costs, self.world)[self.rank]

    def each(self, costs: Sequence[int], make: Callable[[list[int]], Sequence[T]]) -> list[T]:
        """One value per place, where every rank makes those of its share, which it is given as places."""
        mine = self.share(costs)
        found: dict[int, T] = {}
        for part in self.gather(dict(zip(mine, make(mine) if mine else (), strict=True))):
            found |= part
        return [found[place] for place in range(len(costs))]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make each gradient the sum over the ranks. One that no rank has stays None."""


ALONE = Ranks()


def shares(costs: Sequence[int], world: int) -> list[list[int]]:
    """The places of each rank: the dearest first, each to the rank that has the least so far (ties: the lower rank)."""
    if world == 1:
        return [list(range(len(costs)))]
    loads = [(0, rank) for rank in range(world)]
    found: list[list[int]] = [[] for _ in range(world)]
    for place in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(loads)
        found[rank].append(place)
        heapq.heappush(loads, (load + costs[place], rank))
    return [sorted(places) for places in found]


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """What a rank says in the place of a value when it ends."""

    rank: int
    error: OpdError | None
    """None where it ended in order, such as by a signal."""


class _Joined(Ranks):
    """One of several ranks of torch.distributed: gloo for objects and for tensors on the CPU, NCCL for those on GPUs."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank = rank
        self.world = world
        self.pids: list[int] = []
        self._ended = False
        self._inside = False

    def gather(self, value: T) -> list[T]:
        if self._ended:
            raise RankError(f"rank {self.rank} asks the other ranks after the run has ended.")
        found = self._exchange(value)
        failures = [one for one in found if isinstance(one, _Failure)]
        if failures:
            self._ended = True
            said = failures[0].error if self.first else None  # one rank prints
            raise said or _Quiet(f"rank {failures[0].rank} has ended the run.")
        return found

    def _exchange(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        self._inside = True
        try:
            dist.all_gather_object(found, value)
        except RuntimeError as error:  # gloo's, about a connection
            self._ended = True
            raise self._lost(error) from error
        self._inside = False
        return found

    def _lost(self, error: RuntimeError) -> RankError:
        """The error for a rank that is gone, by name where its process is."""
        gone: list[int] = []
        until = time.monotonic() + REAP_S
        while not gone and time.monotonic() < until:
            gone = [rank for rank, pid in enumerate(self.pids) if not _runs(pid)]
            time.sleep(0.05)
        who = " and ".join(f"rank {rank}" for rank in gone) or "another rank"
        return RankError(
            f"{who} ended without a word, as a process does that is killed (SIGKILL, out of memory). The step was not taken; go on with "
            f"--resume. ({str(error).splitlines()[0][:120]})"
        )

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        import torch
        import torch.distributed as dist

        present = self.gather([parameter.grad is not None for parameter in parameters])
        held: list[torch.Tensor] = []
        for parameter, anywhere in zip(parameters, map(any, zip(*present, strict=True)), strict=True):
            if anywhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            held += [parameter.grad] if anywhere and parameter.grad is not None else []
        for bucket in _buckets(held):
            # Sums of coarse gradients are float32, and rounded once.
            flat = torch.cat([g.flatten() if g.dtype == torch.float64 else g.flatten().float() for g in bucket])
            try:
                dist.all_reduce(flat)
            except RuntimeError as error:
                self._ended = True
                raise self._lost(error) from error
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def fail(self, error: BaseException) -> bool:
        """Tell the other ranks that this one ends; False where nobody could be told."""
        if self._ended or self._inside:
            return self._ended and not self._inside
        self._ended = True
        with suppress(RankError):
            self._exchange(_Failure(rank=self.rank, error=self._said(error)))
            return True
        return False

    def _said(self, error: BaseException) -> OpdError | None:
        """The error as another rank is to raise it."""
        if not isinstance(error, Exception):
            return None
        if isinstance(error, OpdError):
            with suppress(Exception):  # an error of another form becomes a plain one
                told = type(error)(f"rank {self.rank}: {error}")
                return pickle.loads(pickle.dumps(told))
            return RankError(f"rank {self.rank}: {error}")
        facts = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no details'}"
        return RankError(f"rank {self.rank} ended by {facts}. Its traceback is above; go on with --resume.")


class _Quiet(RankError):
    """Another rank has ended the run and says why itself."""


def _buckets(gradients: Sequence[Any]) -> Iterator[list[Any]]:
    """Neighbours of one dtype and device, BUCKET numbers at a time; a larger one stands alone."""
    bucket: list[Any] = []
    size = 0
    for gradient in gradients:
        other = bucket and (gradient.dtype, gradient.device) != (bucket[0].dtype, bucket[0].device)
        if bucket and (other or size + gradient.numel() > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        yield bucket


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return not os.path.isdir("/proc/self")  # a system without /proc
    except OSError:
        return False


def ranks_of(environment: Mapping[str, str]) -> tuple[int, int]:
    """(rank, world) as torchrun sets them; (0, 1) elsewhere. Raises ConfigError for several machines."""
    rank, world = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    local = int(environment.get("LOCAL_WORLD_SIZE", world))
    if world > 1 and local != world:
        raise ConfigError(
            f"torchrun starts {world} processes on several machines, {local} of them here, and opd train uses those of one machine. Start it "
            "with torchrun --standalone, or train in verl (docs/verl.md)."
        )
    return rank, world


@contextmanager
def session() -> Iterator[Ranks]:
    """This process as one of those that torchrun, or opd train --devices, started; ALONE where nobody did.

    However the block ends on one rank, the others hear of it. An OpdError is raised again on rank 0, which alone prints it; the
    traceback of any other error comes first. Ranks beside rank 0 leave by SystemExit, and leave signals to it.
    """
    rank, world = ranks_of(os.environ)
    if world == 1:
        yield ALONE
        return
    ranks = _join(rank, world)
    try:
        yield ranks
        ranks.fail(KeyboardInterrupt())  # in order: those that wait need not wait any more
    except BaseException as error:
        if ranks.first:
            ranks.fail(error)
            raise
        _leave(ranks, error)


def _leave(ranks: _Joined, error: BaseException) -> None:
    """The end of a rank beside rank 0."""
    if isinstance(error, _Quiet):
        raise SystemExit(0) from None
    if not isinstance(error, OpdError) and isinstance(error, Exception):
        print(f"rank {ranks.rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    if ranks.fail(error):
        raise SystemExit(0) from None  # rank 0 says it, saves what is trained, and ends with its exit code
    print(f"rank {ranks.rank}: {error}", file=sys.stderr, flush=True)
    raise SystemExit(1) from None


def _join(rank: int, world: int) -> _Joined:
    import torch
    import torch.distributed as dist

    if rank > 0:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        if STARTED_BY in os.environ:
            _end_with_parent()
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    store = os.environ.get(STARTED_BY)
    where = {} if store is None else {"init_method": f"file://{store}", "rank": rank, "world_size": world}
    dist.init_process_group(backend, timeout=WAIT, **where)
    ranks = _Joined(rank, world)
    ranks.pids = ranks.gather(os.getpid())
    return ranks


def _end_with_parent() -> None:
    """Linux sends SIGTERM when the process that started this one dies; rank 0 then stops after its step, saved."""
    import ctypes

    set_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
