"""Write `book/results/evidence.json`: what every finished case of an encoder lost.

    DRONE_DATA=/path/to/data python book/evidence.py

Pages that belong to no chapter, *Compress your model* first of all, read their numbers
there; every number is computed here from the files in `book/cases`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from drone.files import whole_file
from drone.lab.glue_read import studies

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT / "book" / "cases"
DECIDED = ROOT / "book" / "results" / "evidence.json"
USUAL = 2.0  # the speed-up of chapter 7
SPEEDS = (USUAL, 1.5, 3.0)


def short(encoder: str) -> str:
    """Name an encoder as the sentences do: `mpnet` or `minilm`."""
    return encoder.partition("-")[0]


def encoder_values() -> dict[str, Any]:
    """Return the points lost in every case of an encoder, as chapters 5 and 7 do.

    A name tells the speed where it is not the usual one: `minilm_mrpc_15_...`.
    """
    values: dict[str, Any] = {}
    for speed in SPEEDS:
        for (encoder, task), study in studies(CASES, speedup=speed).items():
            at = "" if speed == USUAL else f"_{10 * speed:.0f}"
            for method, arm in study.arms:
                found = study.lost((method, arm))
                name = f"{short(encoder)}_{task}{at}_{method}_{arm}"
                name = name.replace("-", "_")
                values[name] = found.value
                values[f"{name}_low"], values[f"{name}_high"] = found.low, found.high
                values[f"{name}_seeds"] = len(study.arms[method, arm])
    return values


def main() -> None:
    """Write the numbers, whole or not at all."""
    argparse.ArgumentParser(description=__doc__.split("\n", 1)[0]).parse_args()
    values = encoder_values()
    with whole_file(DECIDED) as temporary:
        temporary.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
    print(f"written: {DECIDED.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
