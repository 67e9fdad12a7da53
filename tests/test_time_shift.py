"""The time-shift sampler: without a window its base, with one the time whose noise has the state's variance."""

import pytest
import torch
from exact import VP, grid, mixture, start

from evodiff.config import compose
from evodiff.denoiser import Counting, OfBatch
from evodiff.errors import ConfigError
from evodiff.grid import Step, TimeGrid, TimeUniform
from evodiff.models.loading import scaled_linear_betas
from evodiff.models.pretrained import Pretrained
from evodiff.runs.run import Run
from evodiff.runs.sample import denoiser_for
from evodiff.sampling import integrate
from evodiff.schedule import EDM, DiscreteVP
from evodiff.solvers.ddim import DDIM
from evodiff.solvers.pndm import PNDM
from evodiff.solvers.time_shift import TimeShift, at_each

UNIFORM = grid(10, VP, TimeUniform())
STABLE_DIFFUSION = DiscreteVP.from_betas(scaled_linear_betas(0.00085, 0.012, 1000))


def state_of_variance(values, shape=(3, 16, 16)):
    """Images whose variance over pixels is exactly the one asked for."""
    x = torch.randn(len(values), *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = (x - x.mean((1, 2, 3), keepdim=True)) / x.flatten(1).std(1).view(-1, 1, 1, 1)
    return x * torch.tensor(values, dtype=torch.float64).sqrt().view(-1, 1, 1, 1)


@pytest.mark.parametrize(("method", "base"), [("ddim", DDIM()), ("f_pndm", PNDM(order=4))])
def test_without_a_window_it_is_its_base(method, base):
    x, model = start(VP, (2, 3, 3)), mixture(VP)
    out = integrate(TimeShift(method, window=0), model, x, UNIFORM)
    torch.testing.assert_close(out, integrate(base, model, x, UNIFORM), rtol=1e-10, atol=1e-10)
    shifted = integrate(TimeShift(method, window=0.1), model, x, UNIFORM)
    assert (shifted - out).norm() > 1e-4


def test_each_image_gets_the_time_of_its_own_variance():
    step = Step(UNIFORM, 5)
    wanted = [VP.node(step.s.t + k / 1000) for k in (-17, 0, 8)]
    x = state_of_variance([node.sigma**2 for node in wanted])
    chosen = TimeShift(window=0.04, cutoff=0.0).shifted(x, step)
    assert [n.t for n in chosen] == pytest.approx([n.t for n in wanted], abs=1e-9)
    assert chosen[1] is step.s


def test_the_window_ends_what_can_be_chosen():
    step = Step(UNIFORM, 5)
    low, high = TimeShift(window=0.04, cutoff=0.0).shifted(state_of_variance([1e-6, 0.99999]), step)
    assert (low.t, high.t) == pytest.approx((step.s.t - 0.02, step.s.t + 0.02))


def test_a_shifted_time_is_never_past_the_step():
    step = Step(grid(100, VP, TimeUniform()), 50)
    (node,) = TimeShift(window=1.0, cutoff=0.0).shifted(state_of_variance([1e-9]), step)
    assert node.t > step.t.t


@pytest.mark.parametrize("schedule", [VP, STABLE_DIFFUSION, EDM(14.6, 0.01)])
def test_the_model_is_not_asked_beyond_its_first_time(schedule):
    first, *rest = grid(50, schedule, TimeUniform()).nodes
    step = Step(TimeGrid((first, *rest), schedule), 1)
    (node,) = TimeShift().shifted(1e6 * state_of_variance([1.0]), step)
    assert first.kappa >= node.kappa > rest[0].kappa


def test_below_the_cutoff_times_are_kept():
    x = state_of_variance([1e-6, 0.9])
    late = Step(UNIFORM, 8)
    assert TimeShift(window=0.1, cutoff=0.3).shifted(x, late) == [late.s, late.s]


def test_different_times_in_a_batch_are_one_evaluation_per_image():
    model = mixture(VP)
    counting, x = Counting(model), start(VP, (2, 3, 3))
    a, b = UNIFORM.nodes[2], UNIFORM.nodes[5]
    D = at_each(counting, x, [a, b, a])
    assert counting.nfe == 1
    expected = torch.stack([model(x, a)[0], model(x, b)[1], model(x, a)[2]])
    assert torch.equal(D, expected)


def test_a_batch_is_divided_by_its_times():
    """Each image is given to the network once, with its own label."""
    asked = []

    class Labelled:
        schedule = VP

        def __init__(self, labels):
            self.labels = labels

        def __call__(self, x, node):
            asked.append((self.labels.tolist(), node))
            return self.labels.view(-1, 1, 1, 1) * x + node.sigma

    x, (a, b) = start(VP, (2, 3, 3)), UNIFORM.nodes[2:4]
    counting = Counting(OfBatch(Labelled, torch.tensor([5, 7, 9])))
    D = at_each(counting, x, [a, b, a])
    assert asked == [([5, 9], a), ([7], b)]
    assert counting.nfe == 1
    assert torch.equal(D, torch.stack([5 * x[0] + a.sigma, 7 * x[1] + b.sigma, 9 * x[2] + a.sigma]))


def test_a_part_of_a_batch_without_labels_has_none():
    model = mixture(VP)
    assert OfBatch(lambda labels: model, None).part(torch.tensor([0, 2])) is model


@pytest.mark.parametrize(("overrides", "sizes"), [((), [2, 1]), (("compile=true",), [3, 3])])
def test_the_batches_of_a_run_are_divided_unless_compiled(overrides, sizes):
    """A compiled network would be compiled for each size."""
    run = Run.from_config(compose("run", ["solver=ts_ddim", *overrides]))
    inner, asked = mixture(VP), []

    def denoiser(x, node):
        asked.append(len(x))
        return inner(x, node)

    denoiser.schedule = VP
    model = Pretrained(lambda labels: denoiser, (2, 3, 3))
    a, b = UNIFORM.nodes[2:4]
    at_each(Counting(denoiser_for(run, model, None)), start(VP, (2, 3, 3)), [a, b, a])
    assert asked == sizes


def test_a_shifted_ddim_step_by_hand():
    """The state is taken as one at the shifted time: the network's, and the one the step starts from."""
    g, model = UNIFORM, mixture(VP, (3, 16, 16))
    step = Step(g, 5)
    node = VP.node(step.s.t - 0.017)
    x = state_of_variance([node.sigma**2])
    out, _ = TimeShift(window=0.04, cutoff=0.0).step(model, x, step, ())
    eps = (x - node.alpha * model(x, node)) / node.sigma
    expected = step.t.alpha * (x / node.alpha + (step.t.kappa - node.kappa) * eps)
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("method", "cost"), [("ddim", [1, 2, 3, 4, 5]), ("f_pndm", [4, 8, 12, 13, 14])])
def test_cost(method, cost):
    assert [TimeShift(method).evaluations(n) for n in range(1, 6)] == cost


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "euler"}, "method='euler' does not exist; possible: ddim, f_pndm"),
        ({"window": 2.0}, "window=2.0 is impossible; possible: 0 to 1"),
        ({"cutoff": -0.1}, "cutoff=-0.1 is impossible"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        TimeShift(**fields)
