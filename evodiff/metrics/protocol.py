"""A protocol: everything besides the images that decides a score, under one name and one hash."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from omegaconf import OmegaConf

from evodiff.errors import ConfigError
from evodiff.paths import CONFIGS, check_checkout
from evodiff.sampling import ROUNDINGS

LABEL_POLICIES = ("none", "seeded_random")
DIGEST = re.compile("[0-9a-f]{8,64}")
METRIC = re.compile("fid|fd_[a-z0-9_]+")


@dataclass(frozen=True)
class Protocol:
    """How images become numbers. Two scores are comparable when the hashes of their protocols are equal, and where a
    sha256 is None, the files as well that were used (evodiff.metrics.score.files_used).

    metric            the Fréchet distance's name: `fid`, for features of the 2015 Inception only, or `fd_...`
    extractor         name in `evodiff.metrics.features.NETWORKS`
    extractor_sha256  of its weights file, or the leading 8 hex digits or more; None: not published, not checked
    resize, scaling   how images are brought to the extractor: `native` is its own way, otherwise see
                      evodiff.metrics.resize.KERNELS and evodiff.metrics.inception.SCALINGS
    rounding          how [-1, 1] became uint8: `round` or `truncate` (evodiff.sampling.to_uint8)
    dataset           what the reference is of
    reference         file under checkpoints/, or name in the registry
    reference_sha256  like extractor_sha256
    n                 number of images; fewer make a proxy, which no table of a paper accepts
    labels            how the published scores chose the classes of their images: `seeded_random`, or `none` where their
                      models have none. What a conditional model is given here is always by each image's seed
    feature_dtype, moment_dtype  of the extractor and of everything after it
    is_part           images in one part of the Inception Score; None: a tenth of them, as torch-fidelity takes
    """

    name: str
    metric: str
    extractor: str
    extractor_sha256: str | None
    resize: str
    scaling: str
    rounding: str
    dataset: str
    reference: str
    reference_sha256: str | None
    n: int
    labels: str = "none"
    feature_dtype: str = "float32"
    moment_dtype: str = "float64"
    is_part: int | None = None

    def __post_init__(self) -> None:
        for key in ("name", "metric", "extractor", "resize", "dataset", "reference"):
            if not isinstance(value := getattr(self, key), str):
                raise ConfigError(f"protocol.{key}={value} is impossible: expected text.")
        for key in ("extractor_sha256", "reference_sha256"):
            if (value := getattr(self, key)) is not None and not DIGEST.fullmatch(value):
                raise ConfigError(f"protocol.{key}={value} is impossible: expected 8 to 64 hex digits, or null.")
        if not METRIC.fullmatch(self.metric):
            raise ConfigError(
                f"protocol.metric={self.metric} is impossible: expected fid, or fd_ and lower-case letters or digits."
            )
        if self.metric == "fid" and self.extractor != "inception":
            raise ConfigError(
                f"protocol.metric={self.metric} is impossible: FID is of the features of inception, not of "
                f"{self.extractor}. Call it fd_{self.extractor}, say."
            )
        allowed: dict[str, tuple[str, ...]] = {"rounding": ROUNDINGS, "labels": LABEL_POLICIES}
        allowed |= {"feature_dtype": ("float32",), "moment_dtype": ("float64",)}
        for key, values in allowed.items():
            if getattr(self, key) not in values:
                raise ConfigError(
                    f"protocol {self.name}: {key}={getattr(self, key)!r} is not possible; choose {' or '.join(values)}"
                )
        if not self.reference:
            raise ConfigError(f"protocol {self.name}: reference={self.reference!r} names no file; see checkpoints/")
        if self.is_part is not None and (not isinstance(self.is_part, int) or self.is_part < 1):
            raise ConfigError(
                f"protocol {self.name}: is_part={self.is_part} is not possible; a part has 1 image or more"
            )
        if not isinstance(self.n, int) or self.n < 2:
            raise ConfigError(
                f"protocol {self.name}: n={self.n} is not possible; expected a whole number like 5000, and 2 or more, "
                f"for a covariance needs 2 images"
            )

    def fields(self) -> dict[str, Any]:
        # is_part came when there were scores already, whose protocols have no such field
        return {name: value for name, value in asdict(self).items() if (name, value) != ("is_part", None)}

    @cached_property
    def hash(self) -> str:
        """8 hex digits of the canonical JSON of all fields."""
        canonical = json.dumps(self.fields(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:8]

    @property
    def features(self) -> str:
        """What decides the features of an image, in one line that ends with the digits known of the extractor's sha256:
        what made some features (`features_by`) begins with it, or it was another protocol."""
        deciding = ("extractor", "resize", "scaling", "rounding", "feature_dtype")
        known = ", ".join(f"{name}={getattr(self, name)}" for name in deciding)
        return f"{known}, sha256={self.extractor_sha256 or ''}"

    def features_by(self, extractor_sha256: str) -> str:
        """`features` with the sha256 in full of the extractor that is used: what differs in it is not comparable."""
        return replace(self, extractor_sha256=extractor_sha256).features

    def describe(self) -> dict[str, Any]:
        """All fields and the hash, as plain data for a record."""
        return {**self.fields(), "hash": self.hash}

    def key(self, metric: str, n: int) -> str:
        """The name of a metric of n images: `fid@50000`, `is@50000`; never FID, IS or KID of other features than the
        2015 Inception's: those are `fd_mnist@5000`, `is_mnist@5000`."""
        if "fid" in metric:
            return f"{metric.replace('fid', self.metric)}@{n}"
        return f"{metric}{'' if self.metric == 'fid' else self.metric.removeprefix('fd')}@{n}"

    def is_proxy(self, key: str) -> bool:
        """Whether the metric of that name was taken on another number of images than the protocol asks for."""
        return not key.endswith(f"@{self.n}")


