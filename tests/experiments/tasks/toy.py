"""Tokenizers of a few lines."""

import re
import zlib


class Words:
    """A token for each word with the blanks before it."""

    def encode(self, text):
        return [zlib.crc32(word.encode()) for word in re.findall(r"\s*\S+|\s+", text)]


class Characters:
    """A token for each character."""

    def encode(self, text):
        return [ord(character) for character in text]
