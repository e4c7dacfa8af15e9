"""What `runner=NAME` names."""

from abc import ABC, abstractmethod

from omegaconf import DictConfig


class Runner(ABC):
    """Does the work of one call, or of one job of a sweep."""

    @abstractmethod
    def run(self, cfg: DictConfig) -> int:
        """The exit code. Raises UserError for what the user gave and cannot work."""