def protocol(name: str, /, **changes: Any) -> Protocol:
    """The protocol in configs/protocol/NAME.yaml, with entries replaced by `changes`. Raises ConfigError."""
    check_checkout()
    files = {p.stem: p for p in (CONFIGS / "protocol").glob("*.yaml") if p.stem != "none"}
    if name not in files:
        raise ConfigError(f"no protocol is called {name!r}; there are {', '.join(sorted(files))}")
    values = OmegaConf.to_container(OmegaConf.load(files[name]), resolve=True)
    if not isinstance(values, dict):
        raise ConfigError(f"{files[name]} is no protocol: expected a mapping of fields")
    return from_dict({**values, **changes})


def from_dict(values: Mapping[Any, Any]) -> Protocol:
    """The inverse of `describe`, and what a composed config means.

    `references` and `reference_sha256s`, mappings by data set, stand for `reference` and `reference_sha256` where these
    are not given; a `reference` that is given must not be that of another data set.
    """
    given = {str(k): v for k, v in values.items() if k != "hash"}
    references, digests = given.pop("references", None), given.pop("reference_sha256s", None) or {}
    dataset = given.get("dataset")
    if references is not None and "reference" in given:
        if of := [name for name, file in references.items() if file == given["reference"] and name != dataset]:
            raise ConfigError(
                f"protocol.dataset={dataset}: {given['reference']} is of {of[0]}; set protocol.reference as well, to "
                f"statistics of {dataset}."
            )
    elif references is not None:
        if dataset not in references:
            raise ConfigError(
                f"protocol {given.get('name')} has no reference of {dataset!r}; set protocol.dataset to one of "
                f"{', '.join(references)}"
            )
        given |= {"reference": references[dataset], "reference_sha256": digests.get(dataset)}
    known = [f.name for f in fields(Protocol)]
    given.setdefault("reference_sha256", None)
    required = [f.name for f in fields(Protocol) if f.default is MISSING]
    unknown, missing = sorted(given.keys() - set(known)), [k for k in required if k not in given]
    if unknown or missing:
        raise ConfigError(
            f"protocol {given.get('name')}: unknown fields {unknown}, missing fields {missing}; "
            f"there are {', '.join(known)}"
        )
    for name in ("scaling", "extractor_sha256", "reference_sha256"):
        if given[name] is not None:
            given[name] = str(given[name])  # a command line makes numbers of 127.5 and of digits alone
    return Protocol(**given)
