"""Where attention goes in a run, by layer and head, with xarray alone: python docs/read_xarray.py RUN"""

import json
import sys
from pathlib import Path

import numpy as np
import xarray as xr

path = Path(sys.argv[1])
run = xr.open_zarr(path, chunks=None)
run = run.isel(sequence=run.complete.values)  # what is not captured yet reads as NaN, never as zero
run = run.isel(sequence=slice(8))  # patterns are large: a few sequences will do
later = slice(run.sizes["query"] // 2, None)

vocabulary = json.loads((path / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
breaks = [number for token, number in vocabulary.items() if token.startswith("Ċ")]
is_break = xr.DataArray(np.isin(run.tokens, breaks), dims=["sequence", "key"])
print(
    f"attention of the second half's queries; {float(is_break.mean()):.0%} of the tokens begin with a line break"
)
for layer in run.layer.values:
    one = run.sel(layer=layer).isel(query=later)
    on_breaks = one.pattern.astype("float32").where(is_break, 0).sum("key")
    shares = []
    for mass in (one.attn_sink, on_breaks.where(one.attn_sink.notnull())):
        share = mass.mean(["sequence", "query"])  # NaN at padding is left out
        head = int(share.idxmax())
        shares.append(f"{float(share.mean()):.3f} (head {head}: {float(share.sel(head=head)):.3f})")
    print(f"  layer {layer}: on the first token {shares[0]}, on line breaks {shares[1]}")
