"""The word lists of the package wonderwords, which RULER draws from."""

from functools import cache

from methods.core.errors import UserError


@cache
def _lists() -> dict[str, list[str]]:
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise UserError("ruler: its words come from the package wonderwords; pip install wonderwords==3.0.1") from error
    # the lists have no public name; lm_eval reads them the same way
    return {sort: list(RandomWord()._categories[sort]) for sort in ("noun", "adjective", "verb")}


@cache
def nouns() -> tuple[str, ...]:
    """wonderwords' nouns, each once, sorted."""
    return tuple(sorted(set(_lists()["noun"])))


@cache
def adjectives() -> tuple[str, ...]:
    """wonderwords' adjectives, each once, sorted."""
    return tuple(sorted(set(_lists()["adjective"])))


@cache
def all_words() -> tuple[str, ...]:
    """Nouns, adjectives and verbs, each once, sorted."""
    return tuple(sorted({word for words in _lists().values() for word in words}))
