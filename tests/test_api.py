"""evodiff.sample: the images of `evodiff run`, and an answer to what cannot be."""

import doctest
import math
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

import evodiff
import evodiff.api
from evodiff.api import named_solver
from evodiff.denoiser import Counting
from evodiff.errors import BudgetError, ConfigError, SamplingError
from evodiff.grid import Karras, TimeGrid
from evodiff.guidance import ClassifierFree
from evodiff.models.analytic import mixture
from evodiff.runs.job import Job, store_of
from evodiff.runs.sample import sample_run
from evodiff.schedule import EDM, DiscreteVP
from evodiff.solvers.ddim import DDIM
from evodiff.solvers.dpm_solver_v3 import Statistics
from evodiff.solvers.evodiff import EVODiff
from evodiff.solvers.heun import Heun
from evodiff.solvers.singlestep import DPMSolverPPSinglestep
from evodiff.solvers.teleport import Teleport


def test_the_example_of_the_documentation():
    assert doctest.testmod(evodiff.api).failed == 0


def test_importing_the_package_is_light():
    code = "import sys, evodiff; assert 'torch' not in sys.modules; assert {'sample', 'wrap'} <= set(dir(evodiff))"
    subprocess.run([sys.executable, "-c", code], check=True)
    subprocess.run([sys.executable, "-c", "import evodiff; evodiff.guidance.ClassifierFree(2.0)"], check=True)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["solver=dpmpp_3s", "nfe=10"],
        ["solver=heun", "grid=karras", "nfe=9", "denoise_final=true"],
        ["solver=sde_dpmpp_2", "threshold=clip", "dtype=float32", "t_end=0.01", "batch=2"],
    ],
)
def test_it_makes_the_images_of_a_run(results, overrides):
    job = Job.compose(
        ["model=mixture", "seeds=3-7", "protocol=none", "metrics=[]", "reference_run=null", "device=cpu", *overrides]
    )
    assert sample_run(job)
    run = job.run
    dtype = getattr(torch, run.dtype)
    names = {"solver": run.solver["name"], "grid": run.grid["name"], "dtype": dtype}
    same = {name: getattr(run, name) for name in ("nfe", "denoise_final", "t_start", "t_end", "threshold")}
    out = evodiff.sample("mixture", seeds=range(3, 8), batch=job.batch, **names, **same)
    assert torch.equal(out.images, torch.from_numpy(store_of(job).first(5)))
    assert (out.nfe, out.seeds) == (run.nfe, (3, 4, 5, 6, 7))
    assert out.x.dtype == dtype


def test_objects_do_what_their_names_do():
    by_name = evodiff.sample("mixture", "heun", 8, range(2), grid="karras")
    by_object = evodiff.sample(mixture(), Heun(), 8, range(2), grid=Karras())
    own = Counting(mixture().denoiser(None))
    by_denoiser = evodiff.sample(own, Heun(), 8, range(2), grid=Karras(), shape=(3, 8, 8))
    assert torch.equal(by_name.x, by_object.x) and torch.equal(by_name.x, by_denoiser.x)
    assert own.nfe == 8


class Labelled(nn.Module):
    """Its image is a constant of the class."""

    def forward(self, x, t, y=None):
        return torch.zeros_like(x) if y is None else (y.view(-1, 1, 1, 1) / 4).expand_as(x)


@pytest.mark.parametrize("array", [np.asarray, torch.tensor, lambda seeds: list(np.asarray(seeds))])
def test_seeds_may_be_an_array(array):
    told = evodiff.sample("mixture", nfe=5, seeds=array([4, 7]))
    assert told.seeds == (4, 7)
    assert torch.equal(told.x, evodiff.sample("mixture", nfe=5, seeds=[4, 7]).x)


