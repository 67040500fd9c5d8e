"""The processes that train one student together: one rank for each device of a machine. A process by itself is rank 0 of 1."""

from __future__ import annotations

import heapq
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from opd.errors import OpdError, RankError

if TYPE_CHECKING:
    from torch import Tensor, nn

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
    shared: Shared | None = None
    """What ranks can only do at the same time; None where each has all it needs."""

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

    def sum_vector(self, vector: Tensor) -> Tensor:
        """The sum over the ranks of a float32 or float64 vector, which it takes the place of; the same bits on each. Every rank has to ask."""
        return vector

    def add_up(self, numbers: Sequence[int]) -> list[int]:
        """Sums over the ranks. Every rank has to ask. Raises RankError for a rank that is gone."""
        return list(numbers)

    def together(self, task: str, *arguments: Any) -> Any:
        """What a task of `shared` makes on rank 0, which alone asks; the others do it in their next question. Raises RankError where one
        of them is gone."""
        assert self.shared is not None
        return self.shared.do(task, *arguments)

    @property
    def complete(self) -> bool:
        """True while every rank is there that holds a part of the weights."""
        return True

    @contextmanager
    def noticing(self) -> Iterator[None]:
        """Inside, an error of a connection is a RankError that names the rank that is gone."""
        yield


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


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What rank 0 says in the place of a value where all ranks are to do something before they go on."""

    name: str
    arguments: tuple[Any, ...] = ()


class Shared(Protocol):
    """Work that ranks can only do at the same time, such as running a model whose weights are divided over them."""

    running: bool
    """It has begun here and has not ended, so that the others wait in the midst of it."""

    def go_along(self) -> None:
        """Do as the others do until every rank is here."""

    def do(self, task: str, *arguments: Any) -> Any:
        """What the task of this name makes here. Every rank does it, with the same arguments."""


class Joined(Ranks):
    """One of several ranks of torch.distributed: gloo for objects and for tensors on the CPU, NCCL for those on GPUs."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank = rank
        self.world = world
        self.pids: list[int] = []
        self._ended = False
        self._inside = False
        self._served = False

    def gather(self, value: T) -> list[T]:
        if self._ended:
            raise RankError(f"rank {self.rank} asks the other ranks after the run has ended.")
        while True:
            self._go_along()
            found = self._exchange(value)
            self._check(found)
            if not self._did_task(found):
                return found

    @property
    def complete(self) -> bool:
        return self.shared is None or self._served or not self._ended

    def together(self, task: str, *arguments: Any) -> Any:
        assert self.first and self.shared is not None
        if self._ended and not self._served:
            raise RankError(f"The ranks that have a part in the {task} have ended.")
        if not self._served:
            self._go_along()
        found = self._exchange(_Task(name=task, arguments=arguments))
        if not self._served:
            self._check(found)
        with self.noticing():
            return self.shared.do(task, *arguments)

    def _go_along(self) -> None:
        if self.shared is not None:
            with self.noticing():
                self.shared.go_along()

    def _did_task(self, found: Sequence[Any]) -> bool:
        """True where rank 0 has asked for a task, which is done."""
        if not isinstance(found[0], _Task):
            return False
        assert self.shared is not None
        with self.noticing():
            self.shared.do(found[0].name, *found[0].arguments)
        return True

    def _check(self, found: Sequence[Any]) -> None:
        """Raise what ends the run where a rank has said that it fails."""
        failures = [one for one in found if isinstance(one, _Failure)]
        if not failures:
            return
        self._ended = True
        if self.shared is not None and failures[0].rank > 0:
            self._serve()
        said = failures[0].error if self.first else None  # one rank prints
        raise said or Quiet(f"rank {failures[0].rank} has ended the run.")

    def _serve(self) -> None:
        """After a failure: rank 0 may still need the others' parts of what is to be saved, until it ends."""
        if self.first:
            self._served = True
            return
        with suppress(RankError):
            while self._did_task(self._exchange(None)):
                pass

    def add_up(self, numbers: Sequence[int]) -> list[int]:
        import torch
        import torch.distributed as dist

        summed = torch.tensor(numbers, dtype=torch.int32)
        with self.noticing():
            dist.all_reduce(summed)
        return summed.tolist()

    @contextmanager
    def noticing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, OpdError) or not self._gone():
                raise
            self._ended = self._inside = True
            raise self._lost(error) from error

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
        gone = self._gone()
        who = " and ".join(f"rank {rank}" for rank in gone) or "another rank"
        part = (
            ""
            if self.shared is None
            else " Its part of the weights is gone, so that the last checkpoint is where to begin."
        )
        return RankError(
            f"{who} ended without a word, as a process does that is killed (SIGKILL, out of memory). The step was not taken; go on with "
            f"--resume.{part} ({str(error).splitlines()[0][:120]})"
        )

    def _gone(self) -> list[int]:
        """Ranks whose processes have ended; they may take a moment to be known."""
        gone: list[int] = []
        until = time.monotonic() + REAP_S
        while not gone and time.monotonic() < until:
            gone = [rank for rank, pid in enumerate(self.pids) if not _runs(pid)]
            time.sleep(0.05)
        return gone

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        import torch

        present = self.gather([parameter.grad is not None for parameter in parameters])
        held: list[torch.Tensor] = []
        for parameter, anywhere in zip(parameters, map(any, zip(*present, strict=True)), strict=True):
            if anywhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            held += [parameter.grad] if anywhere and parameter.grad is not None else []
        for bucket in _buckets(held):
            # Sums of coarse gradients are float32, and rounded once.
            flat = torch.cat([g.flatten() if g.dtype == torch.float64 else g.flatten().float() for g in bucket])
            self._all_reduce(flat)
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def sum_vector(self, vector: Tensor) -> Tensor:
        self.gather(None)  # what another rank failed at is raised here
        self._all_reduce(vector)
        return vector

    def _all_reduce(self, tensor: Tensor) -> None:
        import torch.distributed as dist

        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            self._ended = True
            raise self._lost(error) from error

    def fail(self, error: BaseException) -> bool:
        """Tell the other ranks that this one ends; False where nobody could be told."""
        if self._served:
            self._served = False
            with suppress(RankError):
                self._exchange(None)
        if self._ended or self._inside or (self.shared is not None and self.shared.running):
            return self._ended and not self._inside
        with suppress(RankError):
            self._go_along()
            self._ended = True
            failed = [
                one
                for one in self._exchange(_Failure(rank=self.rank, error=self._said(error)))
                if isinstance(one, _Failure)
            ]
            if self.shared is not None and failed[0].rank > 0:
                self._serve()
            return True
        return False

    def close(self) -> None:
        """End the group's threads: one that still frees a tensor while the interpreter ends would abort the process. They stay where they
        wait for a rank that may never answer, and with NCCL, whose communicators wait for each other when they are destroyed."""
        import torch.distributed as dist

        if not self._inside and not (self.shared is not None and self.shared.running) and dist.get_backend() == "gloo":
            dist.destroy_process_group()

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


class Quiet(RankError):
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
