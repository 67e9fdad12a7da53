"""Published numbers, how they are found, and what is within their tolerance."""

import csv
import math

import numpy as np
import pytest

from evodiff.errors import ConfigError
from evodiff.tables.published import (
    FOLDER,
    MEAN_ABOVE_MIN_OF_3,
    MIN_OF_3,
    RELATIVE_SD,
    Published,
    Verdict,
    matching,
    read,
    unmatched,
)
from evodiff.tables.text import ours_and_paper

NAMES = sorted(path.stem for path in FOLDER.glob("*.csv"))


def paper(value="2.91", variant="", nfe=10, **changes):
    words = {"model": "m", "method": "A", "metric": "FID", "images": "50000", "guidance": "", "table": "Table 1"}
    return Published(**{**words, "source": "S arXiv:1", "confidence": "quoted", **changes}, value=value,
                     variant=variant, nfe=nfe)  # fmt: skip


def test_all_numbers_are_here_once_with_their_sources():
    assert sum(len(read(name)) for name in NAMES) == 1886
    for name in NAMES:
        for p in read(name):
            assert np.isfinite(p.number) and p.number > 0
            assert p.source and p.table and p.method
            assert p.confidence in ("quoted", "read-from-figure", "secondary-note")


def test_a_file_has_the_columns_its_readme_explains():
    explained = (FOLDER / "README.md").read_text()
    with (FOLDER / "cifar10_edm.csv").open() as file:
        for column in next(csv.reader(file)):
            assert column in explained


def test_words_find_numbers_by_nfe():
    papers = [paper(nfe=5, value="9.0"), paper(), paper(variant="3M", value="2.5"), paper(nfe=None)]
    assert {n: p.value for n, p in matching(papers, {"source": "S", "variant": ""}).items()} == {5: "9.0", 10: "2.91"}
    assert matching(papers, {"method": "A", "variant": "3M", "plus": 9}) == {19: papers[2]}
    assert matching(papers, {"variant": "", "nfe": [10, 12]}) == {10: papers[1]}
    assert unmatched(papers, papers[:3]) == [papers[3]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"method": "B"}, "nothing is described"),
        ({"method": "A"}, "two numbers at NFE 10"),
        ({"methods": "A"}, "methods is no column"),
        ({"variant": "3M", "plus": "x"}, "plus='x' is impossible"),
        ({"variant": "3M", "nfe": 10}, r"nfe=10 is impossible; expected a list like \[12, 15\]"),
        ({"variant": "3M", "nfe": [11]}, "nothing is described by"),
    ],
)
def test_words_that_describe_nothing_or_too_much_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        matching([paper(), paper(variant="3M")], words)


def test_an_unknown_file_names_the_nearest():
    with pytest.raises(ConfigError, match=r"Did you mean cifar10_edm\?"):
        read("cifar_edm")


def verdict(*values, images=50_000, proxy=False, p=None, se=None):
    return Verdict(values, images, proxy, paper() if p is None else p, se)


def test_states():
    assert verdict().state == "missing"
    assert verdict(2.92).state == "ok"
    assert verdict(3.2).state == "off"
    assert verdict(2.6).state == "off"  # better than the paper is a difference too
    trial = verdict(2.92, proxy=True)
    assert (trial.state, trial.difference, trial.tolerance) == ("proxy", None, None)  # it is never compared
    assert Verdict((2.92,), 50_000, False, None).state == "done"


def test_the_tolerance_shrinks_with_images_and_runs_and_widens_with_our_scatter():
    one = 2 * RELATIVE_SD * 2.91 * np.sqrt(2) + 0.005
    assert verdict(2.9).tolerance == pytest.approx(one)
    assert verdict(2.9, images=12_500).tolerance == pytest.approx(2 * (one - 0.005) + 0.005)
    three = verdict(2.90, 2.91, 2.92)
    assert three.tolerance == pytest.approx(2 * RELATIVE_SD * 2.91 * np.sqrt(1 + 1 / 3) + 0.005)
    scattered = verdict(2.8, 2.9, 3.0)
    assert scattered.tolerance == pytest.approx(2 * 0.1 * np.sqrt(1 + 1 / 3) + 0.005)
    assert verdict(2.9, se=0.1).tolerance == pytest.approx(2 * 0.1 * np.sqrt(2) + 0.005)


