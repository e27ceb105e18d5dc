"""Jobs that wait for a place: a bounded queue in which owners take turns."""

import heapq
import itertools
from collections import defaultdict
from collections.abc import Collection, Hashable
from typing import Any

from sdjax.engine.groups import Group
from sdjax.engine.job import Job


class QueueFull(RuntimeError):
    """No more jobs can wait."""


class Waiting:
    """Jobs in the order of their priority, and then of their turns: the n-th job of an owner has the turn n after the
    turn that was served last when it came (start-time fair queueing), so that a long series does not hold up others.

    Not safe for threads.
    """

    def __init__(self, most: int):
        self._most, self._numbers = most, itertools.count()
        self._queues: dict[Group, list[tuple[int, int, int, Job]]] = defaultdict(list)
        self._last: dict[Any, int] = {}  # the turn of each owner's last job
        self._served = 0

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def push(self, job: Job) -> None:
        """Raises QueueFull."""
        if len(self) >= self._most:
            raise QueueFull(f"{self._most:,} requests are waiting, and no more can")
        turn = self._turn(job.owner)
        heapq.heappush(self._queues[job.group], (-job.priority, turn, next(self._numbers), job))

    def _forget_cancelled(self) -> None:
        for group, queue in self._queues.items():
            gone = [entry[3] for entry in queue if entry[3].future.done()]
            if gone:
                self._queues[group] = [entry for entry in queue if not entry[3].future.done()]
                heapq.heapify(self._queues[group])
            for job in gone:
                job.end()

    def ahead(self, jobs: Collection[Job]) -> int:
        """How many that wait are taken before the first of these, if each were taken as soon as it can be."""
        own = set(map(id, jobs))
        entries = [entry for queue in self._queues.values() for entry in queue if not entry[3].future.done()]
        first = min((entry[:3] for entry in entries if id(entry[3]) in own), default=None)
        others = [entry for entry in entries if id(entry[3]) not in own]
        return 0 if first is None else sum(entry[:3] < first for entry in others)

    def put_back(self, job: Job) -> None:
        """Lets a job that was taken wait again, before others of its priority."""
        heapq.heappush(self._queues[job.group], (-job.priority, 0, next(self._numbers), job))

    def _turn(self, owner: Hashable) -> int:
        turn = max(self._served, self._last.get(owner, 0)) + 1
        self._last = {other: last for other, last in self._last.items() if last > self._served} | {owner: turn}
        return turn

    def groups(self) -> list[Group]:
        """Those of which a job waits, in the order of their first ones."""
        self._forget_cancelled()
        self._queues = defaultdict(list, {group: queue for group, queue in self._queues.items() if queue})
        return sorted(self._queues, key=lambda group: self._queues[group][0][:3])

    def take(self, group: Group, most: int) -> list[Job]:
        """The next jobs of a group, so many at most, without those that are cancelled."""
        taken: list[Job] = []
        queue = self._queues.get(group, [])
        while queue and len(taken) < most:
            _, turn, _, job = heapq.heappop(queue)
            self._served = max(self._served, turn)
            if job.future.done():
                job.end()
            else:
                taken.append(job)
        return taken
