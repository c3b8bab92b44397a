"""Attention sinks of a run, by layer and head, with xarray alone: python docs/read_xarray.py RUN"""

import sys

import xarray as xr

run = xr.open_zarr(sys.argv[1], chunks=None)
run = run.isel(sequence=run.complete.values)  # what is not captured yet reads as NaN, never as zero

later = run.attn_sink.isel(query=slice(run.sizes["query"] // 2, None))
share = later.mean(["sequence", "query"])  # NaN at padding is left out
print("attention on the first visible token, queries of the second half, mean by layer:")
for layer, value in zip(run.layer.values, share.mean("head").values, strict=True):
    strongest = share.sel(layer=layer)
    head = int(strongest.idxmax())
    print(f"  layer {layer}: {value:.3f}   strongest head {head}: {float(strongest.max()):.3f}")
