"""How answers are drawn from what a model says."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    temperature: divides the logits; 0 takes the likeliest token.  top_p: a token is left if those likelier than it have
    less than that probability in all.  top_k: how many of the likeliest are left; 0: all.
    repeats: answers per prompt, whose mean is the sample's score.
    seed: of the draws; what a method draws, and which method it is, makes no difference to them.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repeats: int = 1
    seed: int = 0


GREEDY = Sampling()
