"""Words and word pieces by BERT's rules, in cases made by hand."""

import pytest

import mpl
from bert_files import PIECES, SPECIAL, write_vocabulary
from experiments.datasets import documentation, wordpiece
from experiments.datasets.wordpiece import WordPieces, words

SMALL = WordPieces(
    [*SPECIAL, "want", "##want", "##ed", "wa", "un", "runn", "##ing", ",", "a"])


@pytest.mark.parametrize("text, lower, cased", [
    (" \tHeLLo!how  \n Are yoU?  ", ["hello", "!", "how", "are", "you", "?"],
     ["HeLLo", "!", "how", "Are", "yoU", "?"]),
    ("H\u00e9llo", ["hello"], ["H\u00e9llo"]),
    ("ah\u535a\u63a8zz", ["ah", "\u535a", "\u63a8", "zz"],
     ["ah", "\u535a", "\u63a8", "zz"]),
    ("$5^2 `x`~", ["$", "5", "^", "2", "`", "x", "`", "~"],
     ["$", "5", "^", "2", "`", "x", "`", "~"]),
    ("a\u00a0b\u3000c", ["a", "b", "c"], ["a", "b", "c"]),  # spaces of other kinds
    ("a\u0000b\ufffdc\u200bd\u0007e", ["abcde"], ["abcde"]),  # no signs at all
    ("\u201cso\u201d\u2014yes", ["\u201c", "so", "\u201d", "\u2014", "yes"],
     ["\u201c", "so", "\u201d", "\u2014", "yes"]),
    ("3\u20ac \u00b5m", ["3\u20ac", "\u00b5m"], ["3\u20ac", "\u00b5m"]),
    ("", [], []),
])
def test_words(text, lower, cased):
    assert words(text) == lower
    assert words(text, lower_case=False) == cased


@pytest.mark.parametrize("text, pieces", [
    ("UNwant\u00e9d,running", ["un", "##want", "##ed", ",", "runn", "##ing"]),
    ("unwantedX running", ["[UNK]", "runn", "##ing"]),
    ("want wants", ["want", "[UNK]"]),
    ("waed wanted", ["wa", "##ed", "want", "##ed"]),  # the longest first
    ("", []),
])
def test_pieces(text, pieces):
    assert [SMALL.pieces[number] for number in SMALL.ids(text)] == pieces


def test_a_word_of_more_than_200_characters_is_unknown():
    vocabulary = WordPieces([*SPECIAL, "a", "##a"])
    assert vocabulary.ids("a" * 200) == [5] + [6] * 199
    assert vocabulary.ids("a" * 201) == [vocabulary.unknown]


