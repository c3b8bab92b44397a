"""The rows of the launch table: (device, kernel, bits) → d_head → configuration; written by `aot --choose`."""

TABLE: dict[tuple[str, str, int], dict[int, str]] = {}
