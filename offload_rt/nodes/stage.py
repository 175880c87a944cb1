"""What a node does that is not the first: it loads its share, and makes its layers of passes."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch

from offload_rt.config import HomeKind, Wire
from offload_rt.device.base import Device
from offload_rt.device.several import Devices, Stripes
from offload_rt.errors import OffloadError, PlanError
from offload_rt.kv.base import KVCache
from offload_rt.kv.pool import KVPool
from offload_rt.kv.resident import ResidentKV
from offload_rt.kv.states import STATES, HybridKV, MixerStates
from offload_rt.kv.striped import StripedKV
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.network import Network
from offload_rt.model.weight_files import WeightFiles
from offload_rt.model.wire import wired
from offload_rt.nodes.carrying import ByGroup, ByLine, Carrier, Group
from offload_rt.nodes.crossing import Follower, Guest, Moved, PassDroppedError
from offload_rt.nodes.line import Frame, Kind, Line, NodeError
from offload_rt.runner.loading import Streaming, load_target
from offload_rt.runner.runner import Rows, Runner


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a node has to load.

    Attributes:
        node: its number.
        device: the node of each layer.
        streamed: of its layers, those that are copied in each pass.
        slots: of its ring.
        home: where these live.
        in_files: of a home that is split, the layers that stay in their files.
        readers: reads in flight.
        spare_bytes: memory that is free until all weights are there.
        capacities: KV rows of each sequence, those of drafts with them.
        kv_rows: of all sequences together, where they share them; else None.
        state_bytes: recurrent states of its layers, of all sequences.
        device_bytes: planned for its device.
        dtype: number format of the computation.
        wire: form of the weights.
        exact: passes are row-invariant.
        chunk_tokens: rows that go through a layer at once.
        by_group: hidden states go from GPU to GPU.
    """

    node: int
    device: Sequence[int]
    streamed: Sequence[int]
    slots: int
    home: str
    in_files: Sequence[int]
    readers: int
    spare_bytes: int
    capacities: Sequence[int]
    kv_rows: int | None
    state_bytes: int
    device_bytes: int
    dtype: str
    wire: str
    exact: bool
    chunk_tokens: int
    by_group: bool

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Order":
        """What came over a line.

        Raises:
            NodeError: it is no order.
        """
        if record.keys() != {field.name for field in fields(cls)}:
            raise NodeError("the first node is another version of offload-run: use one on all")
        return cls(**record)


