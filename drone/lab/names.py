"""What a reader sees instead of a key of the code: one name a thing, everywhere."""

# Key → the method's name in figures, tables and sentences.
METHODS = {
    "dense": "dense",
    "svd": "SVD",
    "drone": "DRONE",
    "theorem1": "DRONE, Theorem 1's form",
    "algorithm2": "DRONE, Algorithm 2",
    "product": "DRONE, product of queries and keys",
    "inputs": "PCA of the inputs",
    "whitened": "whitened by Cholesky",
    "layers": "fewer layers",
    "int8": "8-bit weights",
    "asvd": "ASVD",
    "fwsvd": "FWSVD",
    "weighted": "inputs weighted by gradients",
    "both": "inputs and gradients",
    "sequential": "DRONE, sequential",
    "shifted": "DRONE, shifted inputs",
    "shifted_both": "shifted inputs and gradients",
    "shared": "DRONE, shared bases",
    "pruned": "heads and neurons removed",
    # not methods, but lines that every method is read against
    "bound": "best possible",
    "majority": "majority class",
    "break-even": "break-even",
    "noise": "pure noise",
}

# How a Linear is called inside its layer → what it is. BERT's names, then MPNet's and
# DistilBERT's for the same six.
KINDS = {
    "attention.self.query": "queries",
    "attention.self.key": "keys",
    "attention.self.value": "values",
    "attention.output.dense": "attention output",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "attention.attn.q": "queries",
    "attention.attn.k": "keys",
    "attention.attn.v": "values",
    "attention.attn.o": "attention output",
    "attention.q_lin": "queries",
    "attention.k_lin": "keys",
    "attention.v_lin": "values",
    "attention.out_lin": "attention output",
    "ffn.lin1": "intermediate",
    "ffn.lin2": "output",
}


def module_kind(module: str) -> str:
    """Tell what a module of an encoder is, such as `queries` or `output`.

    Raises:
        ValueError: its name ends in none of `KINDS`.

    >>> module_kind("bert.encoder.layer.3.attention.self.query")
    'queries'
    """
    # The longest ending first: "attention.output.dense" also ends in "output.dense".
    for ending in sorted(KINDS, key=len, reverse=True):
        if module.endswith("." + ending):
            return KINDS[ending]
    raise ValueError(f"{module!r} ends in none of {', '.join(KINDS)}.")
