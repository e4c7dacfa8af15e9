"""The forced half of a batch: every cache reads the full cache's own answer, and what it predicts is compared.

In a group a row is forced and free at once up to its first token that differs, so that only those that have parted are
read again, from a copy of their cache as it was before its answer. Distributions are compared token by token, and none
is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from analysis.fidelity.numbers import first_divergence
from runners.engine.fidelity.panel import Panel
from runners.engine.fidelity.places import apart
from runners.engine.new_tokens import Limits, NewTokens
from runners.engine.problem import problem
from runners.engine.session import LOOK_EVERY, Generation, Session
from runners.engine.time_limit import TimeLimit

ROW = 5  # numbers of a place, as `apart` gives them


class Forcing:
    """The forced half of a batch, on the way of its caches through the first answer.

    wanted: which rows have one.  full: which of a group's members is the full cache; None: one other cache runs alone.
    """

    def __init__(self, panel: Panel, wanted: Sequence[bool], full: int | None):
        self.panel, self.wanted, self.full = panel, wanted, full
        self.twin: Any = None  # the state as it was before the answer: a Group, or a Session
        self.limits: Sequence[Limits] = ()
        self.counted: Sequence[int] = ()
        self.steps: list[tuple[list[int], Tensor]] = []  # of the free run: whose, and their numbers [5, m, B]
        self.said: list[list[int]] = []  # by row, the full cache's tokens that are forced
        self.values: dict[int, Tensor] = {}  # by cache, [5, tokens, B]
        self.errors: dict[int, str] = {}

    def hold(self, state: Any, logits: Tensor, limits: Sequence[Limits], counted: Sequence[int]) -> None:
        """Keep a copy of a state before it answers.

        logits [caches * B, V]: after what was last fed.  counted: by row, the first place whose query attends to what
        was compressed.
        """
        self.limits, self.counted = limits, counted
        # an answer must not be lost for want of memory for this
        with self.panel.timed(), contextlib.suppress(torch.OutOfMemoryError):
            self.twin, self.logits = state.fork(), logits
            for member in self.twin.active if self.full is not None else ():
                member.fate = []  # what fails here has not failed there

    def see(self, logits: Tensor, said: Tensor, active: Sequence[int]) -> None:
        """Compare one step of a group's free run. logits [m * B, V], said [m * B]: of the members that are active."""
        if self.twin is None or self.full not in active or len(active) == 1 or len(self.steps) == self.panel.most:
            return
        with self.panel.timed():
            at, by_member = active.index(self.full), logits.view(len(active), -1, logits.shape[-1])
            others = by_member[1:] if at == 0 else torch.cat((by_member[:at], by_member[at + 1 :]))
            numbers = apart(by_member[at], others, said.view(len(active), -1)[at])
            self.steps.append(([i for i in active if i != self.full], numbers))

    @torch.inference_mode()
    def settle(self, heard: Sequence[Generation | Exception], read: Callable[[], tuple[Session, Tensor]]) -> None:
        """What is still to be done once all have answered.

        heard: the first answers, by cache.  read: a full cache that has read the same, and its logits, where there is
        none among them.
        """
        if self.twin is None:
            return
        with self.panel.timed():
            try:
                if self.full is None:
                    self._beside(*read())
                else:
                    self._after(heard)
            except (torch.OutOfMemoryError, TimeLimit):
                self.values = {}  # the answers stand, and this sample has no forced half
            except Exception as error:
                self.errors = dict.fromkeys(range(len(heard)), problem(error).line)
            self.twin = self.logits = None
            self.steps = []

    def of(self, i: int) -> list[dict[str, Any] | None]:
        """What a record's rows have of the forced half of one cache; None for a row that has none."""
        rows = range(len(self.wanted))
        if i in self.errors:
            return [{"error": self.errors[i]} if self.wanted[row] else None for row in rows]
        return [self._row(i, row) if self.wanted[row] and i in self.values else None for row in rows]

    def _row(self, i: int, row: int) -> dict[str, Any]:
        n, counted = len(self.said[row]), self.counted[row]
        kl, differs, clear, gap, other = self.values[i][:, :n, row].tolist()
        lost = math.fsum(gap[counted:]) / (n - counted) if n > counted and all(map(math.isfinite, gap)) else None
        return {
            "kl": [float(f"{one:.6g}") if math.isfinite(one) else None for one in kl],
            "differ": [t for t, one in enumerate(differs) if one],
            "clear": [t for t, one in enumerate(clear) if one],
            "counted": counted,
            "dnll": None if lost is None else float(f"{lost:.6g}"),
            "flip": next((t for t, one in enumerate(other) if one), None),
            **({"drawn": True} if self.limits[row].draw else {}),
        }

    def _after(self, heard: Sequence[Generation | Exception]) -> None:
        """In a group: what the free run has shown up to where rows parted, and what is read again behind that."""
        assert self.full is not None
        full = heard[self.full]
        if not isinstance(full, Generation):
            return
        self.said = [one.ids[: self.panel.most] for one in full.answers]
        parted = {
            i: [first_divergence(a.ids, b.ids) for a, b in zip(full.answers, one.answers, strict=True)]
            for i, one in enumerate(heard)
            if i != self.full and isinstance(one, Generation)
        }
        values = self._seen(len(heard))
        again = [i for i in parted if any(self._goes_on(row, at) for row, at in enumerate(parted[i]))]
        if again:
            found = self._read_again(again)
            for place, i in enumerate(again):
                if (error := self.twin.members[i].error) is not None:
                    self.errors[i] = problem(error).line
                for row, at in enumerate(parted[i]):
                    if self._goes_on(row, at):
                        values[i, :4, at + 1 :, row] = found[:4, place, at + 1 :, row]  # type: ignore[operator]
                        # where the answer of a copy parts tells whether that is as it was
                        values[i, 4, :, row] = found[4, place, :, row]
        self.values = {i: values[i] for i in parted}

    def _goes_on(self, row: int, at: int | None) -> bool:
        """Whether a row that parted at a token has forced tokens behind it."""
        return self.wanted[row] and at is not None and at + 1 < len(self.said[row])

    def _seen(self, caches: int) -> Tensor:
        """The numbers of the free run, [caches, 5, tokens, B], on the CPU; NaN where there are none."""
        rows, n = len(self.said), max(map(len, self.said))
        values = torch.full((caches, ROW, n, rows), torch.nan, dtype=torch.float64)
        if self.steps:
            flat = torch.cat([numbers.reshape(-1) for _, numbers in self.steps]).cpu()  # the device is waited for once
            parts = flat.split([numbers.numel() for _, numbers in self.steps])
            for t, ((members, _), part) in enumerate(zip(self.steps[:n], parts)):
                values[members, :, t] = part.view(ROW, len(members), rows).transpose(0, 1)
        return values

    def _read_again(self, members: Sequence[int]) -> Tensor:
        """The numbers of some members that read the full cache's tokens beside it, [5, members, tokens, B]."""
        twin, rows, n = self.twin, len(self.said), max(map(len, self.said))
        chosen = [twin.members[i] for i in (self.full, *members)]
        places = [twin.active.index(member) for member in chosen]
        logits = self.logits.view(len(twin.active), rows, -1)[places]
        twin.only(chosen)
        tokens = torch.tensor([[*ids, *[0] * (n - len(ids))] for ids in self.said], device=logits.device)
        twin.session.expect(n - 1)
        lone = None
        if self.panel.noise is None and logits.dtype != torch.float32 and n > 1:
            lone, noise = twin.fork(), []  # the full cache once more, in a batch of another size
            lone.only([lone.members[self.full]])
        found = []
        for t in range(n):
            found.append(apart(logits[0], logits[1:], tokens[:, t]))
            if t + 1 < n:
                logits = twin.run(tokens[:, t : t + 1]).view(len(chosen), rows, -1)
                if lone is not None:
                    noise.append(apart(logits[0], lone.run(tokens[:, t : t + 1])[None], tokens[:, t])[0].mean())
        if lone is not None:
            self.panel.noise = float(torch.stack(noise).mean())
        return torch.stack(found, dim=2).cpu()

    def _beside(self, full: Session, logits: Tensor) -> None:
        """Alone: a full cache answers once more, and the other cache reads what it says."""
        most = self.panel.most
        limits = [dataclasses.replace(one, most=min(one.most, most or one.most)) for one in self.limits]
        rows, others, found = NewTokens(limits, logits.device), self.logits, []
        look_every = LOOK_EVERY.get(logits.device.type, 1)
        for session in (full, self.twin):
            session.expect(rows.most - 1)
        for t in range(rows.most):
            said = rows.take(logits)
            found.append(apart(logits, others[None], said))
            if t + 1 == rows.most or (t % look_every == 0 and all(rows.ended())):
                break
            logits, others = full.run(said[:, None]), self.twin.run(said[:, None])
        self.said = [one.ids for one in rows.answers()]
        self.values = {0: torch.stack(found, dim=2)[:, 0].cpu()}
