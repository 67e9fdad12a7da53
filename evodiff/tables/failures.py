"""What went wrong in a table or a sweep of cells, told once for each reason."""

import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from evodiff.errors import EvodiffError


@dataclass
class Failures:
    """What failed so far: the reasons, each with what failed for it."""

    reasons: dict[str, list[str]] = field(default_factory=dict)

    def attempt(self, label: str, do: Callable[..., object], *arguments: Any) -> bool:
        """Whether do(*arguments) worked. What it raises is noted under `label`, and is no more than that.

        An error that is not the asker's, like too little memory on the GPU, shows its traceback when it first occurs.
        """
        try:
            do(*arguments)
            return True
        except EvodiffError as e:
            reason = str(e)
        except Exception as e:
            reason = " ".join(f"{type(e).__name__}: {e}".split())
            if reason not in self.reasons:
                traceback.print_exc()
        self.reasons.setdefault(reason, []).append(label)
        if torch.cuda.is_initialized():
            with suppress(RuntimeError):  # after an illegal access this fails as well, like all that comes
                torch.cuda.empty_cache()
        return False

    @property
    def lines(self) -> list[str]:
        """One for each reason."""
        return [
            f"{first}{f' and {len(others)} more' if others else ''}: {reason}"
            for reason, (first, *others) in self.reasons.items()
        ]

    def tell(self) -> None:
        """On standard error."""
        for line in self.lines:
            print(f"evodiff: {line}", file=sys.stderr)
