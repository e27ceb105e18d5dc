"""Chunks that actors of Ray begin when a test has seen what comes before: no job has to be long."""

import os
import time
from collections import Counter
from pathlib import Path

FOLDER = "HELD_CHUNKS"
AFTER = {2: "joined", 6: "lost"}
"""{chunks that an actor has begun: what it waits for}"""


def free(event: str) -> None:
    """Lets the actors go on that wait for this event."""
    (Path(os.environ[FOLDER]) / event).touch()


def hold() -> None:
    """In a process of Ray: has each of its actors wait as AFTER says."""
    from sdjax.batch.worker import Worker

    begun, run_chunk = Counter(), Worker.run_chunk

    def held(self, chunk):
        for count, event in AFTER.items():
            while begun[self] >= count and not (Path(os.environ[FOLDER]) / event).exists():
                time.sleep(0.05)
        begun[self] += 1
        return run_chunk(self, chunk)

    Worker.run_chunk = held
