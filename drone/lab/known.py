"""The corpora this book was made with: is a file whole, cut off, or another vintage?

A file is known by its lines, so a byte-order mark, Windows line ends or a newline at
the end more or less do not make it another. The table holds numbers and digests only:
how many lines, the SHA-256 of all of them, and the first 8 digits of that of the first
1, 2, 4, 8, … lines, by which a file that was cut off is recognized wherever it ends.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from drone.callers import warn

SHORT = 8  # hex digits: enough to recognize, not to protect


@dataclass(frozen=True)
class Known:
    """One file: its lines, their SHA-256, and the digests of its beginnings."""

    lines: int
    sha256: str
    beginnings: str  # SHORT digits each


# Lines of the files this book has never had in hand, by their publishers' counts.
COUNTS = {
    "glue/MNLI/train.tsv": 392_703,
    "glue/MNLI/dev_matched.tsv": 9_816,
    "glue/MNLI/dev_mismatched.tsv": 9_833,
    "glue/QNLI/train.tsv": 104_744,
}
# fmt: off
KNOWN = {
    "glue/CoLA/dev.tsv": Known(
        1_043,
        "8c013e21dc39957cac37378d87bebe225b694a0d5fe13eded66c2856628833fd",
        "16b307168d650eb34990ed15ba785a1e4b4f9a265a89fb79b72d8b07726dcfe4"
        "fe69b91c5560c5ad6c4b9231",
    ),
    "glue/CoLA/train.tsv": Known(
        8_551,
        "9835e08e0d938d406b2b9f824b1fa0ee1521f48932d7fa98bf15ab894f7ad337",
        "2835066d2229e9ebabf40c622274b1026b674cb908d3d003db68decc98f5ed56"
        "e2d12e94dd7dca0e78375e76dbe5146732739af92253c9c3",
    ),
    "glue/MRPC/dev.tsv": Known(
        409,
        "0f63a633ce69749099ca9615f7b42fae6a12bb1f4df26550a542749bdcd9e0b9",
        "7b813410b1f4d9334730684caf193bacc74a4845dcc97019cdef817297126e43"
        "aed8dffc",
    ),
    "glue/MRPC/msr_paraphrase_test.txt": Known(
        1_726,
        "ea5b3d605a3560dc73ecc9bdc5482f47a2859073b318235490d9de79edf83eb3",
        "7b81341020ae361862ee14a919017cc8bf3caff2d980cca93aecba8dc105c201"
        "52c847d76f11b53b722432ea",
    ),
    "glue/MRPC/train.tsv": Known(
        3_668,
        "ab04b8aaf4e8b208167ea0aa4ae70336ff824f08f65e7d2bd84a7015bfdf0077",
        "7b81341069611512db927ae4d59092918a88119edc7e6e534e755b8640121a39"
        "d27445da9da067e86b29611b3e8fd520",
    ),
    "glue/QNLI/dev.tsv": Known(
        5_464,
        "be19376e4a9d344a190463fbe0559f66254c5ef2f1a925ea81a39eec00f7ea32",
        "c5cef0d047cf7fb7157e18ce8d1f6208704106a7e3dfb699306441600fed2bff"
        "63212f2abcc29178ea7f5f3dced7da76678309ab",
    ),
    "glue/RTE/dev.tsv": Known(
        278,
        "fc377022f72d46ac58b4f85c7b3ae97be9122f5137672e66e829abe556501de8",
        "386b81f91a81b220147b326cd55f6a17f23c9022220e56b29b38d29983beb941"
        "2b0afc07",
    ),
    "glue/RTE/train.tsv": Known(
        2_491,
        "9535fa3c6c5938bba715463f45fbceb844024f2c8c4f09a6819aab509ecac9a5",
        "386b81f98df82e3f2697cacda45ce7e90741e0cc49b699f1b484c3140fed5d36"
        "83cc9bf32711c85f82efaf0ff821183b",
    ),
    "glue/SST-2/dev.tsv": Known(
        873,
        "9caac0eb1332befc906207dbd8e5d032afb5be9bcf0e951255e7d3e9deb32b63",
        "70815c252d0ce2b980e0252223471f38772c0d7eb15fa82f46a40d83d5799229"
        "ae1338de5d3d0f4b",
    ),
    "glue/SST-2/train.tsv": Known(
        67_350,
        "2c19f5b3a0ca1fb00487d17bd811f3c031bc518c95e3c18cc914afda7fef5725",
        "70815c251500209ce2da9c2f3976a9bd402094143ff96dc83e23d3cf4c93e3da"
        "622c2e0e27595822f9a39e0088a36522eaf775345270cd8df44a95d3bc813f80"
        "127031d5",
    ),
    "glue/STS-B/dev.tsv": Known(
        1_501,
        "8d60eb8a799515f127a0801860baeb8abe1b88e3ec9dc5d3fd30df29b7780702",
        "9ea787c380d3cde42699bc2b2a18d23ab383b07db3cd1cbd413db56d43c94111"
        "516e17bd65ad8c0993e6117d",
    ),
    "glue/STS-B/train.tsv": Known(
        5_750,
        "d9e367c1b21cc3a3884454f9a814b38381e9d057a13594e8ceadc1536312c0d8",
        "9ea787c3bdea301a6b8b23579335ce50088d0962cd784df17f8927ed146ffb5f"
        "4266e74ace7439bf400ba25dc21018a794977ea1",
    ),
    "ptb/ptb.test.txt": Known(
        3_761,
        "91a2fa938d84baddaa05a3d67a5698924847eca8a4e7faa1518f3fd11c3d6d73",
        "6bfc32a13ba0ff0258946bc29be0455399cb89c09d0a3367a8f0525442cc448a"
        "9975f325ab622043650b0265b92458e6",
    ),
    "ptb/ptb.train.txt": Known(
        42_068,
        "cf85b423e7f29fef400551a6ecd722595e104ed0ab150374ca30733578121198",
        "1d7a8c6e50b31985af992d5b661a0c83a1f0ae776ef392c5bd2f6f92bfdf2185"
        "ab50b8e8521e5a1db7492d07e660f35ce053f52cf672d1fda5ea2c51c22b6984",
    ),
    "ptb/ptb.valid.txt": Known(
        3_370,
        "6d1b028ab2267ddceed1ad3cb67d9aadf438b8c7ed74baf5b1182488f6b18231",
        "b89b396e01d4876c7846d9204fa88c2fee45e315a4667d77691dd5b9de4985f4"
        "bdc16ee05b24567d870a9041775a403b",
    ),
}
# fmt: on


def check_whole(path: Path, lines: Sequence[str], ends: bool) -> None:
    """Refuse a file that is cut off; warn of one that is not the book's.

    Args:
        path: of the file; its last parts name it, such as `glue/CoLA/train.tsv`.
        lines: all of its lines, without what ends them.
        ends: whether the last line ends with a newline.

    Raises:
        ValueError: the file begins as the known one does and then ends, or it is no
            known file and its last line has no end.

    Warns:
        UserWarning: another vintage of a known file, with both digests; or one with
            fewer lines than its publisher says.
    """
    name = "/".join(path.parts[-3:] if "glue" in path.parts[-3:] else path.parts[-2:])
    known = KNOWN.get(name)
    found = _digest(lines)
    if known is not None and found == known.sha256:
        return
    # The last line may be cut in its middle, so only those before it are compared.
    whole = len(lines) if ends else len(lines) - 1
    if known is not None and whole < known.lines and _begins_as(known, lines[:whole]):
        raise ValueError(
            f"{path}: cut off, or shortened by hand: it begins as the known file does, "
            f"and has {len(lines)} lines of {known.lines}. Get it again; to use fewer "
            "rows, draw them with drone.lab.data.sample."
        )
    if not ends:
        raise ValueError(
            f"{path}, line {len(lines)}: no newline at its end, as if the file were "
            "cut off. If it is whole, add one."
        )
    if known is not None:
        warn(
            f"{path}: another vintage than this book's, {len(lines)} lines of SHA-256 "
            f"{found} and not {known.lines} of {known.sha256}; results may differ.",
        )
    elif len(lines) < COUNTS.get(name, 0):
        warn(
            f"{path}: {len(lines)} lines; its publisher's has {COUNTS[name]}.",
        )


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _begins_as(known: Known, lines: Sequence[str]) -> bool:
    """Whether the longest beginning of 1, 2, 4, … lines is that of the known file."""
    if len(lines) < 2:  # a header alone is every vintage's
        return False
    power = len(lines).bit_length() - 1
    wanted = known.beginnings[SHORT * power : SHORT * (power + 1)]
    return _digest(lines[: 2**power])[:SHORT] == wanted


def describe(lines: Sequence[str]) -> Known:
    """Make the table's entry of a file.

    >>> describe(["a", "b", "c"]).lines
    3
    """
    parts = "".join(_digest(lines[:n])[:SHORT] for n in _powers(len(lines)))
    return Known(len(lines), _digest(lines), parts)


def _powers(upto: int) -> Iterator[int]:
    n = 1
    while n <= upto:
        yield n
        n *= 2
