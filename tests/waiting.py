"""What a decode step must not do, noticed without a device: make the host wait for it, or copy the cache."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

#: ops whose result, or its size, is a number that the host needs
ASKING = (
    "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "item", "masked_select", "nonzero",
    "unique_consecutive", "unique_dim",
)  # fmt: skip
#: calls that ask a device, or send it numbers of the host, and are no ops on a CPU
CALLS = (torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.tolist, Tensor.numpy, Tensor.cpu)


class _Calls(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in CALLS, func.__name__
        return func(*args, **(kwargs or {}))


class _Ops(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        assert name not in ASKING, name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]), "a mask as index"
        if func is torch.ops.aten.repeat_interleave.Tensor:
            assert kwargs.get("output_size") is not None, "repeat_interleave counts its result"
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            assert source.device == out.device, f"from {source.device} to {out.device}"
        return out


@contextmanager
def no_waiting() -> Iterator[None]:
    """Fails where the host would wait for the device that holds the tensors, or send it numbers."""
    with _Calls(), _Ops():
        yield


class NoCopies(TorchDispatchMode):
    """Fails where so many bytes are allocated at once."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in inputs:
                assert x.untyped_storage().nbytes() < self.limit, f"{func} makes a copy of {tuple(x.shape)}"
        return out


def without_contents(thing: Any) -> Any:
    """A deep copy whose tensors have shapes and no numbers, so that nothing can be asked of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "__deepcopy__", _shape)
        patch.setattr(torch.nn.Parameter, "__deepcopy__", _shape)
        return copy.deepcopy(thing)


def _shape(x: Tensor, memo: dict[int, Any]) -> Tensor:
    shape = x.detach().to("meta")
    return memo.setdefault(id(x), torch.nn.Parameter(shape, False) if isinstance(x, torch.nn.Parameter) else shape)
