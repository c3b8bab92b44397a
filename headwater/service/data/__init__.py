"""What the server reads for its clients: slices, figures, results, texts and Zarr files."""