def test_labels_are_drawn_from_the_seeds_or_given():
    model = evodiff.wrap(Labelled(), shape=(1, 2, 2), predicts="x0", schedule=DiscreteVP.linear(), num_classes=4)
    given = evodiff.sample(model, "ddim", 3, range(4), labels=[3, 2, 1, 0], batch=3, denoise_final=True)
    assert given.x[:, 0, 0, 0].tolist() == [0.75, 0.5, 0.25, 0.0] and given.labels.tolist() == [3, 2, 1, 0]
    assert repr(given) == "<4 images of 1x2x2, seeds 0 to 3, nfe 3>"
    assert evodiff.sample("mixture", nfe=5, seeds=[0]).labels is None
    of_seeds = [evodiff.sample(model, "ddim", 3, range(k, k + 4), denoise_final=True) for k in (0, 2)]
    drawn = [out.x[:, 0, 0, 0] for out in of_seeds]
    assert torch.equal(drawn[0][2:], drawn[1][:2]) and len(set(drawn[0].tolist())) > 1
    assert of_seeds[0].labels.tolist() == (4 * drawn[0]).tolist()
    guided = evodiff.sample(model, "ddim", 3, range(2), labels=[1, 2], guidance=ClassifierFree(0.5), denoise_final=True)
    assert guided.x[:, 0, 0, 0].tolist() == pytest.approx([0.125, 0.25])
    with pytest.raises(ConfigError, match="2 labels for 3 seeds of a model with 4 classes"):
        evodiff.sample(model, seeds=range(3), labels=[1, 2])
    with pytest.raises(ConfigError, match=r"labels=\[4, 1\] are impossible: classes are 0 to 3"):
        evodiff.sample(model, seeds=range(2), labels=[4, 1])


@pytest.mark.parametrize("array", [tuple, np.asarray, torch.tensor])
def test_labels_may_be_an_array(array):
    model = evodiff.wrap(Labelled(), shape=(1, 2, 2), predicts="x0", schedule=DiscreteVP.linear(), num_classes=4)
    given = evodiff.sample(model, "ddim", 3, range(2), labels=array([3, 2]), denoise_final=True)
    assert given.x[:, 0, 0, 0].tolist() == [0.75, 0.5]


@pytest.mark.parametrize("labels", [3, [0.5, 1.5], torch.tensor([0.5, 1.0]), torch.tensor(3), ["1", "2"]])
def test_labels_that_are_no_classes_are_refused(labels):
    model = evodiff.wrap(Labelled(), shape=(1, 2, 2), predicts="x0", schedule=DiscreteVP.linear(), num_classes=4)
    with pytest.raises(ConfigError, match="classes are 0 to 3, one whole number for each seed"):
        evodiff.sample(model, "ddim", 3, range(2), labels=labels)


@pytest.mark.parametrize("array", [list, np.asarray, torch.tensor])
def test_a_grid_may_be_the_times_themselves(array):
    times = [40.0, 9.0, 1.0, 0.01]
    given = evodiff.sample("mixture", nfe=3, seeds=range(2), grid=array(times))
    assert torch.allclose(given.x, evodiff.sample("mixture", nfe=3, seeds=range(2), grid=Listed()).x, atol=1e-6)


def test_one_time_is_no_grid():
    with pytest.raises(ConfigError, match=r"grid=\[3.0\] is impossible: .* n \+ 1 for n steps"):
        evodiff.sample("mixture", nfe=1, seeds=range(2), grid=[3.0])


def test_numbers_of_numpy_are_numbers():
    for mu in np.linspace(0.3, 0.5, 2):
        assert named_solver("evodiff", mu=mu).mu == mu
    with pytest.raises(ConfigError, match="mu=True is impossible"):
        named_solver("evodiff", mu=True)


class Listed:
    def times(self, n, schedule, t_start, t_end):
        return [40.0, 9.0, 1.0, 0.01]


@dataclass(frozen=True)
class Forgetful(DDIM):
    """Its step returns x alone."""

    def step(self, denoise, x, step, state):
        return super().step(denoise, x, step, state)[0]


def test_a_step_that_returns_no_state_is_told():
    with pytest.raises(SamplingError, match="the step of Forgetful must return x and the state"):
        evodiff.sample("mixture", Forgetful(), 3, range(3))


