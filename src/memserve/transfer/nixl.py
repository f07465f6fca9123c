"""The mover over NIXL, for hosts with RDMA: the optional extra ``[multihost]``.

The receiver's agent describes its arena in *metadata*, a byte string that travels on the bus with the grant,
so no metadata server is needed. The sender writes, because NIXL over plain TCP emulates reads, badly. Where
the network card has no RDMA, the receiver's agent needs its progress thread for these writes. An agent serves
both directions.

Importing this module does not import nixl; creating a :class:`NixlAgent` does.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import trio

from memserve.identity import ActorId
from memserve.transfer.mover import Memory, MoveError, PieceFeed, check_pages, settle
from memserve.transfer.values import PageTransfer, Result, extents
from memserve.transfer_messages import Failure, Way

POLL_S = 50e-6
"""First pause between two polls of a transfer's state; it doubles up to POLL_MAX_S."""
POLL_MAX_S = 1e-3


def available() -> bool:
    """Whether the nixl package is installed."""
    return importlib.util.find_spec("nixl") is not None


def has_rdma() -> bool:
    """Whether this machine has an RDMA network card, the kind that NIXL is made for."""
    devices = Path("/sys/class/infiniband")
    return devices.is_dir() and any(devices.iterdir())


@attrs.define(eq=False)
class NixlAgent:
    """This process's agent, with its arena registered.

    Create it off the event loop: it pins the arena's memory. Raises ImportError when nixl is not installed
    for this machine's CUDA.
    """

    name: ActorId
    """Unique among all agents that meet: the shard's id, incarnation included."""
    memory: Memory
    way: Way = attrs.field(init=False, repr=False)
    """The way to this arena, as announced to senders."""
    _agent: Any = attrs.field(init=False)
    _registered: Any = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        from nixl._api import nixl_agent, nixl_agent_config, nixl_thread_sync_t

        # Connecting may take long, so it happens in a thread while the loop polls other transfers.
        sync = nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        self._agent = nixl_agent(self.name, nixl_agent_config(backends=["UCX"], sync_mode=sync))
        base = self.address
        self._registered = self._agent.register_memory(
            [(base, self.memory.view.nbytes, 0, "")], mem_type="DRAM"
        )
        self.way = Way("nixl", f"{base:x}", self._agent.get_agent_metadata())

    @property
    def address(self) -> int:
        """Address of the arena's first byte in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory.view))

    def close(self) -> None:
        """Release the arena. Senders' writes fail from now on."""
        self._agent.deregister_memory(self._registered)


@attrs.define(eq=False)
class _Peer:
    """Another agent, as this process's agent knows it."""

    name: str = ""
    """Its name; empty before it is attached."""
    users: int = 0
    """Transfers that attach it or write to it."""
    forgotten: bool = False
    """Its shard is gone: it is to be detached after the last transfer to it."""
    attaching: trio.Lock = attrs.field(factory=trio.Lock)


@attrs.define(eq=False)
class NixlMover:
    """Writes from the agent's arena into those of other agents."""

    agent: NixlAgent
    path: str = attrs.field(default="nixl", init=False)
    _peers: dict[bytes, _Peer] = attrs.field(factory=dict, init=False)
    """The other agents, by their metadata."""

    async def send(self, transfer: PageTransfer, way: Way, feed: PieceFeed, deadline_s: float) -> Result:
        """See Mover. Fails with PEER_GONE when the agent cannot be reached, CUT when a write breaks off."""
        return await settle(transfer, deadline_s, partial(self._move, transfer, way, feed))

    def forget(self, way: Way) -> None:
        """Disconnect from an agent, now or when the last transfer to it has ended."""
        peer = self._peers.get(way.data)
        if peer is not None:
            peer.forgotten = True
            self._detach_unused(way)

    def close(self) -> None:
        """Disconnect from all agents and release this process's arena."""
        for data in list(self._peers):
            self.forget(Way("nixl", "", data))
        self.agent.close()

    @property
    def _raw(self) -> Any:
        return self.agent._agent

    async def _move(self, transfer: PageTransfer, way: Way, feed: PieceFeed) -> int:
        check_pages(transfer, self.agent.memory.pages)
        peer = self._peers.setdefault(way.data, _Peer())
        peer.forgotten = False
        peer.users += 1
        try:
            return await self._write_all(transfer, way, feed, await self._attached(peer, way))
        finally:
            peer.users -= 1
            self._detach_unused(way)

    async def _write_all(self, transfer: PageTransfer, way: Way, feed: PieceFeed, name: str) -> int:
        moved = 0
        while some := await feed.take():
            todo = [one for piece in some for one in extents(piece, transfer, self.agent.memory.geometry)]
            here = [(self.agent.address + one.source, one.nbytes, 0) for one in todo]
            there = [(int(way.address, 16) + one.destination, one.nbytes, 0) for one in todo]
            await self._write(here, there, name)
            moved += sum(one.nbytes for one in todo)
        return moved

    async def _attached(self, peer: _Peer, way: Way) -> str:
        """The name of an agent, which is attached first if it is not yet. Raises MoveError."""
        async with peer.attaching:
            if not peer.name:
                try:
                    name = await trio.to_thread.run_sync(self._raw.add_remote_agent, way.data)
                except Exception as error:
                    text = f"NIXL does not take the receiver's metadata: {error}"
                    raise MoveError(Failure.PEER_GONE, text) from error
                peer.name = name.decode() if isinstance(name, bytes) else name
        return peer.name

    def _detach_unused(self, way: Way) -> None:
        """Drop an agent that no transfer uses, if it is forgotten or was never attached."""
        peer = self._peers[way.data]
        if not peer.users and (peer.forgotten or not peer.name):
            del self._peers[way.data]
            if peer.name:
                self._raw.remove_remote_agent(peer.name)

    async def _write(self, here: list[Any], there: list[Any], name: str) -> None:
        """Run one operation; returns only when nothing of it is under way any more, whatever happens."""
        handle = None
        try:
            # NIXL's errors have no common base class of their own.
            try:
                handle = await trio.to_thread.run_sync(self._post, here, there, name)
                await self._finish(handle)
            except Exception as error:
                if isinstance(error, MoveError):
                    raise
                raise MoveError(Failure.CUT, f"NIXL: {type(error).__name__}: {error}") from error
        finally:
            if handle is not None:
                with trio.CancelScope(shield=True):
                    await self._release(handle)

    def _post(self, here: list[Any], there: list[Any], name: str) -> Any:
        local = self._raw.get_xfer_descs(here, mem_type="DRAM")
        remote = self._raw.get_xfer_descs(there, mem_type="DRAM")
        handle = self._raw.initialize_xfer("WRITE", local, remote, name)
        self._raw.transfer(handle)
        return handle

    async def _finish(self, handle: Any) -> None:
        if await self._ended(handle) != "DONE":
            raise MoveError(Failure.CUT, "NIXL broke the write off")

    async def _ended(self, handle: Any) -> str:
        pause_s = POLL_S
        while (state := str(self._raw.check_xfer_state(handle))) == "PROC":
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, POLL_MAX_S)
        return state

    async def _release(self, handle: Any) -> None:
        """Abort a write that is still under way; wait for one that cannot be aborted."""
        while True:
            try:
                self._raw.release_xfer_handle(handle)
            except Exception:  # no class of its own, as above: the write cannot be aborted
                await trio.sleep(POLL_MAX_S)
            else:
                return
