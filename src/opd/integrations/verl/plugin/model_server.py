"""Base classes of our servers behind verl's rollout interface: one transformers model per Ray actor, one request at a time."""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import os
from typing import Any

import ray
from verl.workers.rollout.replica import RolloutMode, RolloutReplica


class ModelServer:
    """The part of a server that does not depend on its answers."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()

    async def address(self) -> str:
        return f"{ray.util.get_node_ip_address()}:{os.getpid()}"

    async def sleep(self) -> None:
        """Nothing: the model keeps its memory."""

    wake_up = abort_all_requests = resume_generation = clear_kv_cache = release_kv_cache = resume_kv_cache = sleep
    start_profile = stop_profile = sleep


class ModelReplica(RolloutReplica):
    """One server per replica. A subclass starts it in `launch_servers` and hands it to `keep`."""

    async def init_colocated(self, resource_pool: Any) -> None:
        """A teacher's weights never change, so it has no workers that bring it new ones."""
        if not self.is_teacher_model:
            await super().init_colocated(resource_pool)
            return
        self.rollout_mode, self.resource_pool = RolloutMode.COLOCATED, resource_pool
        await self.launch_servers()

    async def keep(self, server: Any) -> None:
        """Make the server known to verl."""
        self.servers = [server]
        self._server_handle = server
        self._server_address = await server.address.remote()
