"""A job on the nodes of a Ray cluster: an actor on each, and one queue of chunks for all.

Ray starts the actors, carries the chunks to them, and starts an actor that died again, with the chunks it had. The
chunks of a lost node go to another: a chunk is the same bytes on every node and at every attempt.
"""

import math
import os
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fsspec.implementations.memory import MemoryFileSystem

from sdjax.batch.job import Items, read
from sdjax.batch.output import Output, open_target
from sdjax.batch.plan import Chunk, Plan
from sdjax.batch.prepare import JobSource, words_of
from sdjax.batch.progress import Emit, Event, Manned, Noted
from sdjax.batch.record import Record
from sdjax.batch.worker import Checked, Worker
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.runtime.usage import Usage
from sdjax.text.prompts import unused_words

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

ACCELERATORS = ("GPU", "TPU")
CALLS_ASKED = 3  # calls' worth of chunks that a node has at a time: one computed, one waiting, one written
MOST_ASKED = 64  # chunks
TICK_SECONDS = 1.0
LONELY_SECONDS = 600.0  # without any node
RESTARTS = 3  # of a node's actor, and attempts of a chunk on it after the first


@dataclass(eq=False)
class _Node:
    id: str
    name: str
    actor: "ActorHandle"
    devices: int = 0
    """0: still loading the model"""


