"""Cut the middle out of a prompt that is too long: in LongBench's own way, or so that the question always survives."""

from collections.abc import Callable, Sequence


def truncate_middle(
    context: str,
    question: str,
    max_length: int,
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int]], str],
) -> tuple[str, bool]:
    """The context without its middle, so that the prompt has about `max_length` tokens, and whether it was cut.

    The first and the last half of the prompt's token ids are decoded and joined as strings, so encoding the result
    again may give a few tokens more or less. The question always survives whole, at the end: where the last half does
    not decode to text that ends with it (it is longer than half the room, or decoding does not restore it exactly),
    its tokens are set aside first and only the context's are cut.

    max_length: tokens, special tokens included.
    encode: text to token ids, special tokens added as the tokenizer does by default.
    decode: token ids to text, special tokens skipped.
    Raises ValueError if `max_length` has no room for the question and one token of context.
    See `cut_middle` for the way of LongBench's own code, which cuts questions too.
    """
    ids = encode(context + question)
    if len(ids) <= max_length:
        return context, False
    half = max_length // 2
    n_question = len(encode(question))
    room = 2 * half - n_question
    if room < 1:
        raise ValueError(f"max_length={max_length} tokens; the question alone takes {n_question}")
    text = decode(ids[:half]) + decode(ids[-half:])
    if len(text) > len(question) and text.endswith(question):
        return text.removesuffix(question), True
    ids = encode(context)
    head = min(half, room)
    tail = ids[len(ids) - (room - head) :]
    return decode(ids[:head]) + decode(tail), True


def cut_middle(
    context: str,
    question: str,
    max_length: int,
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int]], str],
) -> tuple[str, str, bool]:
    """Context and question of a prompt cut exactly as LongBench's own code cuts it, and whether it was cut.

    The first and the last half of the prompt's token ids are decoded and joined as strings, wherever the question
    begins: one that is longer than half of `max_length` loses its start too, and where decoding does not restore it the
    prompt has it as it was decoded. The context ends where its last token does.

    max_length, encode, decode: as in `truncate_middle`. Raises ValueError for less than two tokens.
    """
    ids = encode(context + question)
    if len(ids) <= max_length:
        return context, question, False
    half = int(max_length / 2)
    if half < 1:
        raise ValueError(f"max_length={max_length} tokens; cutting the middle leaves half of them on either side")
    head, tail = decode(ids[:half]), decode(ids[-half:])
    if len(head) + len(tail) > len(question) and tail.endswith(question):
        return head + tail.removesuffix(question), question, True
    n_context = len(encode(context))
    in_tail = n_context - (len(ids) - half)  # tokens of the context that the last half begins with
    split = len(head) + len(decode(ids[-half:][:in_tail])) if in_tail > 0 else len(decode(ids[: min(half, n_context)]))
    text = head + tail
    return text[:split], text[split:], True
