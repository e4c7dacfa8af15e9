"""Members of a group: one pass over the prompts, then one batch whose rows are the members' own.

The prompt runs once with the full cache; every member takes in each layer's step and compresses its own copy before the
next layer begins. Then what is fed goes through one batch, each row on its own cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from methods import load_method
from methods.core.bind import bind
from methods.core.cache import KVCache
from methods.core.contract import LayerCache, Method, ModelSpec, Step
from methods.core.group import Rows, Shared, Unmetered
from runners.engine.new_tokens import Answer, Limits, NewTokens, behind
from runners.engine.problem import problem
from runners.engine.session import LOOK_EVERY, Generation, See, Session, now
from runners.engine.time_limit import TimeLimit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Group:
    """Members on the same prompts, which have been read: what is fed to its session is fed to all of them.

    members: all of them, in the order of their methods.  active: those that neither failed nor ended.
    session: its rows are those of the prompts, once per active member.
    """

    def __init__(
        self, model: PreTrainedModel, members: Sequence[PrefillMember], session: _RowsSession, shared: KVCache, B: int
    ):
        self.model, self.members, self.session, self.B = model, members, session, B
        self.active = [member for member in members if member.error is None]
        self._gather(shared)

    @classmethod
    def begin(
        cls,
        model: PreTrainedModel,
        methods: Sequence[Method],
        samples: Sequence[int],
        read: Callable[[Session], Tensor],
        prompt_len: int | None = None,
        pad_id: int = 0,
        spans: Sequence[Mapping[str, tuple[int, int]]] | None = None,
    ) -> tuple[Group, Tensor]:
        """A group behind its prompts, and what reading them gave, once per active member.

        read: feeds the prompts, one row per sample, and gives a tensor of these rows.
        prompt_len: as for `Method.caches`.  spans: as for `Method.cache_for`.
        """
        members = [PrefillMember(model, method, prompt_len, samples, spans) for method in methods]
        lead = load_method("full").caches(bind(model), prompt_len)
        shared = _empty(model, members, prompt_len, samples)
        for i, layer in enumerate(shared.layers):
            followers = [member.layers[i] for member in members if member.error is None]
            layer.inner = Shared(lead[i], followers, leader_stays=False)
        session = Session(model, shared, len(samples), pad_id)
        outputs = read(session)
        common: dict[Any, Any] = {}
        for member in members:
            member.resume_from(shared, model, common)
        active = sum(member.error is None for member in members)
        group = cls(model, members, _RowsSession(session, active), shared, len(samples))
        return group, outputs.repeat(active, *[1] * (outputs.dim() - 1))

    def feed(self, parts: Sequence[Sequence[int]], ends_prompt: bool = False) -> Tensor:
        """As Session.feed, one part per prompt for all members; [active * B, V]."""
        return self.session.feed([*parts] * len(self.active), ends_prompt=ends_prompt)

    def run(self, ids: Tensor, chunk: int | None = None, ends_prompt: bool = False, every: bool = False) -> Tensor:
        """As Session.run, for ids [B, T] of all members."""
        ids = ids.repeat(len(self.active), 1)
        return self.session.run(ids, chunk=chunk, ends_prompt=ends_prompt, every=every)

    def fork(self) -> Group:
        """A group that goes on from here by itself; a member that fails in one of the two has failed in both."""
        shared_objects = [self.model, *self.session.cache.shared_objects()]
        for member in self.members:
            shared_objects += [member] if member not in self.active else [member.fate, *member.cache.shared_objects()]
        return copy.deepcopy(self, {id(one): one for one in shared_objects})

    def only(self, members: Sequence[PrefillMember]) -> None:
        """Go on with some of the active members, in this order; the others are left behind."""
        rows = len(members) * self.B
        self.active = list(members)
        # what was fed is the same for all members
        self.session.mask, self.session.counts = self.session.mask[:rows], self.session.counts[:rows]
        self._gather(self.session.cache)

    def answer(
        self, logits: Tensor, limits: Sequence[Limits], exact: bool = False, see: See | None = None
    ) -> list[Generation | Exception]:
        """Answers of all members, in their order; the error of one that has failed.

        A member leaves when all its rows have ended: nothing can be fed afterwards.

        logits [active * B, V]: after what was last fed.  limits: one per prompt.  see: is shown every step.
        """
        assert not exact, "rows that end apart from each other cannot go on together"
        self._decode(logits, limits, see)
        return [one for member in self.members if (one := member.heard or member.error) is not None]

    def _decode(self, logits: Tensor, limits: Sequence[Limits], see: See | None) -> None:
        if not self.active:
            return
        began = now(self.model.device)
        session, device = self.session, logits.device
        # every member has a copy of the prompts' rows, one member behind the other; all may say what one may say
        rows = NewTokens([*limits] * len(self.active), device)
        n, steps = session.mask.shape[1], max(0, rows.most - 1)
        session.expect(steps)
        # positions and mask are the same for all members and known before the first token: made once, for all steps
        pos = session.counts[: self.B] + torch.arange(steps, device=device)  # [B, steps]
        mask = torch.cat((session.mask[: self.B], session.mask.new_ones(self.B, steps)), dim=1)
        new = self._take(rows, logits, see)
        look_every = LOOK_EVERY.get(device.type, 1)
        for done in range(steps):
            # which rows have ended is known on the device: asking makes the host wait, so it is asked now and then
            if done % look_every == 0:
                ended = rows.ended()
                over = [all(ended[row] for row in self._rows(i)) for i in range(len(self.active))]
                stay = [i for i, member in enumerate(self.active) if not over[i] and member.error is None]
                # a member whose rows have all ended, or that failed, leaves, so that its cache costs no further step
                if len(stay) < len(self.active):
                    left = [row for i in stay for row in self._rows(i)]
                    self._leave(rows, done, began, but=stay)
                    if not self.active:
                        return
                    new = new[rows.keep(left)]
                    self._gather(session.cache)
            # one token of every row that is left, the members' rows in one batch
            M = len(self.active)
            here = slice(done, done + 1)
            seen = mask[:, : n + done + 1].repeat(M, 1)
            logits = session._forward(new[:, None], pos[:, here].repeat(M, 1), seen, False)[:, -1]
            new = self._take(rows, logits, see)
        self._leave(rows, steps, began)

    def _take(self, rows: NewTokens, logits: Tensor, see: See | None) -> Tensor:
        new = rows.take(logits)
        if see is not None:
            see(logits, new, [self.members.index(member) for member in self.active])
        return new

    def _leave(self, rows: NewTokens, steps: int, began: float, but: Sequence[int] = ()) -> None:
        """Let all members go that are not in `but`, places among the active."""
        seconds = now(self.model.device) - began
        answers = rows.answers()
        for i, member in enumerate(self.active):
            if i not in but:
                member.leave([answers[row] for row in self._rows(i)], steps, seconds)
        self.active = [self.active[i] for i in but]

    def _rows(self, i: int) -> range:
        """The rows of active member i."""
        return range(i * self.B, (i + 1) * self.B)

    def _gather(self, before: KVCache) -> None:
        """One cache whose rows are the active members', standing where `before` stands."""
        if not self.active:
            return
        batch = _empty(self.model, self.active, before.prompt_len, None)
        for i, layer in enumerate(batch.layers):
            parts = [(row * self.B, (row + 1) * self.B, member.layers[i]) for row, member in enumerate(self.active)]
            layer.inner = Rows(parts)
        rows = torch.arange(self.B, device=self.model.device).repeat(len(self.active))
        batch.resume_from(before, rows=rows)
        self.session.cache = batch


