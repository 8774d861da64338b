"""Set before any notebook's kernel starts."""

import os

# Progress bars are for people: their widgets would count as outputs of a cell.
os.environ["TQDM_DISABLE"] = "1"
