"""Strings that end a text, found across the pieces it comes in."""

from __future__ import annotations

from collections.abc import Sequence

from mambify.errors import InvalidOptionError


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """``stop`` as a tuple, checked.

    Raises:
        InvalidOptionError: something else than strings, or an empty one.
    """
    found = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(found, Sequence) or not all(isinstance(string, str) for string in found):
        raise InvalidOptionError(f"stop must be strings that end the text, not {stop!r}")
    if not all(found):
        raise InvalidOptionError("an empty stop string would end every text before it begins")
    return tuple(found)


class Cutter:
    """Passes text on up to the first stop string; what may yet become one is held back.

    The string that is complete first ends the text (of several, the one that began first), so that the cut does not
    depend on how the text was cut into pieces.

    Attributes:
        found: the stop string that ended the text, or ``None``.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.found: str | None = None
        self._stop = tuple(stop)
        self._held = ""

    def add(self, text: str) -> str:
        """What has become certain with this piece; nothing once a stop string was found."""
        if self.found is not None:
            return ""
        self._held += text
        places = [(begin + len(s), begin, s) for s in self._stop if (begin := self._held.find(s)) >= 0]
        if places:
            _, begin, self.found = min(places)
            return self._held[:begin]
        keep = max((self._beginning(string) for string in self._stop), default=0)
        sure = len(self._held) - keep
        given, self._held = self._held[:sure], self._held[sure:]
        return given

    def finish(self) -> str:
        """What was held back, where no stop string came of it."""
        return "" if self.found is not None else self._held

    def _beginning(self, string: str) -> int:
        """How many characters at the end of the text may be the beginning of ``string``."""
        most = min(len(string) - 1, len(self._held))
        return next((size for size in range(most, 0, -1) if self._held.endswith(string[:size])), 0)
