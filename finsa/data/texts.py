"""What a text is, the same for training, files, a single text, HTTP and exported models."""

from __future__ import annotations

# The characters of Unicode's property White_Space, which polars' `strip_chars` removes; Python's
# `str.strip` would remove the separators U+001C to U+001F too.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"


def normalize(text: str) -> str:
    """Remove leading and trailing white space. `finsa.data.cleaning.texts` does the same to columns."""
    return text.strip(WHITE_SPACE)
