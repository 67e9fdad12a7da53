"""One run on many processes: torchrun's ranks, or several commands by hand, on one machine or more.

They share nothing but the run's folder. Each takes shards that nobody has, so there is no collective to hang in, and a
dead process costs its unfinished shard. The lock of a shard ends with its process, whichever way that ends: it is the
system's own (`flock`). A file system without it is refused with a StoreError, for a file in the place of a lock stays
when its machine dies, and the others would wait for ever.
"""

import sys
import time

from evodiff.runs.job import Job, store_of
from evodiff.runs.sample import sample_run
from evodiff.store import SampleStore

POLL = 1.0
"""Seconds between two looks at a run that others work on."""


def finish(job: Job) -> None:
    """Sample until every image of a run is there: wait for the shards of others, and take over those of the dead.

    Raises what sample_run raises.
    """
    told = False
    while not sample_run(job):
        store = store_of(job)
        while (missing := store.missing()) and not any(_free(store, seeds) for seeds in missing):
            if not told:
                print(
                    f"{job.run.key()}: waiting for {sum(map(len, missing))} images that other processes make",
                    file=sys.stderr,
                    flush=True,
                )
                told = True
            time.sleep(POLL)


def _free(store: SampleStore, seeds: range) -> bool:
    """Whether nobody works on a missing shard."""
    with store.claim(seeds) as mine:
        return mine
