"""DPM-Solver, multistep (Lu et al., arXiv 2206.00927, section 3.4 and its released code).

DPM-Solver++'s update for the noise prediction: one evaluation per step, global order 1 for order 1, and 2 for orders 2
and 3 (why 3 is not of third order: see dpmpp.py).
"""

from dataclasses import dataclass

from evodiff.solvers.dpmpp import DPMSolverPP
from evodiff.solvers.exponential import NOISE, Prediction


@dataclass(frozen=True)
class DPMSolver(DPMSolverPP):
    """Exponential integrator for the noise prediction, in half-log-SNR."""

    @property
    def target(self) -> Prediction:
        return NOISE
