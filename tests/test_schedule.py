"""Schedules against their definitions and closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evodiff.errors import ConfigError
from evodiff.schedule import EDM, CosineVP, DiscreteVP, Flow, LinearVP

SCHEDULES = [EDM(), Flow(), LinearVP(), LinearVP(5.0, 5.0), CosineVP(), DiscreteVP.linear()]


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(part=st.floats(0, 1))
def test_t_at_inverts_lam(schedule, part):
    t = schedule.t_end + part * (schedule.t_start - schedule.t_end)
    assert schedule.t_at(schedule.node(t).lam) == pytest.approx(t, rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES[2:])
@given(part=st.floats(0, 1))
def test_vp_preserves_variance(schedule, part):
    node = schedule.node(schedule.t_end + part * (schedule.t_start - schedule.t_end))
    assert node.alpha**2 + node.sigma**2 == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lam_rises_as_time_falls(schedule):
    lams = [schedule.node(t).lam for t in np.linspace(schedule.t_start, schedule.t_end, 50)]
    assert all(a < b for a, b in zip(lams, lams[1:], strict=False))


def test_linear_vp_is_the_integral_of_beta():
    """log alpha(t) = -1/2 of the integral of beta, here by Simpson's rule, exact for a linear function."""
    schedule, t = LinearVP(), 0.37
    beta = [schedule.beta_min + s * (schedule.beta_max - schedule.beta_min) for s in (0, t / 2, t)]
    integral = t / 6 * (beta[0] + 4 * beta[1] + beta[2])
    assert math.log(schedule.node(t).alpha) == pytest.approx(-0.5 * integral, rel=1e-12)


def test_cosine_vp_follows_its_formula():
    f = [math.cos((t + 0.008) / 1.008 * math.pi / 2) for t in (0.0, 0.4)]
    assert CosineVP().node(0.4).alpha == pytest.approx(f[1] / f[0], rel=1e-12)


def test_discrete_vp_passes_through_the_products_of_its_betas():
    betas = np.linspace(1e-4, 0.02, 1000)
    schedule = DiscreteVP.linear()
    for i in (0, 1, 499, 999):
        assert schedule.node((i + 1) / 1000).alpha ** 2 == pytest.approx(np.prod(1 - betas[: i + 1]), rel=1e-10)


def test_discrete_vp_is_linear_in_log_alpha_between_its_times():
    schedule = DiscreteVP.from_betas([0.1, 0.2, 0.3])
    a, b = (math.log(schedule.node(t).alpha) for t in (1 / 3, 2 / 3))
    assert math.log(schedule.node(0.5).alpha) == pytest.approx((a + b) / 2, rel=1e-12)


def test_discrete_vp_refuses_what_does_not_fall():
    values = (-0.1, -0.1), (math.nan, math.nan), (-0.1, math.nan, -0.3)
    for make in (*(lambda v=v: DiscreteVP(v) for v in values), lambda: DiscreteVP.linear(num_timesteps=1)):
        with pytest.raises(ConfigError, match="strictly falling"):
            make()
    for beta in (0, 1, math.nan):  # 1 is a zero terminal SNR: nothing is left of x_0
        with pytest.raises(ConfigError, match=rf"beta 1 is {beta}"):
            DiscreteVP.from_betas([0.1, beta])


@pytest.mark.parametrize("n", [10, 100, 1000, 4000])
def test_discrete_vp_ends_at_its_first_time(n):
    schedule = DiscreteVP.linear(num_timesteps=n)
    assert schedule.t_end == 1 / n
    assert schedule.node(schedule.t_end).alpha ** 2 == pytest.approx(1 - 1e-4, rel=1e-12)
    assert DiscreteVP.linear(num_timesteps=n, t_end=0.5).t_end == 0.5


def test_a_flow_is_straight_and_its_ends_are_left_out():
    node = Flow().node(0.25)
    assert (node.alpha, node.sigma) == (0.75, 0.25)
    for t in (0.0, 1.0):
        with pytest.raises(ConfigError, match="outside the times of a flow"):
            Flow().node(t)


def test_edm_kappa_is_time():
    node = EDM().node(3.0)
    assert (node.kappa, node.lam) == (3.0, pytest.approx(-math.log(3)))
    assert EDM().node(0.0).lam == math.inf


def test_a_time_without_signal_is_refused():
    with pytest.raises(ConfigError, match="at t=1 this schedule has no signal: set t_start a little below"):
        CosineVP().node(1.0)
    assert CosineVP().node(0.9999).alpha > 1e-7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EDM(t_start="high"), "EDM: t_start='high' is impossible; possible: a number above t_end, 0.002"),
        (lambda: EDM(80.0, 0.0), "EDM: t_end=0.0 is impossible; possible: a number above 0; .* denoise_final=true"),
        (lambda: EDM(0.001), "EDM: t_start=0.001 is impossible"),
        (lambda: Flow(t_start=1.0), "Flow: t_start=1.0 is impossible; possible: below 1"),
        (lambda: LinearVP(beta_max="abc"), "LinearVP: beta_max='abc' is impossible"),
        (lambda: LinearVP(0.0, 0.0), r"LinearVP: beta_max=0.0 is impossible; possible: .* beta\(t\) above 0"),
        (lambda: LinearVP(beta_max=-20), "LinearVP: beta_max=-20 is impossible"),
        (lambda: LinearVP(t_start=1.5), "LinearVP: t_start=1.5 is impossible; possible: 1 or below"),
        (lambda: CosineVP(s=-1), "CosineVP: s=-1 is impossible; possible: 0 or above"),
    ],
)
def test_schedules_that_do_not_exist_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
