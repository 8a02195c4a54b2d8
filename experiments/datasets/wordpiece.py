"""Word pieces: BERT's rules to cut text, and its vocabularies.

    python -m experiments.datasets.wordpiece vocab.txt corpus/*.txt

makes a vocabulary of text files; without any, of the running Python's documentation.

Source: Devlin et al. 2018, https://arxiv.org/abs/1810.04805; the rules are those of
https://github.com/google-research/bert/blob/master/tokenization.py
"""

import argparse
import collections
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf

import mpl
from experiments.datasets import documentation, text

PAD, UNKNOWN, FIRST, LAST, MASK = SPECIAL = (
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SIZE = 2048  # of a vocabulary that is made here
_LONGEST = 200  # characters; a longer word is unknown
_CHINESE = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
            (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF),
            (0x2F800, 0x2FA1F))


class _Cleaned(dict[int, str]):
    """What `str.translate` puts for a character: spaces, and single ideographs."""

    def __missing__(self, code: int) -> str:
        character, new = chr(code), chr(code)
        kind = unicodedata.category(character)
        if character in "\t\n\r" or kind == "Zs":
            new = " "
        elif character in "\0\ufffd" or kind in ("Cc", "Cf"):
            new = ""
        elif any(low <= code <= high for low, high in _CHINESE):
            new = f" {character} "
        self[code] = new
        return new


class _Split(dict[int, str]):
    """What `str.translate` puts for a character: signs apart, accents left out."""

    def __init__(self, lower_case: bool):
        super().__init__()
        self._lower_case = lower_case

    def __missing__(self, code: int) -> str:
        character, new = chr(code), chr(code)
        kind = unicodedata.category(character)
        if self._lower_case and kind == "Mn":
            new = ""
        elif kind[0] == "P" or 33 <= code < 127 and not character.isalnum():
            new = f" {character} "
        self[code] = new
        return new


_CLEANED, _SPLIT = _Cleaned(), {lower: _Split(lower) for lower in (False, True)}


def words(text: str, lower_case: bool = True) -> list[str]:
    """Cuts text into words and single signs.

    Args:
        text: any text.
        lower_case: small letters without accents, as uncased vocabularies have them.
    """
    text = text.translate(_CLEANED)
    if lower_case:
        text = unicodedata.normalize("NFD", text.lower())
    return text.translate(_SPLIT[lower_case]).split()


