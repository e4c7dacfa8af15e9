"""One way to set up a model: from the settings of a call to where and how it runs, its tokenizer and its weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import psutil
import torch
from omegaconf import DictConfig, OmegaConf

from kernels import backend as kernels_backend
from kernels import compiled
from methods.core.binding.rounding import cache_dtype
from methods.core.errors import UserError
from methods.core.typed import shown
from runners.engine import thoughts
from runners.engine.loading import Checkpoint, checkpoint_of, date_of, load_model, load_tokenizer
from runners.engine.prompt import Encoder
from tasks.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    # importing the library's models takes seconds, and what is on disk is shown without them
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "float16", "bfloat16")
Loads = Callable[[Checkpoint, torch.dtype, torch.device], "PreTrainedModel"]


class ModelSetup:
    """The model that a call's settings describe. What cannot work is refused at once, with a UserError; tokenizer,
    encoder and weights are loaded when they are first asked for.

    backend: of the kernels, by name.  sampling: how its answers are drawn.
    load: where the weights come from.
    """

    sampling: Sampling = GREEDY
    #: whether it runs caches that may hold another type than the model's
    rounds: ClassVar[bool] = False

    def __init__(self, cfg: DictConfig, load: Loads | None = None):
        self.cfg = cfg
        self.load = load or load_model
        self.checkpoint = checkpoint_of(cfg.model)
        self.device = pick_device(str(cfg.device))
        self.backend = pick_backend(str(cfg.kernels.backend), self.device)
        self.dtype = pick_dtype(str(cfg.dtype), self.checkpoint, self.device)
        self.threads = pick_threads(cfg.threads)
        given = cache_dtype(cfg.cache.dtype)
        #: of the numbers that caches hold; None: the model's own
        self.cache_dtype = None if given == self.dtype else given
        if self.cache_dtype and not self.rounds:
            raise UserError(f"cache.dtype={cfg.cache.dtype}: only runner=evaluate holds caches in another type than "
                            "the model's; leave it out")  # fmt: skip

    @property
    def dtype_name(self) -> str:
        """The data type of the weights, as records have it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def cache_dtype_name(self) -> str | None:
        """The type of the numbers that caches hold, as records have it; None: the model's own."""
        return None if self.cache_dtype is None else str(self.cache_dtype).removeprefix("torch.")

    @property
    def reasoning(self) -> str:
        """`model.reasoning` as it is set."""
        return thoughts.named(self.cfg.model.reasoning)

    @property
    def date(self) -> str | None:
        """The day that its chat template takes for today, if it asks for one."""
        return date_of(self.checkpoint, self.cfg.model)

    @property
    def max_length(self) -> int | None:
        """Tokens of a prompt; None: only the window limits it."""
        return self.checkpoint.max_length(self.cfg.model.max_length)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer, loaded once."""
        return load_tokenizer(self.checkpoint)

    @cached_property
    def encoder(self) -> Encoder:
        """What makes token ids of examples; loads the tokenizer."""
        model = self.cfg.model
        return Encoder(
            self.tokenizer,
            ends=sorted(self.checkpoint.ends | ({self.tokenizer.eos_token_id} - {None})),
            max_length=self.max_length,
            window=self.checkpoint.window,
            chat=bool(model.chat),
            chat_options=plain(model.chat_options),
            date=self.date,
            reasoning=self.reasoning,
            hold_last=self.cfg.last_token == "held",
            sampling=self.sampling,
        )

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model on its device, loaded once."""
        torch.set_num_threads(self.threads)
        return self.load(self.checkpoint, self.dtype, self.device)


def pick_device(device: str) -> torch.device:
    """`device` as typed, or CUDA if there is one. Raises UserError if it does not exist."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={device}: this machine has {torch.cuda.device_count()} CUDA devices; try device=cpu")
    return chosen


def pick_backend(backend: str, device: torch.device) -> str:
    """Choose the form of the kernels for this process and name the one that runs on the device.

    Raises UserError if it cannot.
    """
    try:
        kernels_backend.use(backend)
        return compiled.name_on(device)
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error


@cache
def pick_threads(asked: int | None) -> int:
    """CPU threads for torch: as asked, else OMP_NUM_THREADS, else as many as there are idle cores.

    The threads of one operation wait for each other, so a single one on a busy core slows all of them down: a small
    model on two threads was seen to take ten times as long as on one.
    """
    if asked is not None:
        return asked
    most = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ or most == 1:
        return most
    busy = sum(psutil.cpu_percent(interval=0.3, percpu=True)) / 100
    return max(1, min(most, round((psutil.cpu_count() or 1) - busy)))


def pick_dtype(dtype: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """`dtype` as typed; for auto float32 on a CPU and the checkpoint's own elsewhere."""
    if dtype == "auto":
        configured = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
        dtype = "float32" if device.type == "cpu" else configured
    if dtype not in DTYPES:
        raise UserError(f"model.path={checkpoint.path}: its dtype is {shown(dtype)}; give dtype={', '.join(DTYPES)}")
    return getattr(torch, dtype)


def plain(node: Any) -> Any:
    """A configuration node as plain containers."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
