"""Joining the processes that torchrun, or `opd train --devices`, started."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opd.errors import ConfigError, OpdError
from opd.ranks import ALONE, REAP_S, STARTED_BY, WAIT, Joined, Quiet, Ranks


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
    finally:
        ranks.close()


def _leave(ranks: Joined, error: BaseException) -> None:
    """The end of a rank beside rank 0."""
    if isinstance(error, Quiet):
        raise SystemExit(0) from None
    if not isinstance(error, OpdError) and isinstance(error, Exception):
        print(f"rank {ranks.rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    if ranks.fail(error):
        raise SystemExit(0) from None  # rank 0 says it, saves what is trained, and ends with its exit code
    print(f"rank {ranks.rank}: {error}", file=sys.stderr, flush=True)
    time.sleep(REAP_S)  # rank 0 looks for the rank that ended first
    raise SystemExit(1) from None


def _join(rank: int, world: int) -> Joined:
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
    ranks = Joined(rank, world)
    ranks.pids = ranks.gather(os.getpid())
    return ranks


def _end_with_parent() -> None:
    """Linux sends SIGTERM when the process that started this one dies; rank 0 then stops after its step, saved."""
    import ctypes

    set_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
