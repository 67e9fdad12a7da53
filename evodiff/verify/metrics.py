"""`evodiff verify metrics`: our metrics beside torch-fidelity's and pytorch-fid's, on the same weights and images.

Without --weights, Inception is filled with random numbers in the layout of the published file: what is compared is the
arithmetic, and it is the same for every weight.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evodiff.compat import import_torchvision
from evodiff.errors import ConfigError
from evodiff.metrics.features import extractor
from evodiff.metrics.frechet import frechet_distance
from evodiff.metrics.inception_score import inception_score
from evodiff.metrics.kid import kid
from evodiff.metrics.moments import Moments
from evodiff.metrics.precision_recall import precision_recall
from evodiff.metrics.resize import resize


@dataclass(frozen=True)
class Check:
    """What was compared with what, the relative error, and the one that is allowed; None: could not be run, and why."""

    what: str
    beside: str
    error: float | None
    allowed: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.error is None or self.error <= self.allowed

    def __str__(self) -> str:
        if self.error is None:
            return f"skip  {self.what:<34} beside {self.beside:<15} {self.note}"
        state = "ok  " if self.ok else "FAIL"
        found = f"{self.error:.1e} (allowed {self.allowed:.0e})"
        return f"{state}  {self.what:<34} beside {self.beside:<15} {found} {self.note}"


def relative(ours: Tensor | float, theirs: Tensor | float) -> float:
    """|ours - theirs| / |theirs| in the L2 norm; inf for nan."""
    a, b = (torch.as_tensor(v, dtype=torch.float64) for v in (ours, theirs))
    error = ((a - b).norm() / b.norm()).item()
    return error if error == error else float("inf")


def write_random_inception(path: Path, seed: int = 0) -> None:
    """A file of the 2015 Inception's weights in the published layout, random but with activations of normal size."""
    import_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return None

    torch.save({}, path)
    state = Unloaded("unloaded", ["2048"], feature_extractor_weights_path=str(path)).state_dict()
    random = torch.Generator().manual_seed(seed)
    for key, value in state.items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=random)
            if key.endswith("running_var"):
                value.copy_(1 + 0.5 * noise.tanh())
            elif key.endswith("bn.weight"):
                value.copy_(1 + 0.1 * noise)
            else:
                fan_in = value[0].numel() if value.ndim > 1 else 100
                value.copy_(noise * (2 / fan_in) ** 0.5)
    torch.save(state, path)


def checks(weights: Path) -> Iterator[Check]:
    """All comparisons, one after the other; `weights` is a file of Inception weights."""
    yield from _features(weights)
    yield from _distances()


def _features(weights: Path) -> Iterator[Check]:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(weights))
    ours = extractor("inception", "cpu", "tensorflow", "128", weights)
    random = torch.Generator().manual_seed(0)
    for h, w in ((32, 32), (64, 48), (320, 300)):
        images = torch.randint(0, 256, (4, 3, h, w), dtype=torch.uint8, generator=random)
        with torch.inference_mode():
            features, logits = theirs(images)
        out = ours(images)
        yield Check(f"features of {w}x{h} images", "torch-fidelity", relative(out.features, features), 1e-5)
        assert out.logits is not None
        yield Check(f"logits of {w}x{h} images", "torch-fidelity", relative(out.logits, logits), 1e-5)
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=random)
    one_by_one = torch.cat([ours(image).features for image in images.split(1)])
    yield Check("features, batch of 16", "batches of 1", relative(ours(images).features, one_by_one), 1e-5)
    with _pytorch_fid_inception(weights) as network, torch.inference_mode():
        features = network(images / 255)[0].flatten(1)
    found = extractor("inception", "cpu", "torch", "127.5", weights)(images).features
    yield Check("features of 32x32 images", "pytorch-fid", relative(found, features), 1e-5)
    yield Check(
        "clean resize, 32 to 299", "Pillow", relative(resize(images[:1], 299, "clean"), _pillow(images[:1])), 1e-5
    )
    large = torch.randint(0, 256, (1, 3, 400, 333), dtype=torch.uint8, generator=random)
    yield Check("clean resize, 333x400 to 299", "Pillow", relative(resize(large, 299, "clean"), _pillow(large)), 1e-5)