class WordPieces:
    """A vocabulary, and how words are cut by it.

        of a word's characters, while some are left:
            the longest piece in the vocabulary that they begin with; "##" stands
            before all pieces but the word's first
        no such piece: the word is [UNK]

    Args:
        pieces: the vocabulary; a piece's place is its id.
        lower_case: as in `words`.
        name: where it is from, for messages.

    Attributes:
        pieces: as given.
        pad, unknown, first, last, mask: ids of the special pieces.

    Raises:
        ConfigError: a piece is there twice, or a special one is not.
    """

    def __init__(
        self, pieces: Sequence[str], lower_case: bool = True, name: str = "vocabulary"
    ):
        self.pieces, self._lower_case = list(pieces), lower_case
        self._id_of: dict[str, int] = {}
        for number, piece in enumerate(self.pieces):
            if self._id_of.setdefault(piece, number) != number:
                raise mpl.ConfigError(
                    f"{name}, line {number + 1}: {piece!r} is there already, in line "
                    f"{self._id_of[piece] + 1}.",
                    "Give a vocab.txt with one piece a line, as BERT's.")
        missing = [piece for piece in SPECIAL if piece not in self._id_of]
        if missing:
            raise mpl.ConfigError(
                f"{name} lacks {', '.join(missing)}; it has {len(self)} pieces.",
                "Give a vocab.txt with one piece a line, as BERT's.")
        self.pad, self.unknown, self.first, self.last, self.mask = (
            self._id_of[piece] for piece in SPECIAL)
        self._known: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.pieces)

    def ids(self, text: str) -> list[int]:
        """Returns the ids of a text's pieces."""
        ids = list[int]()
        for word in words(text, self._lower_case):
            if word not in self._known:
                self._known[word] = self._cut(word)
            ids += self._known[word]
        return ids

    def _cut(self, word: str) -> list[int]:
        ids, start = list[int](), 0
        while start < len(word) <= _LONGEST:
            for end in range(len(word), start, -1):
                piece = "##" * (start > 0) + word[start:end]
                if piece in self._id_of:
                    ids.append(self._id_of[piece])
                    start = end
                    break
            else:
                break
        return ids if start == len(word) else [self.unknown]

    def encoded(
        self, texts: Iterable[Sequence[str]], length: int
    ) -> dict[str, np.ndarray]:
        """Encodes texts, or pairs of them, as BERT reads them.

            [CLS] the first [SEP] the second [SEP] [PAD] ...

        Of a pair that is too long the longer one loses its last piece, again and again.

        Args:
            texts: one or two for each example.
            length: pieces in a sequence.

        Returns:
            `input_ids`, `input_mask` (1 but for padding) and `segment_ids` (1 for what
            belongs to the second text): int32 `[examples, length]`.
        """
        rows = []
        for example in texts:
            parts = [self.ids(text) for text in example]
            while sum(map(len, parts)) + len(parts) + 1 > length:
                max(reversed(parts), key=len).pop()
            ids, segments = [self.first], [0]
            for number, part in enumerate(parts):
                ids += [*part, self.last]
                segments += [number] * (len(part) + 1)
            rows.append((ids, segments))
        shape = len(rows), length
        arrays = {
            "input_ids": np.full(shape, self.pad, np.int32),
            "input_mask": np.zeros(shape, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
        }
        for number, (ids, segments) in enumerate(rows):
            arrays["input_ids"][number, :len(ids)] = ids
            arrays["input_mask"][number, :len(ids)] = 1
            arrays["segment_ids"][number, :len(ids)] = segments
        return arrays


def read(path: str, lower_case: bool = True) -> WordPieces:
    """Reads a `vocab.txt`: one piece a line.

    Raises:
        ConfigError: there is no such file, or it is no vocabulary.
    """
    if not tf.io.gfile.exists(path):
        raise mpl.ConfigError(
            f"There is no vocabulary {path}.",
            "Name BERT's own, --vocab=<vocab.txt>, or make one: "
            "python -m experiments.datasets.wordpiece vocab.txt <text files>.")
    lines = text.read(path).removesuffix("\n").split("\n")
    pieces = [line.removesuffix("\r") for line in lines]
    return WordPieces(pieces, lower_case, f"File {path}")


def make(
    texts: Iterable[str], size: int = SIZE, lower_case: bool = True
) -> list[str]:
    """Makes a vocabulary: the same one of the same texts.

        the special pieces
        each character that occurs, alone and after "##"; of too many the most frequent
        the most frequent words, until three quarters of `size` are filled
        of the other words the endings that save most characters: the rest

    Args:
        texts: what it is for.
        size: pieces in it, at most.
        lower_case: as in `words`.

    Raises:
        ConfigError: `size` has no room for the special pieces.
    """
    if size < len(SPECIAL):
        raise mpl.ConfigError(
            f"`size` ({size}) must be at least {len(SPECIAL)}, for the special pieces.",
            "Give some thousands.")
    counts, occurring = collections.Counter[str](), collections.Counter[str]()
    for each in texts:
        counts.update(words(each, lower_case))
    for word, count in counts.items():
        for character in word:
            occurring[character] += count
    characters = sorted(_best(occurring)[:(size - len(SPECIAL)) // 2])
    pieces = dict.fromkeys(
        [*SPECIAL, *characters, *(f"##{character}" for character in characters)])
    for word in _best(counts):
        if len(pieces) >= size * 3 // 4:
            break
        pieces[word] = None
    saved = collections.Counter[str]()
    for word, count in counts.items():
        for start in range(1, len(word) - 1) if word not in pieces else ():
            saved[f"##{word[start:]}"] += count * (len(word) - start - 1)
    for ending in _best(saved):
        if len(pieces) >= size:
            break
        pieces[ending] = None
    return list(pieces)


def _best(counts: Mapping[str, int]) -> list[str]:
    """The keys, highest count first; equal ones in the order of the alphabet."""
    return sorted(counts, key=lambda key: (-counts[key], key))


def main(argv: Sequence[str]) -> int:
    """Writes a vocabulary; returns the exit code, 1 after an error that it prints."""
    parser = argparse.ArgumentParser(description="Makes a vocabulary of word pieces.")
    parser.add_argument("vocab", help="file to write")
    parser.add_argument("texts", nargs="*", help="files of UTF-8 text")
    parser.add_argument("--size", type=int, default=SIZE, help="pieces, at most")
    parser.add_argument("--cased", action="store_true", help="keep capitals, accents")
    given = parser.parse_args(argv)
    texts = map(text.read, given.texts) if given.texts else documentation.load("train")
    try:
        pieces = make(texts, given.size, not given.cased)
        with tf.io.gfile.GFile(given.vocab, "w") as file:
            file.write("".join(f"{piece}\n" for piece in pieces))
    except mpl.ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    except tf.errors.OpError as error:
        print(f"`vocab` ({given.vocab}) cannot be written: {error.message}.\n"
              "Name a file in a folder that exists and takes files.", file=sys.stderr)
        return 1
    print(f"{given.vocab}: {len(pieces)} pieces")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