def test_torchs_own_random_numbers_are_left_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    evodiff.sample("mixture", "sde_dpmpp_2", 3, range(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("model", ["mixture", "mixture_digits", "mnist_tiny"])
def test_torchs_defaults_change_no_image(model, dtype):
    expected = evodiff.sample(model, "ddim", 2, range(2))
    torch.set_default_dtype(dtype)
    try:
        found = evodiff.sample(model, "ddim", 2, range(2))
        with torch.device("meta"):
            elsewhere = evodiff.sample(model, "ddim", 2, range(2))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.x, expected.x) and torch.equal(elsewhere.x, expected.x)


def test_a_device_with_a_number_is_that_one(monkeypatch):
    monkeypatch.setattr(evodiff.api, "device_for", str)
    model = replace(mixture(), device=torch.device("cpu:1"))
    assert evodiff.sample(model, nfe=2, seeds=[0], device="cpu").nfe == 2
    with pytest.raises(ConfigError, match="device=cpu:0 is not the model's, cpu:1"):
        evodiff.sample(model, nfe=2, seeds=[0], device="cpu:0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "mixtur"}, "model=mixtur does not exist. Did you mean mixture?"),
        ({"solver": "evodif"}, "solver=evodif does not exist. Did you mean evodiff?"),
        ({"grid": "loksnr"}, "grid=loksnr does not exist. Did you mean logsnr?"),
        ({"threshold": "clipped"}, "threshold=clipped does not exist; possible: none, clip, dynamic"),
        ({"seeds": []}, r"seeds=\[\] is impossible: give at least one number from 0 on"),
        ({"seeds": 4}, "seeds=4 is impossible"),
        ({"seeds": "0-3"}, "seeds='0-3' is impossible"),
        ({"seeds": [-1]}, r"seeds=\[-1\] is impossible"),
        ({"seeds": [0.5] * 1000}, "seeds=<list> is impossible"),
        ({"grid": torch.ones(3, 99, 99)}, "grid=<Tensor> is impossible"),
        ({"batch": 0}, "batch=0 must be whole numbers, at least 1"),
        ({"solver": "teleport", "nfe": 0}, "nfe=0 and batch=250 must be whole numbers, at least 1"),
        ({"nfe": "5"}, "nfe='5' and batch=250 must be whole numbers"),
        ({"dtype": "float32"}, "dtype='float32' is impossible: give torch.float64 or torch.float32"),
        ({"guidance": "clasifier"}, "guidance=clasifier does not exist. Did you mean classifier?"),
        ({"model": nn.Conv2d(1, 1, 1)}, "make a model of it: evodiff.wrap"),
        ({"device": "gpu"}, "device=gpu is not available here"),
        ({"device": "meta"}, "device=meta is not supported. Use device=auto, or one of cpu, cuda, mps, xpu"),
        ({"device": "hpu"}, "device=hpu is not supported"),
        ({"shape": 5}, "three whole numbers above 0"),
        ({"model": mixture(), "shape": (3, 9, 9)}, r"shape=\(3, 9, 9\) is not the model's, \(3, 8, 8\)"),
        ({"model": "mixture", "shape": (3, 9, 9)}, r"shape=\(3, 9, 9\) is not the model's"),
        ({"model": mixture().denoiser(None), "shape": (3, 8, 8), "device": "gpu"}, "device=gpu is not available here"),
        ({"model": lambda x, node: x}, "Make a model of it: evodiff.wrap"),
        ({"model": Counting(mixture().denoiser(None))}, "give shape="),
        ({"grid": [10, 1]}, "gives 2 times, but 10 steps need 11"),
        ({"grid": [0.002, 80], "nfe": 1}, "t_start=0.002 must be above t_end=80"),
        ({"grid": []}, "grid=\\[\\] is impossible: give the name of a grid, an object with times"),
        ({"grid": [80, "x"]}, "grid=\\[80, 'x'\\] is impossible"),
        ({"grid": TimeGrid.at([80, 1], EDM())}, "is impossible: give the name of a grid"),
        ({"grid": Karras}, "grid=<class .*Karras'> is impossible"),
        ({"grid": 5}, "grid=5 is impossible"),
        ({"grid": "file"}, "grid=file needs path: give an object, like evodiff.grid.FromFile\\(path=...\\)"),
        ({"solver": EVODiff}, "solver=<class .*EVODiff'> is impossible: give the name of a solver, or an object"),
        ({"solver": None}, "solver=None is impossible"),
        ({"guidance": 2.0}, "guidance=2.0 is impossible: give the name of a guidance, or an object"),
        ({"guidance": ClassifierFree}, "guidance=<class .*ClassifierFree'> is impossible"),
        ({"seeds": [True]}, "is impossible: give at least one number from 0 on"),
        ({"denoise_final": 3}, "denoise_final=3 is impossible"),
        ({"denoise_final": "false"}, "denoise_final='false' is impossible"),
        ({"t_start": "5"}, "t_start='5' is impossible"),
        ({"t_start": math.inf}, "t_start=inf must be above .* and t_start below 1e"),
        ({"nfe": 2.5}, "nfe=2.5 and batch=.* must be whole numbers"),
        *(
            ({"model": mixture().denoiser(None), "shape": shape}, "three whole numbers above 0")
            for shape in ("388", (3.0, 8, 8), (0, 8, 8), (-3, 8, 8), (8, 8))
        ),
        ({"seeds": [2**64]}, "is impossible: give at least one number from 0 on"),
        ({"labels": [1] * 16}, "this model has no classes: leave labels out"),
    ],
)
def test_what_cannot_be_is_answered(arguments, message):
    with pytest.raises(ConfigError, match=f"(?i){message}"):
        evodiff.sample(**{"model": "mixture", **arguments})


