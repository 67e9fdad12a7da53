"""Comparisons of this installation with recorded reference results: `evodiff verify solvers|networks|metrics`."""
