"""Tasks under the names that readers know: a glued `mrpc, sst2` reads MRPC, SST-2."""

import re

from docutils import nodes
from sphinx.application import Sphinx

from drone.lab.data import TASKS

NAMES = {name: task.folder for name, task in TASKS.items() if task.folder}
NAME = re.compile(rf"\b({'|'.join(NAMES)})\b")


def rename(app: Sphinx, document: nodes.document, page: str) -> None:
    for glued in document.findall(nodes.inline):
        if "pasted-text" not in glued["classes"]:
            continue
        for text in list(glued.findall(nodes.Text)):
            known = NAME.sub(lambda found: NAMES[found[1]], text)
            text.parent.replace(text, nodes.Text(known))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-resolved", rename)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