class Cluster:
    """The Ray cluster that RAY_ADDRESS names, or that runs on this machine, or that is started for this machine alone.

    Nodes with accelerators take part, in a cluster without any all nodes. Its actors take all accelerators of a node.
    The arguments are those of `sdjax.batch.run`. Raises ValueError for a target that nodes cannot share and a pipeline
    that is loaded already, and without Ray, and what a node raises when it checks the job.
    """

    def __init__(self, job: JobSource, out: str | os.PathLike, options: Mapping[str, Any]):
        self._ray = ray = _import()
        target = open_target(out)
        if isinstance(target.fs, MemoryFileSystem):
            raise ValueError(f"{target.url}: each node has its own memory; give a shared folder or an object store")
        if isinstance(options.get("model"), StableDiffusionPipeline):
            raise ValueError("every node loads the model itself: name it, in place of a pipeline")
        items = job if isinstance(job, Items) else read(job, words=words_of(options.get("embeddings", ())).values())
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="ERROR")
        url = target.root if target.is_local else target.url
        self._arguments = [ray.put(argument) for argument in (os.getcwd(), items, url, dict(options))]
        self._nodes: dict[str, _Node] = {}
        self._given_up: set[str] = set()  # ids of nodes
        self._under_way: dict[ObjectRef, tuple[_Node, Chunk | None]] = {}
        self._again: deque[Chunk] = deque()
        self._look = 0.0  # when to look for nodes again
        self._seen = time.monotonic()  # when there was one
        self._chunks_a_device = 1.0  # in a call
        self._checked: Checked | None = None
        self._usage: dict[_Node, Usage] = {}
        while self._checked is None:
            self._advance(_warn)
        self.items = self._checked.items
        for warning in unused_words(self._checked.words, self.items.prompts()):
            warnings.warn(warning, stacklevel=2)
        formats = (options.get("format", "files"), options.get("image_format", "png"))
        self.output = Output(target, *formats, self._checked.fingerprint)

    @property
    def devices(self) -> int:
        """Of the nodes that have loaded the model."""
        return sum(node.devices for node in self._nodes.values())

    @property
    def usage(self) -> Usage:
        """The time of the nodes, side by side."""
        nodes, whole = self._usage.values(), Usage()
        whole.seconds = max((usage.seconds for usage in nodes), default=0.0)
        if whole.seconds:
            whole.idle = whole.seconds * sum(usage.idle for usage in nodes) / sum(usage.seconds for usage in nodes)
        return whole

    def lay_out(self, known: Record | None, batch: int | None, chunk_size: int | None) -> tuple[Plan, Record]:
        """The plan of the job, with the batch that suits a node unless they are given, and its record."""
        node = next(node for node in self._nodes.values() if node.devices)
        try:
            with self._translated():
                plan, here = self._ray.get(node.actor.lay_out.remote(known, batch, chunk_size))
        except self._ray.exceptions.RayError as error:
            raise ConnectionError(f"the node {node.name} was lost while it planned the job: {error}") from error
        self._chunks_a_device = plan.batch / plan.chunk_size
        return plan, here

    def sample(self, chunks: Iterable[Chunk], stop: threading.Event, emit: Emit) -> None:
        """Has all chunks sampled and committed; after `stop` is set, those that nodes have already."""
        rest = iter(chunks)
        emit(Manned(self.devices))
        try:
            while True:
                is_all = stop.is_set() or self._ask(rest)
                if is_all and not any(chunk for _, chunk in self._under_way.values()):
                    return
                self._advance(emit)
        finally:
            for node in self._nodes.values():
                self._ray.kill(node.actor)
            self._nodes.clear()

    def _ask(self, rest: Iterator[Chunk]) -> bool:
        """Gives chunks to the nodes that can take some; whether there are no more."""
        busy = Counter(node.id for node, chunk in self._under_way.values() if chunk)
        takers = [node for node in self._nodes.values() if node.devices]
        while takers:
            node = min(takers, key=lambda node: busy[node.id])
            if busy[node.id] >= min(MOST_ASKED, CALLS_ASKED * math.ceil(node.devices * self._chunks_a_device)):
                takers.remove(node)
                continue
            chunk = self._again.popleft() if self._again else next(rest, None)
            if chunk is None:
                return True
            self._under_way[node.actor.run_chunk.remote(chunk)] = node, chunk
            busy[node.id] += 1
        return False

    def _advance(self, emit: Emit) -> None:
        """Waits a little for what nodes answer, and looks for new ones."""
        if time.monotonic() >= self._look:
            self._look = time.monotonic() + TICK_SECONDS
            self._recruit(emit)
        refs = list(self._under_way)
        done = self._ray.wait(refs, timeout=TICK_SECONDS)[0] if refs else time.sleep(TICK_SECONDS)
        for ref in done or ():
            self._settle(ref, emit)

    def _recruit(self, emit: Emit) -> None:
        """Gives an actor to each node that has none, and gives up those that are gone."""
        there, now = self._hosts(), time.monotonic()
        for node in [node for node in self._nodes.values() if node.id not in there]:
            self._give_up(node, "is lost", emit)
        for id, host in there.items():
            if id not in self._nodes and id not in self._given_up:
                self._hire(id, host)
        if self._nodes:
            self._seen = now
        elif now > self._seen + LONELY_SECONDS:
            lost = f"; {len(self._given_up)} were given up" if self._given_up else ""
            raise OSError(f"the Ray cluster has had no node to work on for {LONELY_SECONDS:.0f} s{lost}")

    def _hosts(self) -> dict[str, Mapping[str, Any]]:
        """The nodes that could take part, by id, as Ray describes them."""
        alive = {node["NodeID"]: node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU")}
        fast = {id: node for id, node in alive.items() if any(node["Resources"].get(kind) for kind in ACCELERATORS)}
        return fast or alive

    def _hire(self, id: str, host: Mapping[str, Any]) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        has = host["Resources"]
        worker = self._ray.remote(Worker).options(
            num_cpus=1,
            num_gpus=has.get("GPU", 0),
            resources={kind: has[kind] for kind in ACCELERATORS if kind != "GPU" and has.get(kind)},
            scheduling_strategy=NodeAffinitySchedulingStrategy(id, soft=False),
            max_concurrency=MOST_ASKED + 1,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )
        node = self._nodes[id] = _Node(id, host["NodeManagerHostname"], worker.remote(*self._arguments))
        self._under_way[node.actor.check.remote()] = node, None

    def _settle(self, ref: "ObjectRef", emit: Emit) -> None:
        """Takes an answer, or its not coming."""
        node, chunk = self._under_way[ref]
        try:
            with self._translated():
                answer = self._ray.get(ref)
        except self._ray.exceptions.RayError:
            self._give_up(node, "is lost", emit)
            return
        except Exception as error:
            if chunk is not None or self._checked is None:
                raise
            self._give_up(node, f"takes no part ({error})", emit)
            return
        del self._under_way[ref]
        if chunk is None:
            self._admit(node, answer, emit)
        else:
            events, self._usage[node] = answer
            for event in events:
                emit(event)

    def _admit(self, node: _Node, own: Checked, emit: Emit) -> None:
        first = self._checked = self._checked or own
        if (own.fingerprint, own.made_with) != (first.fingerprint, first.made_with):
            why = f"has another model or other versions ({own.made_with}, not {first.made_with})"
            self._give_up(node, why, emit)
            return
        node.devices = own.devices
        emit(Manned(self.devices))

    def _give_up(self, node: _Node, why: str, emit: Emit) -> None:
        """Hands on the chunks that it had; a node that comes back has another id."""
        del self._nodes[node.id]
        self._given_up.add(node.id)
        self._ray.kill(node.actor)
        chunks = [chunk for owner, chunk in self._under_way.values() if owner is node and chunk]
        self._under_way = {ref: task for ref, task in self._under_way.items() if task[0] is not node}
        self._again.extend(chunks)
        emit(Noted(f"the node {node.name} {why}: {len(chunks)} chunks go to others"))
        emit(Manned(self.devices))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raises what a node raised as it was raised there."""
        try:
            yield
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None


def _warn(event: Event) -> None:
    if isinstance(event, Noted):
        warnings.warn(event.text, stacklevel=2)


def _import() -> Any:
    try:
        import ray
    except ImportError:
        raise ValueError('the engine "ray" needs Ray: pip install "sdjax[ray]"') from None
    return ray
