"""What event plugins ask of a run: to stop in good order, to save, to evaluate; and texts that its model generates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hvdlm import plugins
from hvdlm.errors import HvdlmError

if TYPE_CHECKING:
    from hvdlm.training.run import Run


class RunControl:
    """The ``run`` of ``hvdlm_run_started``.

    A request on any rank is enough. It travels with the votes on signals, so that all ranks follow it after the next
    step, without a collective of its own.

    Attributes:
        opened: the run itself.
        in_time: the steps after which ``hvdlm_step_ended`` is called before the next one starts, on GPUs too.
    """

    def __init__(self, run: Run) -> None:
        self.opened = run
        self._save = self._evaluate = False
        self._reason: str | None = None
        self.in_time: set[int] = set()
        self._due = False, False  # saving and evaluating, which all ranks have agreed on and not done

    def stop(self, reason: str) -> None:
        """Ask the run to end as after ``train.steps``: it evaluates and saves; the exit code is 0. The first counts.

        ``reason``: a sentence for ``status.json`` and ``summary.json``.
        """
        self._reason = str(reason) if self._reason is None else self._reason

    def save(self) -> None:
        """Ask the run to write a checkpoint."""
        self._save = True

    def evaluate(self) -> None:
        """Ask the run to evaluate the validation split."""
        self._evaluate = True

    def generate(self, prompt: str, tokens: int, shown: bool = False, **sampling: Any) -> str:
        """Return ``prompt`` and its continuation, or the task's response; "" on ranks without rank 0's copy.

        All ranks call, in the same event. ``shown``: rank 0 also prints it; ``sampling``: temperature, top_k, top_p,
        seed (``hvdlm_inference.sampling.Sampling``).

        Raises:
            HvdlmError: the vocabulary lacks a character of the prompt, or no installed package generates text.
        """
        for generate in plugins.extensions("generation"):
            return str(generate(self.opened, prompt, tokens, shown, **sampling))
        raise HvdlmError("no installed package generates text: install hvdlm_inference.")

    def take_requests(self) -> tuple[bool, bool, bool]:
        """Return whether this rank asks to stop, to save, to evaluate; a stop is asked for until the run ends."""
        asked = self._reason is not None, self._save, self._evaluate
        self._save = self._evaluate = False
        return asked

    def due(self, finish: int, save: int, evaluate: int) -> tuple[int, bool, bool]:
        """Return whether all ranks' votes ask to stop, to save, to evaluate; with local SGD, when a round ends."""
        due = self._due[0] or save > 0, self._due[1] or evaluate > 0
        agreed = self.opened.exchange.agreed
        self._due = (False, False) if agreed else due
        return (finish, *due) if agreed else (0, False, False)

    def agreed_reason(self) -> str:
        """Return the reason of the first rank that asks to stop. All ranks call."""
        return next(reason for reason in self.opened.world.gather_objects(self._reason) if reason is not None)
