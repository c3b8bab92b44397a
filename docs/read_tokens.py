"""What a head attends to, as text, with zarr and the run's own tokenizer: python docs/read_tokens.py RUN"""

import json
import sys
from pathlib import Path

import numpy as np
import zarr

path = Path(sys.argv[1])
run = zarr.open_group(path, mode="r")
vocabulary = json.loads((path / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
text = {number: token.replace("Ġ", " ").replace("Ċ", "\\n") for token, number in vocabulary.items()}

layer, sequence, query = run["pattern"].shape[0] - 1, 0, min(40, run["pattern"].shape[3] - 1)
tokens = run["tokens"][sequence]
rows = run["pattern"][layer, sequence, :, query]  # [head, key]
print(
    f"layer {layer}, query {query} {text.get(int(tokens[query]))!r}: the three strongest keys of each head"
)
for head, row in enumerate(rows):
    strongest = [
        (k, text.get(int(tokens[k]), "<|endoftext|>"), row[k]) for k in np.argsort(row)[::-1][:3]
    ]
    print(
        f"  head {head}: "
        + ", ".join(f"{k} {token!r} {share:.2f}" for k, token, share in strongest)
    )