def test_a_budget_that_cannot_be_spent_names_the_nearest():
    with pytest.raises(BudgetError, match="Nearest: nfe=9 or 11"):
        evodiff.sample("mixture", "heun", 10, range(2), denoise_final=True)


def test_a_budget_may_be_a_number_of_numpy():
    for nfe in np.arange(3, 5):
        assert evodiff.sample("mixture", "ddim", nfe, range(2)).nfe == nfe


class Answers:
    """A denoiser that answers what it is told to."""

    schedule = EDM()

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, x, node):
        return self.answer(x)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda x: x[:, :1], r"\[2, 1, 4, 4\]"),
        (lambda x: x[:, :1, :1, :1], r"\[2, 1, 1, 1\]"),
        (lambda x: x[0], r"\[3, 4, 4\]"),
        (lambda x: None, "a NoneType"),
        (lambda x: (x, x), "a tuple"),
    ],
)
def test_a_prediction_that_would_be_broadcast_is_refused(answer, said):
    with pytest.raises(SamplingError, match=rf"was given \[2, 3, 4, 4\] and returned {said}"):
        evodiff.sample(Answers(answer), "ddim", 2, range(2), shape=(3, 4, 4))


def test_named_solvers_take_other_fields():
    assert named_solver("evodiff", final="euler") == EVODiff(final="euler")
    with pytest.raises(ConfigError, match="solver=evodiff has no field fianl. Possible: lower_order_final, final,"):
        named_solver("evodiff", fianl="euler")


def test_named_solvers_take_objects():
    assert named_solver("dpmpp_2s", inner=Karras(), lower_order_final=False) == DPMSolverPPSinglestep(
        inner=Karras(), lower_order_final=False
    )
    assert named_solver("teleport", base=EVODiff(), skip=1) == Teleport(EVODiff(), skip=1)
    one = torch.ones(3, 1, 2, 2, dtype=torch.float64)
    statistics = Statistics(torch.arange(3.0).double(), one, one, one)
    assert named_solver("dpm_v3", statistics=statistics).statistics is statistics
    with pytest.raises(ConfigError, match="gaussian=<Statistics> is impossible; possible: a Gaussian, or null"):
        named_solver("teleport", gaussian=statistics)