class PrefillMember:
    """One method of a group: its cache, and what became of it.

    heard: its answers, once it has left.  fate: what ended it, if anything did; shared with its forks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        prompt_len: int | None,
        samples: Sequence[int],
        spans: Sequence[Mapping[str, tuple[int, int]]] | None,
    ):
        self.method = method
        self.heard: Generation | None = None
        self.fate: list[Exception] = []
        self.layers: list[_Watched] = []

        def begin() -> None:
            self.cache = method.cache_for(model, prompt_len=prompt_len, samples=samples, spans=spans)
            self.layers = [_Watched(self, layer.inner) for layer in self.cache.layers]

        self.guard(begin)

    @property
    def error(self) -> Exception | None:
        """What ended it; None while nothing has."""
        return self.fate[0] if self.fate else None

    def guard(self, act: Callable[[], None]) -> None:
        """Do something that concerns this member only: an error ends the member, not the group."""
        if self.error is not None:
            return
        try:
            act()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """It ends with this error, and lets its cache's tensors go."""
        problem(error)  # the traceback, which is let go next, holds tensors of the failed step
        self.fate.append(error.with_traceback(None))
        for layer in self.layers:
            layer.inner = None

    def resume_from(self, shared: KVCache, model: PreTrainedModel, common: dict[Any, Any]) -> None:
        """After the shared prompt: stand there with a cache of its own. common: as in KVCache."""

        def act() -> None:
            self.cache.resume_from(shared)
            self.cache.common = common
            self.cache.end_prompt(model)

        self.guard(act)

    def late(self, error: TimeLimit) -> None:
        """The time is up: it has failed with this error, unless it has ended before."""
        if self.heard is None:
            self.fail(error)

    def leave(self, answers: list[Answer], steps: int, seconds: float) -> None:
        """Let the cache go with these answers: others may decode for a long time yet."""
        if self.error is None:
            self.heard = Generation(answers, self.cache.reports(behind(answers, steps)), steps, seconds)
        del self.cache
        for layer in self.layers:
            layer.inner = None


