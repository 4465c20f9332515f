"""Whether a kernel that reads a part of a weight still pays, told by the GPU without waiting for it.

A call chooses its kernel before the GPU knows how many activations are zero; to ask would stop the host until all work
before it is done. So the kernel that skips counts what was left to read, a count comes back some calls later, and where
recent calls left too much, calls run as if there were no zeros, and now and then one is tried again. A CUDA graph keeps
the choice of its recording, which skips only where calls before it were seen to have zeros enough.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

LOOK = 16  # calls that skip for each one whose count is asked for
REST = 256  # calls that run the other way before one is tried again
TWICE = 2  # counts in a row that must be too large: one unusual token says little


@dataclass(frozen=True)
class Coming:
    """A count on its way from the GPU."""

    host: torch.Tensor
    event: torch.cuda.Event | None

    @classmethod
    def of(cls, count: torch.Tensor) -> Coming:
        """``count``: int32 [1]; on the CPU it is there already."""
        if not count.is_cuda:
            return cls(count, None)
        host = torch.empty(1, dtype=torch.int32, pin_memory=True)
        with torch.cuda.device(count.device):
            host.copy_(count, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return cls(host, event)

    @property
    def here(self) -> bool:
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]


@dataclass
class Watch:
    """Of one weight and range of rows. ``most``: columns or outputs up to which skipping pays, of ``whole``.

    ``calls``: all; ``skipped``: those that ran the kernel that skips; ``looked``: those whose count came back, with
    ``left`` columns or outputs in all.
    """

    most: int
    whole: int
    calls: int = 0
    skipped: int = 0
    looked: int = 0
    left: int = 0
    over: int = 0
    resting: int = 0
    due: int = 0
    coming: Coming | None = field(default=None, repr=False)

    def tries(self, x: torch.Tensor) -> bool:
        """Whether this call takes the kernel that skips. To be asked once a call, before ``counter``."""
        if _recording(x):  # a graph goes on with this choice whatever comes, so zeros must have been seen
            return bool(self.looked and not self.over and not self.resting)
        self.collect()
        self.calls += 1
        if self.resting:
            self.resting -= 1
            return False
        self.skipped += 1
        return True

    def collect(self) -> None:
        """Take in the count that is on its way, if it is here."""
        coming = self.coming  # another thread may take it in meanwhile: then it counts twice, which does no harm
        if coming is not None and coming.here:
            self._take(int(coming.host))

    def counter(self, x: torch.Tensor) -> torch.Tensor | None:
        """Where this call's count is to be written; None where nobody will look at it."""
        if self.coming or _recording(x):
            return None
        if self.due:
            self.due -= 1
            return None
        return x.new_empty((1,), dtype=torch.int32)

    def note(self, count: torch.Tensor) -> None:
        """After the launch of the kernel that writes ``count``."""
        self.coming = Coming.of(count)

    def _take(self, count: int) -> None:
        self.coming = None
        self.looked, self.left = self.looked + 1, self.left + count
        self.over = self.over + 1 if count > self.most else 0
        self.due = 0 if self.over else LOOK
        if self.over >= TWICE:
            self.resting, self.over = REST, TWICE - 1  # the next one tried decides alone


def _recording(x: torch.Tensor) -> bool:
    """Inside the recording of a CUDA graph nothing may be asked of the GPU."""
    if not x.is_cuda:
        return False
    with torch.cuda.device(x.device):
        return bool(torch.cuda.is_current_stream_capturing())
