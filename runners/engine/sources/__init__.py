"""Where a checkpoint's files come from: a folder, the hub, a GGUF file, a model that one command fetches."""


def first_line(error: BaseException) -> str:
    """What an error of a library says first, else its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