def test_half_a_digit_is_the_papers_last_one():
    assert paper("2.9").rounding == 0.05
    assert paper("0.007").rounding == 0.0005
    assert paper("51").rounding == 0.5


def test_numbers_have_the_decimals_of_their_table():
    """The file says 3.5; the table it is from has two decimals."""
    v3 = matching(read("cifar10_edm"), {"source": "DPM-Solver-v3", "table": "Table 1", "method": "DPM-Solver-v3"})
    assert (v3[8].value, v3[8].rounding) == ("3.50", 0.005)


def test_the_least_of_three_is_compared_with_the_least_of_three():
    p = paper("1.97", variant="training config F; min of 3 FID runs")
    v = verdict(2.0, 1.98, 2.02, p=p)
    assert v.ours == 1.98
    assert v.tolerance == pytest.approx(2 * max(0.02, RELATIVE_SD * 1.97) * np.sqrt(2 * MIN_OF_3) + 0.005)
    assert verdict(2.0, 1.98, 2.02).ours == pytest.approx(2.0)  # other papers: the mean


def test_the_variance_of_the_least_of_three():
    draws = np.random.default_rng(0).standard_normal((400_000, 3)).min(axis=1)
    assert draws.var() == pytest.approx(MIN_OF_3, rel=0.01)


def test_the_mean_above_the_least_of_three():
    draws = np.random.default_rng(0).standard_normal((400_000, 3)).min(axis=1)
    assert draws.mean() == pytest.approx(-MEAN_ABOVE_MIN_OF_3, rel=0.01)


@pytest.mark.parametrize("ours", [1, 2, 3])
def test_equal_procedures_are_seldom_off_beside_the_least_of_three(ours):
    """At most one case of twenty, also where we have too few runs to take a least of three."""
    draws = 10 + 10 * RELATIVE_SD * np.random.default_rng(2).standard_normal((4000, 3 + ours))
    papers = [paper(f"{d[:3].min():.6f}", variant="min of 3 FID runs") for d in draws]
    off = [verdict(*d[3:], p=p).state == "off" for d, p in zip(draws.tolist(), papers, strict=True)]
    assert np.mean(off) < 0.055


def test_two_equal_procedures_differ_beyond_the_tolerance_in_one_case_of_twenty():
    """Papers of one run, ours of three, with exactly the scatter assumed: 95 % are ok."""
    draws = 10 + 10 * RELATIVE_SD * np.random.default_rng(1).standard_normal((20_000, 4))
    p = paper("10.000000")
    assumed = [Verdict((float(d[1:].mean()),) * 3, 50_000, False, p).tolerance for d in draws[:1]][0]
    beyond = np.abs(draws[:, 0] - draws[:, 1:].mean(axis=1)) > assumed
    assert beyond.mean() == pytest.approx(0.0455, abs=0.005)


def test_one_runs_scatter_is_its_standard_error():
    alone, several = Verdict((12.84,), 1000, False, None, 0.31), Verdict((12.0, 14.0), 1000, False, None, 0.31)
    assert (alone.scatter, ours_and_paper(alone)) == (0.31, "12.8±0.3")
    assert ours_and_paper(Verdict((412.0,), 1000, False, None, 23.0)) == "412±20"
    assert (several.scatter, ours_and_paper(several)) == (math.sqrt(2), "13.0±1")
    assert Verdict((), 1000, False, None, None).scatter is None


def test_confidence_is_students_between_runs():
    assert verdict(2.8, 2.9, 3.0).confidence == pytest.approx(4.30 * 0.1 / np.sqrt(3), rel=1e-3)
    assert verdict(2.9, se=0.02).confidence == pytest.approx(1.96 * 0.02)
    assert verdict(2.9).confidence is None
