"""The run around Algorithm 1: it counts steps, logs, saves, opens and closes buckets, and stops when asked.

The training of a predictor has the same.

So the training loop itself holds nothing but the algorithm, and a run of days can be stopped at any moment.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from flux.errors import UserError
from flux.memory import peak_memory
from run.checkpoints import BucketStore, Checkpoints
from run.command import Stop
from run.late import Late
from run.log import Log
from run.ranks import Ranks
from run.seeds import generator_for

MAX_SKIPPED = 10  # steps in a row whose loss or gradient is infinite or NaN: then the run gives up


class Stopped(Exception):
    """The user has asked the run to stop; everything is saved."""


class State(Protocol):
    """What is trained, in two parts: one that all buckets share, and one for each bucket."""

    def state_dict(self) -> dict: ...  # the shared part
    def load_state_dict(self, state: dict) -> None: ...
    def start_bucket(self, bucket: int) -> None: ...  # initialise the bucket's part, on its first turn
    def bucket_state(self) -> dict: ...  # the bucket's part of all ranks, on rank 0
    def load_bucket_state(self, state: dict) -> None: ...


class BucketRun:
    """The counters of a run, and all that is done at its steps except training.

    step: optimizer updates so far; visit: turns of buckets so far, which come in a fixed order, again and
    again; bucket_step: updates so far within the turn.
    """

    def __init__(
        self,
        out: Path,
        state: State,
        *,
        q_buckets: Sequence[int],
        q_total: int,
        bucket_warmup: float,
        seed: int,
        ranks: Ranks,
        stop: Stop,
        device: torch.device,
        save_every: int = 500,
        sample_every: int = 0,
        write_samples: Callable[[], None] = lambda: None,
        keep_buckets: bool = False,
    ):
        """q_buckets: the steps of each bucket's turn; bucket_warmup: the fraction of them that is warm-up.

        write_samples: called every sample_every steps, 0 for never. keep_buckets: store a bucket also when it
        has no other turn before q_total.
        """
        self.out, self.state, self.q_buckets, self.q_total = out, state, q_buckets, q_total
        self.bucket_warmup, self.seed = bucket_warmup, seed
        self.ranks, self.stop, self.device = ranks, stop, device
        self.save_every, self.sample_every, self.write_samples = save_every, sample_every, write_samples
        self.keep_buckets = keep_buckets
        self.checkpoints = Checkpoints(out / "checkpoints", ranks.leads)
        self.store = BucketStore(out / "buckets", len(q_buckets), ranks.leads)
        self.step = self.visit = self.bucket_step = 0
        self.skipped = 0  # consecutive steps that were skipped
        self.saved_visit = 0  # the visit of the last checkpoint
        self.unstored: list[int] = []  # visits after which the bucket was not stored
        self.interrupted = None  # the open bucket's state, from the checkpoint that the run continues from

    @property
    def bucket(self) -> int:
        """The bucket whose turn it is."""
        return self.visit % len(self.q_buckets)

    @property
    def q_bucket(self) -> int:
        return self.q_buckets[self.bucket]

    @property
    def q_warmup(self) -> int:
        """The steps of this turn's warm-up, which leaves at least one step for meta_down to move in."""
        return min(round(self.bucket_warmup * self.q_bucket), self.q_bucket - 1)

    @property
    def steps_left(self) -> int:
        """The steps that are left of this turn, or of the run."""
        return min(self.q_bucket - self.bucket_step, self.q_total - self.step)

    def reaches(self, visit: int) -> bool:
        """Say whether the run will come to a later visit."""
        turns = sum(self.q_buckets[k % len(self.q_buckets)] for k in range(self.visit, visit))
        return self.step - self.bucket_step + turns < self.q_total

    def generator(self, purpose: str, number: int) -> torch.Generator:
        """Return this rank's random numbers for a purpose, at a step or in a visit."""
        return generator_for(purpose, self.seed, number, self.ranks.rank)

    # Continuing

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one, and delete the buckets that were stored after it.

        With another number of ranks a turn has another number of steps; the run continues at the same
        fraction of the turn.
        """
        with self.ranks.lead_first():  # rank 0 renames damaged checkpoints
            state = self.checkpoints.load()
        step = state["step"] if state else None
        if step != self.ranks.once(lambda: step):
            raise UserError(f"{self.checkpoints.folder} is not the same folder for all ranks")
        if state is None:
            self.store.forget(since=0)  # of an earlier run without a checkpoint
            return
        self.step, self.visit, self.skipped = state["step"], state["visit"], state["skipped"]
        self.bucket_step = round(state["bucket_step"] * self.q_bucket / state["q_bucket"])
        self.state.load_state_dict(state["shared"])
        self.interrupted, self.saved_visit = state["open_bucket"], self.visit
        self.unstored = state.get("unstored", [])
        self.store.forget(since=self.visit)
        anew = sum(self.reaches(visit + len(self.q_buckets)) for visit in self.unstored)
        if anew and self.ranks.leads:
            print(
                f"{anew} of {len(self.q_buckets)} buckets were not stored, as the run was to end before their"
                " next turn: then what is trained of each of their people begins anew"
            )

    def save(self) -> None:
        """Write a checkpoint: all that the run needs to continue, except the stored buckets."""
        position = {"step": self.step, "visit": self.visit, "bucket_step": self.bucket_step}
        position |= {"q_bucket": self.q_bucket, "skipped": self.skipped, "unstored": self.unstored}
        state = {"shared": self.state.state_dict(), "open_bucket": self.state.bucket_state()}
        self.checkpoints.save(self.step, position | state)
        # Keep the buckets that the checkpoint before this one needs.
        self.store.forget(before=self.saved_visit + 1 - len(self.q_buckets))
        self.saved_visit = self.visit

    # Buckets

    def open_bucket(self) -> int:
        """Initialise mid and up for a bucket's first turn, or load them as its last turn left them.

        If they were not stored then, as the run was to end earlier, they are initialised anew. Returns the
        bucket's number.
        """
        state, self.interrupted = self.interrupted, None
        before = self.visit - len(self.q_buckets)
        if state is None and (before < 0 or before in self.unstored):
            self.state.start_bucket(self.bucket)
        elif state is not None or len(self.q_buckets) > 1:  # with one bucket they are still in memory
            self.state.load_bucket_state(self.store.fetch(self.visit) if state is None else state)
        self.store.read_ahead(self.visit + 1)
        return self.bucket

    def close_bucket(self) -> None:
        """Store the bucket for its next turn, if there will be one; do nothing if this turn has steps left.

        `advance` has already saved a checkpoint of this state. A run that is killed in between only closes
        the bucket once more; in the other order it would train the stored bucket twice.
        """
        if self.bucket_step < self.q_bucket:
            return
        count = len(self.q_buckets)
        if count > 1:
            if self.keep_buckets or self.reaches(self.visit + count):
                self.store.put(self.visit, self.state.bucket_state())
            else:
                self.unstored.append(self.visit)
        self.visit, self.bucket_step = self.visit + 1, 0
        self.unstored = [visit for visit in self.unstored if visit + count >= self.visit]

    # Steps

    def __enter__(self) -> "BucketRun":
        self.open = ExitStack()
        self.log = self.open.enter_context(
            Log(self.out / "log.jsonl", self.step, self.q_total, self.ranks.leads)
        )
        self.open.enter_context(self.stop.patiently())
        self.began, self.unread = time.perf_counter(), []
        return self

    def __exit__(self, *error) -> None:
        self.open.__exit__(*error)

    def advance(self, numbers: dict[str, Tensor], photos: Sequence[str], t: Tensor) -> None:
        """Count a step, and log its numbers when the next one is queued; save and write samples in time.

        numbers: the loss and the norms of gradients, scalars. photos, t: of the batch; they are logged if one
        of the numbers is infinite or NaN. Raises `Stopped` when the user has asked for it, and UserError
        after MAX_SKIPPED such steps in a row.
        """
        line = {"step": self.step + 1, "bucket": self.bucket}
        line |= {"phase": "warm-up" if self.bucket_step < self.q_warmup else "all"}
        line |= {"memory": round(peak_memory(self.device), 3)}  # GiB
        self.step, self.bucket_step = self.step + 1, self.bucket_step + 1
        late, size = Late(torch.stack([*numbers.values()])), self.ranks.sum(len(photos))
        self.unread.append((line, list(numbers), late, size, photos, t))

        stopping = self.ranks.any(self.stop.wanted)
        saving = not self.steps_left or stopping or self.step % self.save_every == 0
        # One step stays unread, unless a checkpoint is due or the step before was skipped.
        while self.unread and (saving or self.skipped or len(self.unread) > 1):
            self.write_line(*self.unread.pop(0))
        gives_up = self.skipped >= MAX_SKIPPED
        if saving or gives_up:
            self.save()
            self.log.plot()
        if gives_up:
            raise UserError(
                f"{self.skipped} steps in a row had a loss or gradient that is infinite or NaN: see the end "
                f"of {self.log.file}. The weights from before these steps are in {self.checkpoints.folder}"
            )
        if stopping:
            raise Stopped
        sampling = self.sample_every and self.step % self.sample_every == 0
        if sampling:
            self.write_samples()
        if saving or sampling:
            self.began = time.perf_counter()  # neither counts as training

    def write_line(
        self, line: dict, names: list[str], late: Late, size: int, photos: Sequence[str], t: Tensor
    ) -> None:
        """Log a step, and count it if it was skipped; it has ended when its numbers are there."""
        numbers, now = dict(zip(names, late.read())), time.perf_counter()
        line |= {"images_per_second": round(size / (now - self.began), 3)}
        self.began = now
        self.skipped = 0 if all(map(math.isfinite, numbers.values())) else self.skipped + 1
        if self.skipped:
            line |= {"photos": self.ranks.joined(list(photos)), "t": self.ranks.joined(t.tolist())}
        self.log.write(line | numbers)