def test_encoded_texts():
    vocabulary = WordPieces([*SPECIAL, *"abcdef"])
    one = vocabulary.encoded([("a b",), ("a b c d e f",)], 6)
    assert one["input_ids"].tolist() == [[2, 5, 6, 3, 0, 0], [2, 5, 6, 7, 8, 3]]
    assert one["input_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert not one["segment_ids"].any()
    # Of a pair the longer text is cut; the second where both are as long.
    pair = vocabulary.encoded([("a b", "c d e f"), ("a b c", "d")], 6)
    assert pair["input_ids"].tolist() == [[2, 5, 6, 3, 7, 3], [2, 5, 6, 3, 8, 3]]
    assert pair["segment_ids"].tolist() == [[0, 0, 0, 0, 1, 1]] * 2
    assert pair["input_ids"].dtype == pair["segment_ids"].dtype == "int32"


def test_a_vocabulary_file(tmp_path):
    vocabulary = wordpiece.read(write_vocabulary(tmp_path))
    assert vocabulary.pieces == PIECES
    assert (vocabulary.pad, vocabulary.unknown, vocabulary.first, vocabulary.last,
            vocabulary.mask) == (0, 1, 2, 3, 4)
    (tmp_path / "windows.txt").write_bytes("\r\n".join(PIECES).encode())
    assert wordpiece.read(str(tmp_path / "windows.txt")).pieces == PIECES


@pytest.mark.parametrize("content, message", [
    (b"[PAD]\n[UNK]\n[CLS]\n", r"vocab.txt lacks \[SEP\], \[MASK\]; it has 3 pieces"),
    ("\n".join([*PIECES, "film"]).encode(),
     rf"vocab.txt, line {len(PIECES) + 1}: 'film' is there already, in line 9"),
    (b"[PAD]\n[UNK]\n\xff\n", r"vocab.txt is no UTF-8: byte 12 \(0xff\)"),
])
def test_a_damaged_vocabulary_is_named(content, message, tmp_path):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(mpl.ConfigError, match=message):
        wordpiece.read(str(tmp_path / "vocab.txt"))


def test_a_missing_vocabulary_says_how_to_make_one(tmp_path):
    with pytest.raises(mpl.ConfigError, match="no vocabulary .*none.txt.\n.*datasets"):
        wordpiece.read(str(tmp_path / "none.txt"))


def test_a_vocabulary_is_made_of_frequent_words_and_endings():
    text = ["go " * 9 + "to " * 8, "a " * 7 + "walking talking x"]
    characters = sorted("gotawlkinx")
    start = [*SPECIAL, *characters, *(f"##{c}" for c in characters)]
    # Of 28 places 21 are for words: none is left. In two words "##alking" saves 5
    # characters each, "##lking" 4, "##king" 3.
    made = wordpiece.make(text, 28)
    assert made == [*start, "##alking", "##lking", "##king"]
    # 36 × 3/4 = 27: two words, "go" before "to".
    assert wordpiece.make(text, 36)[25:] == [
        "go", "to", "##alking", "##lking", "##king", "##ing", "##ng"]
    assert wordpiece.make(["\u00c4 B"], 99, lower_case=False)[5:] == [
        "B", "\u00c4", "##B", "##\u00c4"]


def test_a_vocabulary_is_no_larger_than_asked_for():
    """Of 3000 ideographs the most frequent are pieces, and the others unknown."""
    ideographs = [chr(0x4E00 + number) for number in range(3000)]
    texts = ["".join(ideographs), "".join(ideographs[1000:2000]), "ab ab ab"]
    pieces = wordpiece.make(texts, 2048)
    assert len(pieces) <= 2048
    # (2048 - 5) // 2 characters: a, b, and of those that are there twice the rest.
    assert len(pieces) == 5 + 2 * 1021
    assert set(pieces[5:5 + 1021]) == {
        "a", "b", *ideographs[1000:2000], *ideographs[:19]}
    vocabulary = WordPieces(pieces)
    assert vocabulary.ids(ideographs[2500]) == [vocabulary.unknown]
    assert vocabulary.unknown not in vocabulary.ids(f"ab {ideographs[1500]}")
    for size in (5, 6, 7, 8, 20):
        assert len(wordpiece.make(texts, size)) <= size
    with pytest.raises(mpl.ConfigError, match=r"`size` \(4\) must be at least 5"):
        wordpiece.make(texts, 4)


def test_the_program_says_what_is_wrong(tmp_path, capsys):
    path, folder = str(tmp_path / "vocab.txt"), str(tmp_path / "none" / "vocab.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff")
    for argv, cause in (
        ([path, f"{tmp_path}/none.txt"], f"File {tmp_path}/none.txt cannot be read: "),
        ([path, f"{tmp_path}/a.txt"], f"File {tmp_path}/a.txt is no UTF-8: byte 0"),
        ([path, "--size=4"], "`size` (4) must be at least 5"),
        ([folder], f"`vocab` ({folder}) cannot be written: "),
    ):
        assert wordpiece.main(argv) == 1
        out, err = capsys.readouterr()
        assert err.startswith(cause) and len(err.splitlines()) == 2 and not out
    with pytest.raises(SystemExit, match="2"):
        wordpiece.main([path, "--size=many"])
    assert "--size: invalid int value: 'many'" in capsys.readouterr().err
    assert not (tmp_path / "vocab.txt").exists()


def test_the_program_writes_the_default_vocabulary(tmp_path, capsys):
    path = tmp_path / "vocab.txt"
    assert wordpiece.main([str(path), "--size=2000"]) == 0
    assert capsys.readouterr().out == f"{path}: 2000 pieces\n"
    pieces = wordpiece.make(documentation.load("train"), 2000)
    assert wordpiece.read(str(path)).pieces == pieces
    assert {"the", "python", "##ing"} <= set(pieces)
    (tmp_path / "text.txt").write_text("Be bop")
    wordpiece.main([str(path), str(tmp_path / "text.txt"), "--cased"])
    assert wordpiece.read(str(path)).pieces[5:] == [
        *"Bbeop", "##B", "##b", "##e", "##o", "##p", "Be", "bop"]
