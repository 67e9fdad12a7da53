"""Samples on disk: shards of consecutive seeds, written whole, found by manifest."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from evodiff.errors import StoreError
from evodiff.files import sha256, whole_file


@dataclass(frozen=True)
class Shard:
    """One file as the manifest lists it: seeds `first` to `last`, both included."""

    first: int
    last: int
    sha256: str
    nfe: int
    seconds: float

    @property
    def file(self) -> str:
        return shard_name(self.first)


def shard_name(first: int) -> str:
    return f"shard-{first:06d}.npz"


class SampleStore:
    """The images of one run. Only what `manifest.json` lists with its sha256 exists; every other file is ignored.

    Any number of processes may write to one store: `claim` hands a range to one of them, and the manifest changes
    under a lock.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], seeds: range, shard: int = 500):
        if shard < 1:
            raise StoreError(f"shard={shard}: a shard holds at least 1 image")
        self.folder, self.run, self.seeds, self.shard = folder, dict(run), seeds, shard
        self.shards  # noqa: B018  a folder of another run is refused before anything is made of it

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def shards(self) -> list[Shard]:
        """What the manifest lists, by seed. Raises StoreError if it is another run's or cannot be read."""
        content = self._read()
        return sorted((Shard(**s) for s in content.get("shards", [])), key=lambda s: s.first)

    @property
    def weights(self) -> dict[str, str]:
        """sha256 of the weight files that made what is here; empty for an empty store."""
        return self._read().get("weights", {})

    def missing(self) -> list[range]:
        """The ranges of seeds still to be sampled, cut as the shards will be."""
        done = {shard.first for shard in self.shards if self._intact(shard)}
        cuts = range(self.seeds.start, self.seeds.stop, self.shard)
        return [range(a, min(a + self.shard, self.seeds.stop)) for a in cuts if a not in done]

    def damaged(self) -> list[str]:
        """Listed files that are gone or no longer what was written: truncated, replaced, edited."""
        return [shard.file for shard in self.shards if not self._intact(shard)]

    @contextmanager
    def claim(self, seeds: range) -> Iterator[bool]:
        """Hold a range against other processes; yields False if another one holds or has finished it."""
        lock = FileLock(self._lock_folder() / f"{shard_name(seeds.start)}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield not any(shard.first == seeds.start and self._intact(shard) for shard in self.shards)
        finally:
            lock.release()

    def write(
        self,
        seeds: Sequence[int],
        images: np.ndarray,
        x: np.ndarray,
        *,
        nfe: int,
        seconds: float,
        weights: Mapping[str, str],
    ) -> None:
        """Add one shard: uint8 images [N, C, H, W] and the unrounded states x, in that order of seeds."""
        path = self.folder / shard_name(seeds[0])
        with whole_file(path) as temporary, temporary.open("wb") as f:
            np.savez_compressed(f, seeds=np.asarray(seeds), images=images, x=x.astype(np.float32))
        entry = {
            "first": seeds[0],
            "last": seeds[-1],
            "sha256": sha256(path),
            "nfe": nfe,
            "seconds": round(seconds, 3),
        }
        with FileLock(self._lock_folder() / "manifest.lock"):
            content = self._read()
            self._check_weights(content, weights)
            others = [s for s in content.get("shards", []) if s["first"] != seeds[0]]
            content = {"run": self.run, "weights": dict(weights), "shards": [*others, entry]}
            with whole_file(self.manifest) as temporary:
                temporary.write_text(json.dumps(content, indent=1) + "\n")

    def batches(self, *names: str) -> Iterator[tuple[np.ndarray, ...]]:
        """The named arrays (`seeds`, `images`, `x`) shard by shard, in order of seeds.

        Raises StoreError if shards are missing or a file is not what the manifest promises.
        """
        if damaged := self.damaged():
            raise StoreError(
                f"{', '.join(damaged)} in {self.folder} is not what was written (missing, truncated or from elsewhere: "
                f"sha256 differs). Run the sampling again: it makes only what is missing."
            )
        if missing := self.missing():
            raise StoreError(
                f"{self.folder} lacks {sum(map(len, missing))} of {len(self.seeds)} images (first: seed "
                f"{missing[0].start}). Run the sampling again: it makes only what is missing."
            )
        for shard in self.shards:
            with np.load(self.folder / shard.file) as file:
                yield tuple(file[name] for name in names)

    def first(self, n: int) -> np.ndarray:
        """The first n images, or all if there are fewer."""
        found: list[np.ndarray] = []
        for (images,) in self.batches("images"):
            found.append(images[: n - sum(map(len, found))])
            if sum(map(len, found)) == n:
                break
        return np.concatenate(found)

    def check_weights(self, weights: Mapping[str, str]) -> None:
        """Raise StoreError if the images here were made with other weight files."""
        self._check_weights(self._read(), weights)

    def _check_weights(self, content: Mapping[str, Any], weights: Mapping[str, str]) -> None:
        if content.get("shards") and content["weights"] != dict(weights):
            changed = sorted(k for k in weights if content["weights"].get(k) != weights[k])
            raise StoreError(
                f"{self.folder} was sampled with other weights ({', '.join(changed) or 'other files'}). "
                f"Remove the folder to sample anew, or restore the weights."
            )

    def _intact(self, shard: Shard) -> bool:
        """Whether a listed file is there and unchanged. A damaged or replaced one counts as missing."""
        path = self.folder / shard.file
        return path.exists() and sha256(path) == shard.sha256

    def _lock_folder(self) -> Path:
        locks = self.folder / ".locks"
        try:
            locks.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise StoreError(f"cannot write to {self.folder}: {e.strerror}. Choose another results folder.") from e
        return locks

    def _read(self) -> dict[str, Any]:
        if not self.manifest.exists():
            stray = next(self.folder.glob("shard-*.npz"), None) if self.folder.exists() else None
            if stray is not None and not (self.folder / ".locks").exists():
                raise StoreError(
                    f"{stray} belongs to no run: {self.folder} has no manifest.json. Move the folder away."
                )
            return {}
        try:
            content = json.loads(self.manifest.read_text())
            run = content["run"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise StoreError(f"{self.manifest} cannot be read ({e}). Remove {self.folder} to sample anew.") from e
        if run != self.run:
            differing = sorted(k for k in {*run, *self.run} if run.get(k) != self.run.get(k))
            raise StoreError(
                f"{self.folder} holds another run: {', '.join(differing)} differ. "
                f"Move the folder away or choose another results folder."
            )
        return content
