"""Safe, short text for a terminal."""


def plain(text: str, longest: int = 800) -> str:
    """Text on one line with control characters escaped, its middle cut out beyond `longest` characters."""
    return shown(text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}")


def shown(text: object) -> str:
    """Text on one line, with an escape for each character that a terminal would act on or cannot show."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
