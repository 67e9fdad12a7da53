"""A solver of your own, in one class, against ours. On the exact mixture its error is its own and no network's.

python examples/own_solver.py
"""

from dataclasses import dataclass

import torch

import evodiff
from evodiff.solvers.base import Multistep
from evodiff.solvers.linear import combine


@evodiff.register_solver("adams")
@dataclass(frozen=True)
class Adams(Multistep):
    """Second-order Adams-Bashforth in kappa = sigma/alpha: d(x/alpha)/dkappa = eps, extrapolated through two nodes."""

    orders = (1, 2)

    @property
    def global_order(self):
        return self.order

    def model_term(self, D, x, node):
        return (x - node.alpha * D) / node.sigma

    def predict(self, step, past):
        s, t = step.s, step.t
        h, eps = t.kappa - s.kappa, past[-1].m
        if self.order_at(step) == 2:
            slope = (eps - past[-2].m) / (s.kappa - past[-2].node.kappa)
            eps = eps + 0.5 * h * slope
        return combine((t.alpha / s.alpha, past[-1].x), (t.alpha * h, eps))


def main() -> None:
    truth = evodiff.sample("mixture", "heun", nfe=400, seeds=range(64), grid="karras").x
    print("root mean square distance to the exact solution")
    for nfe in (10, 20, 40):
        errors = []
        for solver in ("ddim", "adams", "dpmpp_2m"):
            x = evodiff.sample("mixture", solver, nfe, range(64), grid="karras").x
            errors.append(f"{solver} {(x - truth).square().mean().sqrt().item():.4f}")
        print(f"nfe {nfe:>2}: ", ", ".join(errors))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
