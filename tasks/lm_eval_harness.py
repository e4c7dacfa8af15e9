"""The name that a YAML of one's own may give for `tasks.lm_eval.task.LmEval`."""

from tasks.lm_eval.task import LmEval

__all__ = ["LmEval"]