class _Watched(LayerCache):
    """A member's layer, with its own meter; its errors end the member and nobody else."""

    def __init__(self, member: PrefillMember, inner: LayerCache):
        self.member, self.meter = member, member.cache.meter
        self.inner: LayerCache | None = inner

    def append(self, step: Step) -> None:
        def act() -> None:
            assert self.inner is not None
            with self.meter.reading(step):
                self.inner.append(step)
            self.meter.after_append(step)

        self.member.guard(act)

    def attend(self, step: Step) -> Tensor:
        out = []

        def act() -> None:
            assert self.inner is not None
            with self.meter.reading(step):
                out.append(self.inner.attend(step))

        self.member.guard(act)
        # a member that failed still has its rows in the batch, until it leaves
        return out[0] if out else step.q.new_zeros(*step.q.shape[:-1], step.v.shape[-1])

    def end_step(self, step: Step) -> None:
        def act() -> None:
            assert self.inner is not None
            with self.meter.reading(step):
                self.inner.end_step(step)
            if step.layer == step.n_layers - 1:
                self.member.cache.end_pass(step)
            self.meter.after_end_step(step)

        self.member.guard(act)

    def expect(self, new: int) -> None:
        if self.inner is not None:
            self.inner.expect(new)

    def tensors(self) -> Any:
        return () if self.inner is None else self.inner.tensors()


@dataclass
class _Joint(Method):
    """What a batch of several methods shows the model: layers to be filled in, and what the members need of a step."""

    asks: frozenset[str] = frozenset()

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.asks

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        return [LayerCache() for _ in range(spec.n_layers)]


def _empty(model: PreTrainedModel, members: Sequence[PrefillMember], prompt_len: int | None, samples: Any) -> KVCache:
    asks = frozenset().union(*(member.method.needs for member in members))
    # of rows that are put together later, `resume_from` says what they are
    spans = [member.cache.given_spans for member in members if member.error is None]
    given = next((x for x in spans if x is not None), None)
    numbers = {member.method.cache_dtype for member in members}
    assert len(numbers) == 1, "members of a group take in the same numbers"
    batch = KVCache(model, _Joint(asks=asks), prompt_len, samples, given, numbers.pop())
    batch.meter = Unmetered([])
    return batch


class _RowsSession(Session):
    """A session whose rows are those of another one, once per member."""

    def __init__(self, before: Session, members: int):
        super().__init__(before.model, None, 0, before.pad_id)
        self.alone = len(before.mask) == 1
        self.mask, self.counts = before.mask.repeat(members, 1), before.counts.repeat(members, 1)

    def _forward(self, ids: Tensor, pos: Tensor, mask: Tensor | None, every: bool) -> Tensor:
        # rows of one prompt have no padding, however many members there are
        return super()._forward(ids, pos, None if self.alone else mask, every)
