"""A repository of the Hugging Face hub, in the hub's own cache."""

from __future__ import annotations

from pathlib import Path

from methods.core.errors import UserError
from runners.engine.sources import first_line
from tasks.data.sources import unreachable

# what a checkpoint needs; some repositories hold their weights twice
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
TWICE = ["original/*", "consolidated*", "onnx/*"]


def snapshot(repo: str, revision: str) -> Path:
    """The folder of the repository's files, named by the commit; downloaded if need be.

    Raises UserError if it is nowhere; an unreachable hub is noticed within seconds.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    # the hub's own client would try for half a minute before it gives up
    trouble = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else unreachable(ENDPOINT)
    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=FILES, ignore_patterns=TWICE, local_files_only=bool(trouble)
        )
    except GatedRepoError as error:
        raise UserError(
            f"model.path={repo}: its owners ask for registration; accept the terms at huggingface.co/{repo}, "
            "then set HF_TOKEN to an access token"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"model.path={repo}: no folder here and no public model of that name on the hub") from error
    except RevisionNotFoundError as error:
        raise UserError(f"model.revision={revision}: {repo} has no such branch, tag or commit") from error
    except OSError as error:
        raise UserError(
            f"model.path={repo}: not on this machine, and {ENDPOINT} cannot be used ({trouble or first_line(error)}); "
            "offline, model.path=DIR takes a checkpoint's folder, and one that was downloaded before loads as it is, "
            "at once with HF_HUB_OFFLINE=1"
        ) from error
    return Path(folder)
