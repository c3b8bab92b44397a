"""Growth and turning of the residual stream over depth, with zarr alone: python docs/read_zarr.py RUN"""

import sys

import numpy as np
import zarr

run = zarr.open_group(sys.argv[1], mode="r")
resid, depths = run["resid"], run["depth"][:]
done = np.flatnonzero(run["complete"][:])
print(f"{run.attrs['model']}: resid {resid.shape} {resid.metadata.dimension_names}")

norm, cosine, before = [], [], None
for i in range(len(depths)):
    x = resid[i, done[0] : done[-1] + 1].astype(
        np.float32
    )  # [sequence, position, d_model], NaN at padding
    size = np.linalg.norm(x, axis=-1)
    norm.append(np.nanmean(size))
    if before is not None:
        cosine.append(np.nanmean((x * before).sum(-1) / (size * np.linalg.norm(before, axis=-1))))
    before = x
for i, depth in enumerate(depths):
    turned = f"   cosine with the depth before {cosine[i - 1]:.3f}" if i else ""
    print(f"  depth {depth}: mean norm {norm[i]:8.2f}{turned}")
