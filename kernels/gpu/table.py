"""The rows of the launch table: (device, kernel, bits) → d_head → configuration; see `headwater.kernels.gpu.launch`."""

TABLE: dict[tuple[str, str, int], dict[int, str]] = {
    ("sm_80", "pattern", 16): {
        32: "64x32 w4 s2",
        64: "64x64 w4 s2",
        128: "64x32 w4 s2",
        256: "64x32 w8 s2",
    },
    ("sm_80", "pattern", 32): {64: "32x32 w4 s2", 128: "32x16 w4 s1", 256: "16x16 w4 s1"},
    ("sm_80", "statistics", 16): {64: "64x32 w4 s2", 128: "64x32 w4 s2", 256: "32x16 w4 s1"},
    ("sm_80", "statistics", 32): {64: "32x16 w4 s1", 128: "16x16 w4 s1", 256: "16x16 w4 s1"},
    ("sm_80", "flash", 16): {64: "64x64 w4 s2", 128: "64x32 w4 s2", 256: "32x32 w4 s2"},
    ("sm_80", "flash", 32): {64: "32x32 w4 s2", 128: "32x32 w4 s1", 256: "16x16 w4 s1"},
    ("sm_80", "column", 16): {64: "32x128 w8 s2", 128: "32x128 w8 s2", 256: "32x128 w8 s2"},
    ("sm_80", "column", 32): {64: "32x64 w4 s2", 128: "16x32 w4 s1", 256: "16x16 w4 s1"},
    ("sm_90", "pattern", 16): {
        64: "64x64 w4 s4 tma",
        128: "64x32 w4 s4 tma",
        256: "64x32 w4 s3 tma",
    },
    ("sm_90", "pattern", 32): {64: "64x32 w4 s2 tma", 128: "32x32 w4 s2", 256: "32x16 w4 s1"},
    ("sm_90", "statistics", 16): {
        64: "64x64 w4 s3",
        128: "64x32 w4 s2 tma",
        256: "32x16 w4 s1 tma",
    },
    ("sm_90", "statistics", 32): {
        64: "32x16 w4 s1 tma",
        128: "16x16 w4 s1 tma",
        256: "16x16 w4 s1 tma",
    },
    ("sm_90", "flash", 16): {64: "64x64 w4 s3 tma", 128: "64x64 w4 s2 tma", 256: "32x16 w4 s1 tma"},
    ("sm_90", "flash", 32): {64: "64x32 w4 s2 tma", 128: "16x16 w4 s1 tma", 256: "16x16 w4 s1 tma"},
    ("sm_90", "column", 16): {
        64: "64x64 w4 s3 tma",
        128: "32x128 w8 s2 tma",
        256: "64x64 w4 s2 tma",
    },
    ("sm_90", "column", 32): {
        64: "32x64 w4 s2 tma",
        128: "16x32 w4 s1 tma",
        256: "16x16 w4 s1 tma",
    },
    ("sm_100", "pattern", 16): {
        64: "128x64 w8 s2 tma",
        128: "128x32 w8 s2 tma",
        256: "64x32 w4 s2 tma",
    },
    ("sm_100", "pattern", 32): {
        64: "64x32 w8 s2 tma",
        128: "16x16 w4 s1 tma",
        256: "16x16 w4 s1 tma",
    },
    ("sm_100", "statistics", 16): {
        64: "64x64 w4 s2 tma",
        128: "64x32 w4 s2 tma",
        256: "32x16 w4 s1 tma",
    },
    ("sm_100", "statistics", 32): {
        64: "32x16 w4 s1 tma",
        128: "16x16 w4 s1 tma",
        256: "16x16 w4 s1 tma",
    },
    ("sm_100", "flash", 16): {
        64: "64x64 w4 s2 tma",
        128: "64x64 w4 s2 tma",
        256: "32x16 w4 s1 tma",
    },
    ("sm_100", "flash", 32): {
        64: "64x32 w4 s2 tma",
        128: "16x16 w4 s1 tma",
        256: "16x16 w4 s1 tma",
    },
    ("sm_100", "column", 16): {
        64: "32x128 w8 s2 tma",
        128: "32x128 w8 s2 tma",
        256: "64x64 w4 s2 tma",
    },
    ("sm_100", "column", 32): {
        64: "32x64 w4 s2 tma",
        128: "16x32 w4 s1 tma",
        256: "16x16 w4 s1 tma",
    },
    ("gfx942", "pattern", 16): {64: "64x64 w4 s1", 128: "64x32 w4 s1", 256: "64x32 w4 s1"},
    ("gfx942", "pattern", 32): {64: "32x32 w4 s1", 128: "32x16 w4 s1", 256: "16x16 w4 s1"},
    ("gfx942", "statistics", 16): {64: "64x32 w4 s1", 128: "64x32 w4 s1", 256: "32x16 w4 s1"},
    ("gfx942", "statistics", 32): {64: "32x16 w4 s1", 128: "16x16 w4 s1", 256: "16x16 w4 s1"},
    ("gfx942", "flash", 16): {64: "64x64 w4 s1", 128: "64x64 w4 s1", 256: "32x32 w4 s1"},
    ("gfx942", "flash", 32): {64: "32x32 w4 s1", 128: "32x32 w4 s1", 256: "16x16 w4 s1"},
    ("gfx942", "column", 16): {64: "32x128 w8 s1", 128: "32x128 w8 s1", 256: "32x128 w8 s1"},
    ("gfx942", "column", 32): {64: "32x64 w4 s1", 128: "16x32 w4 s1", 256: "16x16 w4 s1"},
}
