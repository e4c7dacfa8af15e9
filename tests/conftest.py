"""What every test shares: one thread unless told otherwise, no network, and tiny models made on the spot."""

import gc
import os
import sys
import tempfile

# before torch: on tiny tensors two OpenMP threads are hundreds of times slower than one, and sum in another order
THREADS = os.environ.get("KVFRONTIER_TEST_THREADS", "1")
os.environ["OMP_NUM_THREADS"] = THREADS
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# the model of a command that names none, whatever this machine has
os.environ["KVFRONTIER_MODEL"] = "reference"
# what a bind tried out once is remembered for the next process and run, away from the user's own folder
os.environ.setdefault("KVFRONTIER_CACHE", os.path.join(tempfile.gettempdir(), "kvfrontier-tests"))
# tables as wide as they are, so that a test may look for a whole row
os.environ["COLUMNS"] = "160"

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from runners.settings import yamls

yamls.install()  # as run.py does: whatever a test composes is read ten times as fast
torch.set_num_threads(int(THREADS))
# Triton asks when it is first imported, and models import it: without a GPU its kernels run in its interpreter
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

WORDS = "the cat sat on a mat and read about a long river in the north where nobody answers questions"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say what it would need."""
    no_data = pytest.mark.skip(reason="set KVFRONTIER_DATA to the folder of published data")
    no_cuda = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "shared" in item.keywords and not os.environ.get("KVFRONTIER_DATA"):
            item.add_marker(no_data)
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_cuda)


def pytest_collection_finish() -> None:
    """What all tests import stays: a look for garbage need not go through it, half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def plain_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run.main` in this process notes in the environment how errors are shown; no test sees another's note."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv("KVFRONTIER_TRACEBACK", raising=False)


@pytest.fixture
def run_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: run_command("budget=0.5", ...) -> (exit code, stdout, stderr)."""
    import run

    def run_it(*words: str) -> tuple[int, str, str]:
        # restored when the test ends, also where run.main changes them
        monkeypatch.setenv("HYDRA_FULL_ERROR", os.environ["HYDRA_FULL_ERROR"])
        monkeypatch.delenv("KVFRONTIER_TRACEBACK", raising=False)
        monkeypatch.setattr(sys, "argv", ["run.py", *words])
        capfd.readouterr()
        code = run.main()
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        return code, *capfd.readouterr()

    return run_it


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder KVFRONTIER_DATA points to; for tests marked `shared`."""
    folder = Path(os.environ["KVFRONTIER_DATA"])
    assert folder.is_dir(), f"KVFRONTIER_DATA={folder} is not a folder"
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE with a few merges; any text survives a round trip. pad 0, bos 1, eos 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([WORDS] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """A checkpoint folder with a random two-layer grouped-query Llama (2,048 positions) and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharp_model(tiny_model_dir: Path):
    """The model of that folder with weights so large that attention matters; a random one is nearly uniform."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 8
    return model


@pytest.fixture(scope="session")
def artefact_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder where methods look for artefacts beside those that ship; `tests.tiny.equip` fills it for a model."""
    from methods.core import artefacts

    folder = tmp_path_factory.mktemp("artefacts")
    artefacts.PLACES.append(folder)
    yield folder
    artefacts.PLACES.remove(folder)
