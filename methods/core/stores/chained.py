"""Codes of what a prediction from the layer below lacks: layers are read from the lowest up, once in a pass."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from kernels import reads
from methods.core.codes.form import Coded, Form
from methods.core.codes.predictor import Predictor
from methods.core.contract import Step
from methods.core.stores.codec import CodecCache
from methods.core.stores.segment import CodedSegment, Segment
from methods.core.stores.segments import SegmentedStore

Pair = tuple[Tensor, Tensor]


class ChainedSegment(CodedSegment):
    """Codes of what predictions lack; in the lowest layer, which has none, of the keys and values themselves.

    Keys are predicted from the keys below, values from the keys of this layer and the values below, all as they are
    read. Its slots can be read while a pass has `rebuilt` them.
    """

    def __init__(self, keys: Coded, values: Coded, pos: Tensor, links: tuple[Predictor, Predictor] | None):
        super().__init__(keys, values, pos)
        self.links = links
        self.now: Pair | None = None  # keys and values in full, in this pass

    @classmethod
    def pack(
        cls, forms: tuple[Form, Form], links: tuple[Predictor, Predictor] | None, k: Tensor, v: Tensor, pos: Tensor,
        below: Pair | None,
    ) -> ChainedSegment:  # fmt: skip
        """k [b, H, s, D] and v [b, H, s, Dv] in these forms; below: the layer below, as it is read."""
        if links is None or below is None:
            return cls(Coded(forms[0], k), Coded(forms[1], v), pos, None)
        of_keys = links[0](k.shape[-1], below[0])
        keys = Coded(forms[0], (k.float() - of_keys).to(k.dtype))
        read = (of_keys + keys.read().float()).to(k.dtype)
        of_values = links[1](v.shape[-1], read, below[1])
        return cls(keys, Coded(forms[1], (v.float() - of_values).to(v.dtype)), pos, links)

    def rebuild(self, below: Pair | None) -> Pair:
        """Keys and values in full, from those of the layer below."""
        k, v = self.keys.read(), self.values.read()
        if self.links is not None and below is not None:
            k = (self.links[0](self.keys.D, below[0]) + k.float()).to(k.dtype)
            v = (self.links[1](self.values.D, k, below[1]) + v.float()).to(v.dtype)
            for x, codes in ((k, self.keys), (v, self.values)):
                reads.instead(x, *codes.arrays.values(), *below)
        self.now = k, v
        return self.now

    def read(self) -> Pair:
        assert self.now is not None, "what lies on the layer below is read in a pass"
        return self.now

    def join(self, later: Segment, to_come: int | None) -> bool:
        self.now = None
        return super().join(later, to_come)

    def select(self, rows: Tensor) -> ChainedSegment:
        twin = ChainedSegment(
            self.keys.select(rows), self.values.select(rows), self.pos.index_select(0, rows), self.links
        )
        twin.until = self.until
        return twin

    def check_drops(self) -> None:
        raise NotImplementedError(f"{type(self).__name__}: cannot drop slots that the layer above is read from")


class ChainedStore(SegmentedStore):
    """A SegmentedStore whose codes stand on those of the layer below; all layers pack the same tokens at the same time.

    A subclass fills in `due` and `segments`, and makes segments of codes by `chained`.
    """

    def __init__(
        self, forms: tuple[Form, Form], links: tuple[Predictor, Predictor] | None, capacity: int | None = None
    ):
        """forms: of keys and values.  links: predictors of keys and values; None: of the lowest layer."""
        super().__init__(capacity)
        self.forms, self.links = forms, links
        self.below: dict[str, Tensor] = {}  # scratch of the layer below, while this layer packs
        self.fresh: dict[str, Tensor] = {}  # what has been packed in this pass, as it is read

    def chained(self, rows: slice, k: Tensor, v: Tensor, pos: Tensor) -> ChainedSegment:
        """A segment of these tokens, which the layers below have packed in this pass too."""
        key = f"new {len(self.fresh) // 2} {rows.start}"
        below = None if self.links is None else (self.below[f"{key} k"], self.below[f"{key} v"])
        segment = ChainedSegment.pack(self.forms, self.links, k, v, pos, below)
        self.fresh[f"{key} k"], self.fresh[f"{key} v"] = segment.rebuild(below)
        return segment


class ChainedCache(CodecCache):
    """One layer of a ChainedStore: rebuilds its slots from the layer below and leaves them to the layer above."""

    store: ChainedStore

    def attend(self, step: Step) -> Tensor:
        below = self._below(step)
        for i, (part, _) in enumerate(self.store.by_part()):
            for j, segment in enumerate(part.segments):
                if isinstance(segment, ChainedSegment):
                    # nobody else asks for what lies below: of all layers two are in full at a time
                    seen = None if below is None else (below.pop(f"{i} {j} k"), below.pop(f"{i} {j} v"))
                    self.scratch[f"{i} {j} k"], self.scratch[f"{i} {j} v"] = segment.rebuild(seen)
        out = super().attend(step)
        self._let_go()
        return out

    def end_step(self, step: Step) -> None:
        self.store.below = self._below(step) or {}
        super().end_step(step)
        self.scratch.update(self.store.fresh)
        self.store.below, self.store.fresh = {}, {}
        self._let_go()

    def adapters(self) -> Iterable[Tensor]:
        """Codebooks and predictors."""
        for form in self.store.forms:
            yield from form.parameters()
        for link in self.store.links or ():
            yield from link.tensors()

    def _below(self, step: Step) -> dict[str, Tensor] | None:
        return None if self.store.links is None else self.below(step.layer - 1).scratch

    def _let_go(self) -> None:
        """What was rebuilt is the pass's scratch, and nothing that is held."""
        for part in self.store.parts:
            for segment in part.segments:
                if isinstance(segment, ChainedSegment):
                    segment.now = None
