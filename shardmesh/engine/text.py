"""Text from the bytes of tokens: a token may end in the middle of a character."""

from __future__ import annotations

import codecs


class TextDecoder:
    """Turns pieces of UTF-8 into text as they come and never gives half a character.

    Bytes that are no UTF-8 become U+FFFD, as a model may well produce them.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, piece: bytes) -> str:
        """The text that is complete now; at most three bytes are held back."""
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left at the end: empty, or U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)
