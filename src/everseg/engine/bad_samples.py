"""Keep account of the training samples that could not be read and were replaced by others."""

from __future__ import annotations

from collections.abc import Mapping

from accelerate import Accelerator
from accelerate.utils import gather_object

from everseg.data.batches.samples import SampleKey, too_many
from everseg.progress import Progress
from everseg.runs.journal import EVENT, Journal, replaced_samples


class BadSamples:
    """Reports each replaced sample once, in the journal and on the console, and stops a run that has too many.

    Args:
        allowed: distinct samples that a run may replace, those in its journal included; 0 = samples are not replaced.
        accelerator: processes that share the account.
    """

    def __init__(self, allowed: int, accelerator: Accelerator, journal: Journal, progress: Progress) -> None:
        self.allowed, self.accelerator, self.journal, self.progress = allowed, accelerator, journal, progress
        # A resumed run has reported these already; all processes get the same list.
        told = list(replaced_samples(journal.lines()).items()) if allowed else []
        self._known = dict(self._of_all(told))
        self._new: dict[SampleKey, str] = {}

    @property
    def known(self) -> Mapping[SampleKey, str]:
        """The samples that all processes have been told of -> why they cannot be read."""
        return self._known

    def note(self, bad: Mapping[SampleKey, str]) -> None:
        """Remember what a batch of this process replaced.

        Raises:
            DataError: more samples than allowed; raised before the batch is used.
        """
        fresh = {key: why for key, why in bad.items() if key not in self._known}
        if fresh:
            self._new |= fresh
            self._check(self._known | self._new)

    def share(self, step: int, iteration: int, tuning: Mapping[str, int] | None = None) -> None:
        """Merge the accounts of all processes and report what is new; every process must call it.

        Args:
            tuning: in a pre-tuning, the entry of the journal's lines that says which.

        Raises:
            DataError: together more samples than allowed.
        """
        if not self.allowed:
            return
        # Sorted: every process reports the same samples in the same order.
        fresh = dict(sorted(self._of_all(list(self._new.items()))))
        self._new = {}
        for (dataset, sample), why in fresh.items():
            if (dataset, sample) not in self._known:
                place = {"step": step, "iteration": iteration, **(tuning or {})}
                self.journal.add(EVENT, **place, dataset=dataset, sample=sample, reason=why)
                self.progress.message(
                    f"warning: training sample {sample} of {dataset} cannot be read and is replaced by another "
                    f"({why})"
                )
        self._known |= fresh
        self._check(self._known)

    def _of_all(self, items: list[tuple[SampleKey, str]]) -> list[tuple[SampleKey, str]]:
        return gather_object(items) if self.allowed and self.accelerator.num_processes > 1 else items

    def _check(self, bad: Mapping[SampleKey, str]) -> None:
        if len(bad) > self.allowed:
            raise too_many(bad, self.allowed)