@contextmanager
def _pytorch_fid_inception(weights: Path) -> Iterator[nn.Module]:
    import_torchvision()
    from pytorch_fid import inception

    download = inception.load_state_dict_from_url
    inception.load_state_dict_from_url = lambda *args, **kwargs: torch.load(weights, weights_only=True)
    try:
        yield inception.InceptionV3().eval()
    finally:
        inception.load_state_dict_from_url = download


def _pillow(images: Tensor) -> Tensor:
    from PIL import Image

    channels = [Image.fromarray(c) for c in images[0].float().numpy()]
    resized = [np.asarray(c.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255) for c in channels]  # clean-fid
    return torch.from_numpy(np.stack(resized))[None]


def _distances(n: int = 2000, d: int = 256) -> Iterator[Check]:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    random = torch.Generator().manual_seed(0)
    mix = torch.randn(d, d, generator=random) / d**0.5
    fake, real = ((torch.randn(n, d, generator=random) + shift) @ mix for shift in (0.0, 0.1))
    fake, real = fake.relu() * 1.1, real.relu()
    statistics = [fid_features_to_statistics(x) for x in (fake, real)]
    ours = frechet_distance(Moments.of(fake), Moments.of(real))
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    yield Check(f"FID, {n} x {d}", "torch-fidelity", relative(ours, theirs), 1e-6)
    few = [x[: d // 2] for x in (fake, real)]
    deficient = frechet_distance(Moments.of(few[0]), Moments.of(few[1]))
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, few), verbose=False)[
        "frechet_inception_distance"
    ]
    yield Check(f"FID, {d // 2} x {d} (rank-deficient)", "torch-fidelity", relative(deficient, theirs), 1e-6)
    yield _beside_pytorch_fid(ours, *statistics)
    logits = 3 * torch.randn(n, d, generator=random)
    found = isc_features_to_metric(logits)
    theirs = torch.tensor([found["inception_score_mean"], found["inception_score_std"]])
    yield Check("Inception Score", "torch-fidelity", relative(torch.tensor(inception_score(logits)), theirs), 1e-6)
    wide = fake.double(), real.double()
    found = kid_features_to_metric(*wide, kid_subsets=10, verbose=False)
    theirs = torch.tensor([found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]])
    yield Check("KID", "torch-fidelity", relative(torch.tensor(kid(fake, real, subsets=10)), theirs), 1e-6, "(float64)")
    found = prc_features_to_metric(fake, real, verbose=False)
    coverage = precision_recall(fake, real)
    pair = torch.tensor([coverage.precision, coverage.recall]), torch.tensor([found["precision"], found["recall"]])
    yield Check("precision and recall", "torch-fidelity", relative(*pair), 1e-6)


def _beside_pytorch_fid(ours: float, fake: dict[str, Any], real: dict[str, Any]) -> Check:
    from pytorch_fid.fid_score import calculate_frechet_distance

    try:
        theirs = calculate_frechet_distance(fake["mu"], fake["sigma"], real["mu"], real["sigma"])
    except TypeError:
        return Check("FID", "pytorch-fid", None, 1e-5, "its sqrtm call fails with this SciPy (1.18 dropped `disp`)")
    return Check("FID", "pytorch-fid", relative(ours, float(theirs)), 1e-5)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="evodiff verify metrics", description=__doc__)
    parser.add_argument("--weights", type=Path, help="Inception weights as published (pt_inception-2015-12-05-*.pth)")
    args = parser.parse_args(argv)
    if args.weights and not args.weights.is_file():
        raise ConfigError(f"there is no file {args.weights}; leave --weights out for random ones")
    with tempfile.TemporaryDirectory() as folder:
        weights = args.weights or Path(folder) / "inception.pth"
        if not args.weights:
            write_random_inception(weights)
        done = []
        for check in checks(weights):
            print(check, flush=True)
            done.append(check)
    return int(not all(check.ok for check in done))
