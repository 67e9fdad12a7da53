"""Samples on disk: shards of consecutive seeds, written whole, found by manifest."""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from evodiff.background import one_ahead
from evodiff.errors import StoreError
from evodiff.files import sha256, whole_file
from evodiff.locks import locked

READING = Lock()
"""One file at a time: NumPy parses headers as Python literals, and CPython counts the depth of that for all threads
together, so that two at once now and then end in a SystemError (its issue 106905)."""


@dataclass(frozen=True)
class Shard:
    """One file as the manifest lists it: seeds `first` to `last`, both included, and which arrays it `holds`.

    `made_by` says by what the features in it were made, where there are any (Protocol.features_by); `device` is what
    made the shard, in `seconds`.
    """

    first: int
    last: int
    sha256: str
    nfe: int
    seconds: float
    holds: tuple[str, ...] = ("images", "x")
    made_by: str | None = None
    device: str = ""

    @property
    def file(self) -> str:
        return shard_name(self.first)


def shard_name(first: int) -> str:
    return f"shard-{first:06d}.npz"


class SampleStore:
    """The images of one run. Only what `manifest.json` lists with its sha256 exists; every other file is ignored.

    Any number of processes may write to one store: `claim` hands a range to one of them, and the manifest changes
    under a lock. Shards without the arrays that it `needs` count as missing.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], seeds: range, shard: int = 500, needs: Sequence[str] = ()):
        if shard < 1:
            raise StoreError(f"shard={shard}: a shard holds at least 1 image")
        self.folder, self.run, self.seeds, self.shard, self.needs = folder, dict(run), seeds, shard, tuple(needs)
        self.shards  # noqa: B018  a folder of another run is refused before anything is made of it

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def shards(self) -> list[Shard]:
        """What the manifest lists, by seed. Raises StoreError if it is another run's or cannot be read."""
        return self._listed(self._read())

    def _listed(self, content: Mapping[str, Any]) -> list[Shard]:
        try:  # older manifests name a protocol instead of what made the features
            listed = [Shard(**{k: s[k] for k in s if k != "protocol"}) for s in content.get("shards", [])]
            return sorted((replace(s, holds=tuple(s.holds)) for s in listed), key=lambda s: s.first)
        except TypeError as e:
            raise StoreError(f"{self.manifest} cannot be read ({e}). Remove {self.folder} to sample anew.") from e

    @property
    def weights(self) -> dict[str, str]:
        """sha256 of the weight files that made what is here, and of what else they read; empty for an empty store."""
        return self._read().get("weights", {})

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of every shard, by file."""
        return {shard.file: shard.sha256 for shard in self.shards}

    def missing(self) -> list[range]:
        """The ranges of seeds still to be sampled, cut as the shards will be. Shards of another size count as well.

        A whole one without an array that is needed is one piece: it stays until what takes its place is whole."""
        pieces, at = [], self.seeds.start
        for shard in [*filter(self._intact, self.shards), None]:
            gap = range(at, shard.first if shard else self.seeds.stop)
            at = max(at, shard.last + 1) if shard else at
            while gap:
                cut = gap.start + self.shard - (gap.start - self.seeds.start) % self.shard
                pieces.append(range(gap.start, min(cut, gap.stop)))
                gap = range(min(cut, gap.stop), gap.stop)
            if shard and self._needs_more(shard):
                pieces.append(range(shard.first, shard.last + 1))
        return pieces

    def damaged(self) -> list[str]:
        """Listed files that are gone or no longer what was written: truncated, replaced, edited."""
        return [shard.file for shard in self.shards if not self._intact(shard)]

    def lacking(self) -> list[str]:
        """Whole files that were written without an array that is needed now."""
        return [shard.file for shard in self.shards if self._intact(shard) and self._needs_more(shard)]

    @contextmanager
    def claim(self, seeds: range) -> Iterator[bool]:
        """Hold a range against other processes; yields False if another one holds it, or if it is no more what is
        missing: finished, or in part by one that cuts the seeds in other places."""
        with locked(self.folder, f"{shard_name(seeds.start)}.lock", timeout=0) as held:
            yield held and seeds in self.missing()

    def tidy(self) -> None:
        """Remove the locks of ranges from a complete store, which would double its files. One that another process
        holds, to add an array it needs, loses its lock: at worst a third makes the same shard."""
        for lock in (self.folder / ".locks").glob("shard-*.lock"):
            lock.unlink(missing_ok=True)

    def write(
        self,
        seeds: range,
        arrays: Mapping[str, np.ndarray],
        *,
        nfe: int,
        seconds: float,
        weights: Mapping[str, str],
        made_by: str | None = None,
        device: str = "",
    ) -> None:
        """Add one shard of consecutive seeds. Its arrays, with one row per seed and in their order: `images` uint8
        [N, C, H, W], their `labels`, `x` the unrounded states, `features`, `logits` and `spatial` (see Shard.made_by);
        `preview` holds the images of the first seeds only.

        It takes the place of shards within it. Where another process, that cuts the seeds in other places, has written
        some of them with others in the meantime, those stay, and this shard is dropped."""
        path = self.folder / shard_name(seeds.start)
        for left in self.folder.glob(f".{path.stem}.*"):  # by a process that was killed: these seeds are ours now
            left.unlink(missing_ok=True)
        named: dict[str, Any] = {"seeds": np.asarray(seeds), **arrays}
        with whole_file(path) as temporary, temporary.open("wb") as f:
            np.savez(f, **named)
        entry = Shard(seeds.start, seeds[-1], sha256(path), nfe, round(seconds, 3), tuple(arrays), made_by, device)
        with locked(self.folder, "manifest.lock"):
            content = self._read()
            self._check_files(content, weights, unnoted=weights)
            listed = self._listed(content)
            others = [s for s in listed if s.last < entry.first or s.first > entry.last]
            within = [s for s in listed if s.first >= entry.first and s.last <= entry.last]
            if any(self._usable(s) for s in listed if s not in others and s not in within):
                path.unlink()
                return
            shards = [asdict(s) for s in (*others, entry)]
            content = {"run": self.run, "weights": dict(weights), "shards": shards}
            with whole_file(self.manifest) as temporary, temporary.open("w") as f:
                f.write(json.dumps(content, indent=1) + "\n")
                f.flush()
                os.fsync(f.fileno())  # or a power cut leaves an empty file under the new name

    def files(self, wanted: Callable[[Shard], Sequence[str]]) -> Iterator[tuple[Shard, dict[str, np.ndarray]]]:
        """Every shard with those of its arrays that are `wanted` of it, in order of seeds; one is read ahead.

        Raises what `check_complete` raises.
        """
        self.check_complete()

        def read(shard: Shard) -> tuple[Shard, dict[str, np.ndarray]]:
            with READING, np.load(self.folder / shard.file) as arrays:
                return shard, {name: arrays[name] for name in wanted(shard)}

        yield from one_ahead(read, self.shards)

    def check_complete(self) -> None:
        """Raise StoreError if shards are missing, lack an array that is needed, or are not what the manifest says."""
        if damaged := self.damaged():
            raise StoreError(
                f"{', '.join(damaged)} in {self.folder} is not what was written (missing, truncated or from elsewhere: "
                f"sha256 differs). Run the sampling again: it makes only what is missing."
            )
        if lacking := self.lacking():
            raise StoreError(
                f"{self.folder} has its images, but {len(lacking)} of {len(self.shards)} shards not the "
                f"{' and '.join(self.needs)} that the errors against a reference run are taken from. Sampling makes "
                f"these shards anew; with reference_run=null the errors are left out, and the images are enough."
            )
        if missing := self.missing():
            raise StoreError(
                f"{self.folder} lacks {sum(map(len, missing))} of {len(self.seeds)} images (first: seed "
                f"{missing[0].start}). Run the sampling again: it makes only what is missing."
            )

    def batches(self, *names: str) -> Iterator[tuple[np.ndarray, ...]]:
        """The named arrays (`seeds`, `images`, `x`) shard by shard, in order of seeds.

        Raises StoreError if shards are missing or damaged, or were written without one of these arrays.
        """

        def wanted(shard: Shard) -> tuple[str, ...]:
            if lacking := [name for name in names if name not in ("seeds", *shard.holds)]:
                raise StoreError(
                    f"{shard.file} in {self.folder} was written without {' and '.join(lacking)}. Remove the folder and "
                    f"sample anew with save=shards (`x` is kept for metrics=[rmse] or [sw], with a reference_run)."
                )
            return names

        for _, arrays in self.files(wanted):
            yield tuple(arrays[name] for name in names)

    def first(self, n: int) -> np.ndarray:
        """The first n images, or as many as were kept."""
        found = np.empty(0, np.uint8)
        for shard, arrays in self.files(lambda shard: [n for n in ("images", "preview") if n in shard.holds][:1]):
            kept = next(iter(arrays.values()), found[:0])
            found = np.concatenate([found, kept[: n - len(found)]]) if len(found) else kept[:n]
            if len(found) == n or len(kept) <= shard.last - shard.first:
                break
        return found

    def check_files(self, files: Mapping[str, str], unnoted: Collection[str] = ()) -> None:
        """Raise StoreError if the images here were made of other files than these, name -> sha256. The manifest may not
        know those `unnoted`: it is from before they were written there."""
        self._check_files(self._read(), files, unnoted)

    def _check_files(self, content: Mapping[str, Any], files: Mapping[str, str], unnoted: Collection[str]) -> None:
        known = content.get("weights", {})
        names = known.keys() | (files.keys() - {*unnoted})
        changed = sorted(name for name in names if known.get(name) != files.get(name))
        if content.get("shards") and changed:
            raise StoreError(
                f"{self.folder} was sampled with other files ({', '.join(changed)}). Remove the folder to sample anew, "
                f"or restore them."
            )

    def _usable(self, shard: Shard) -> bool:
        return self._intact(shard) and not self._needs_more(shard)

    def _needs_more(self, shard: Shard) -> bool:
        return not {*self.needs} <= {*shard.holds}

    def _intact(self, shard: Shard) -> bool:
        """Whether a listed file is there and unchanged. A damaged or replaced one counts as missing."""
        path = self.folder / shard.file
        return path.is_file() and sha256(path) == shard.sha256

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
            run = dict(content["run"])
            dict(content.get("weights", {}))
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise StoreError(f"{self.manifest} cannot be read ({e}). Remove {self.folder} to sample anew.") from e
        if run != self.run:
            differing = sorted(k for k in {*run, *self.run} if run.get(k) != self.run.get(k))
            raise StoreError(
                f"{self.folder} holds another run: {', '.join(differing)} differ. "
                f"Move the folder away or choose another results folder."
            )
        return content
