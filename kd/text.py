"""Safe, short text for a terminal."""

import difflib
from collections.abc import Iterable


def plain(text: str, longest: int = 800) -> str:
    """Text on one line with control characters escaped, its middle cut out beyond `longest` characters."""
    return shown(text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}")


def shown(text: object) -> str:
    """Text on one line, with an escape for each character that a terminal would act on or cannot show."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def first_line(error: Exception) -> str:
    """The class of an error and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def did_you_mean(name: str, names: Iterable[str], most: int = 1) -> str:
    """The end of a message about an unknown name: '; did you mean X?' with at most `most` near names, or nothing."""
    near = difflib.get_close_matches(name, list(dict.fromkeys(names)), n=most, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""