class Stage:
    """A node's layers, with their memory; closes its files and lets go of them at the end."""

    def __init__(
        self,
        line: Line,
        order: Order,
        checkpoint: Checkpoint,
        device: Device,
        carrier: Carrier,
        undo: ExitStack,
    ) -> None:
        checkpoint = wired(checkpoint, Wire(order.wire))
        self._line, self._device, self._order, self._carrier = line, device, order, carrier
        files = WeightFiles(checkpoint.files)
        undo.callback(files.close)
        self._network = network = Network(checkpoint, order.dtype, device.kind.packing)
        undo.callback(network.release)
        tiles = device.kind.tile_rows if order.exact else 0
        place, planned = device.torch_device, order.device_bytes
        if order.exact and (
            why := network.exact_problem(place, tiles, limit_bytes=planned, ends=False)
        ):
            raise PlanError(f"passes cannot be row-invariant here, as {why}: add --exact off")
        network.exact, network.tiles = order.exact, tiles
        read = {name: partial(files.read, extent) for name, extent in checkpoint.tensors.items()}
        network.bring_rest(lambda name: read[name](), device.torch_device)
        self._width = checkpoint.embedding.shape[1]
        self._caches, pool = self._make_caches()
        self._follower = Follower(pool, self._caches)
        self._runner = self._load(checkpoint, files, undo)

    def run(self) -> None:
        """Make passes until the first node ends the run.

        Raises:
            NodeError: the first node is gone, or ended as something failed.
        """
        while (frame := self._line.take()).kind is not Kind.END:
            if frame.kind is Kind.TELL:
                device = self._device
                peak_bytes = device.peak_bytes() if device.kind.own_memory else None
                self._line.send(Kind.TELL, {"peak_bytes": peak_bytes, "ledger": device.ledger()})
            elif frame.kind is Kind.PASS:
                self._line.works(True)
                self._pass(frame)
                self._line.works(False)

    def _pass(self, frame: Frame) -> None:
        record: dict[str, Any] = frame.record
        self._guest.number = record["number"]
        for change in record["changes"]:
            self._follower.follow(change)
        parts = [
            Rows(
                cache=self._caches[part["cache"]],
                tokens=[0] * part["rows"],
                places=part["places"],
                parents=part["parents"],
                wanted=(),
                keeps_all=part["keeps_all"],
                hidden=torch.zeros(
                    part["rows"],
                    self._width,
                    dtype=self._network.dtype,
                    device=self._device.torch_device,
                ),
            )
            for part in record["parts"]
        ]
        try:
            self._runner.hidden(parts)
        except PassDroppedError:
            return

    def _moved(self) -> Moved:
        copied = self._device.copy.statistics()
        return Moved(
            bytes_copied=copied.bytes_copied,
            busy_s=copied.busy_s,
            stalled_s=self._device.compute.stalled_s(),
        )

    def _mine(self) -> list[int]:
        return [i for i, node in enumerate(self._order.device) if node == self._order.node]

    def _make_caches(self) -> tuple[list[KVCache], KVPool | None]:
        network, order, device = self._network, self._order, self._device
        shapes = [network.kv_shapes[i] for i in self._mine() if i in network.attending]
        pool = None
        own: Sequence[ResidentKV]
        if order.kv_rows is not None:
            count = len(order.capacities)
            pool = KVPool(device, shapes, network.dtype, rows=order.kv_rows, sequences=count)
            own = pool.caches
        else:
            own = [ResidentKV(device, shapes, network.dtype, rows) for rows in order.capacities]
        mixing = [mixer.layer for mixer in network.mixers if mixer.layer in self._mine()]
        if not network.mixers:
            return [StripedKV({order.node: cache}, order.device) for cache in own], pool
        device.enter(order.state_bytes, STATES)
        nodes = [order.device[layer] for layer in network.attending]
        states = partial(MixerStates, mixing, device.kind.state_rows)
        parts = [StripedKV({order.node: cache}, nodes) for cache in own]
        return [HybridKV(rows, states(), network.attending) for rows in parts], pool

    def _load(self, checkpoint: Checkpoint, files: WeightFiles, undo: ExitStack) -> Runner:
        order, mine = self._order, self._mine()
        streaming = Streaming(
            layers=order.streamed,
            slots=order.slots,
            home=HomeKind(order.home),
            in_files=order.in_files,
            readers=order.readers,
            spare_bytes=[order.spare_bytes],
        )
        guest = Guest(self._line, order.node, order.device, self._moved, self._carrier)
        self._guest = guest
        return load_target(
            checkpoint,
            self._network,
            Stripes(
                Devices([self._device]), [int(i not in mine) for i in range(len(order.device))]
            ),
            files,
            None,
            streaming,
            order.chunk_tokens,
            undo,
            guest,
        )


def work(line: Line, checkpoint: Checkpoint, device: Device, group: Group | None = None) -> None:
    """Load what the first node orders, and make passes until it ends the run.

    Args:
        line: to the first node.
        checkpoint: headers of the model.
        device: that computes here.
        group: of all nodes' GPUs, if this one has joined one; it is closed at the end.

    Raises:
        NodeError: the first node is gone, or ended as something failed.
        OffloadError: this one cannot; the first node is told why.
    """
    with ExitStack() as undo:
        undo.callback(line.close)
        if group is not None:
            undo.callback(group.close, abort=True)  # unless it was left in good order
        if (frame := line.take()).kind is Kind.END:
            return
        order = Order.read(frame.record)
        carrier: Carrier = ByLine() if group is None else ByGroup(group, 0)
        if group is not None and not order.by_group:  # another could not join
            group.close(abort=True)
            carrier = ByLine()
        line.works(True)
        try:
            stage = Stage(line, order, checkpoint, device, carrier, undo)
            line.send(Kind.READY)
            line.works(False)
            stage.run()
            carrier.close()
        except NodeError:
            carrier.close(abort=True)
            raise
        except OffloadError as error:
            line.end(str(error))
            carrier.close(abort=True)
            raise
