"""The benchmark of the kernels without a GPU: its program on CPU tensors, the code reader, the table's writer."""

import csv
import shutil

import pytest
import torch

from headwater.benchmarks.gpu import bench_kernels, kernels_static, retune
from headwater.benchmarks.gpu.sass import pipe_of, product_loops, tile_instructions
from headwater.kernels.gpu.launch import Config, lookup, parse

TINY = [
    "--device",
    "cpu",
    "--models",
    "small",
    "--lengths",
    "32,40",
    "--tokens",
    "64",
    "--rounds",
    "1",
    "--dtype",
]
CODE = """
        /*0000*/                   LDG.E.128 R4, [R2] ;
        /*0010*/                   HMMA.16816.F32 R4, R8, R2, R4 ;
        /*0020*/                   MUFU.EX2 R5, R5 ;
        /*0030*/                   BRA 0x200 ;
        /*0040*/              @!P0 BRA 0x10 ;
        /*0050*/                   FADD R4, R4, R4 ;
        /*0060*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;
        /*0070*/                   IMAD.MOV.U32 R3, RZ, RZ, R4 ;
        /*0080*/                   LOP3.LUT R3, R3, R4, RZ, 0xc0, !PT ;
        /*0090*/                   BRA 0x60 ;
        /*00a0*/               @P1 BRA 0xa0 ;
        /*0200*/                   BAR.SYNC 0x0 ;
        /*0210*/                   BRA 0x20 ;
"""


def test_inner_loops_are_found_in_the_code():
    """Code apart (0x200) branches back into the first loop; a loop without a product (0xa0) does not count."""
    first, second = product_loops(CODE)
    assert first == {"tensor": 1, "xu": 1, "control": 2} and second == {
        "tensor": 1,
        "fma": 1,
        "alu": 1,
        "control": 1,
    }
    assert (
        tile_instructions("statistics", CODE) == first
        and tile_instructions("column", CODE) == second
    )
    assert (
        tile_instructions("pattern", CODE) == first + second
        and tile_instructions("pattern", "") is None
    )
    assert [
        pipe_of(name) for name in ("UIADD3", "UTCHMMA", "UTMASTG", "FMNMX", "STS", "FFMA2")
    ] == ["uniform", "tensor", "global", "alu", "shared", "fma"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_program_runs_whole_on_the_cpu(capsys, dtype):
    assert bench_kernels.main([*TINY, dtype]) == 0
    told = capsys.readouterr()
    lines = [line for line in told.out.splitlines() if line.startswith("     small")]
    cases = (
        "copy",
        "pattern",
        "statistics",
        "flash",
        "residual",
        "eager",
        "sdpa + pattern",
        "sdpa",
    )
    assert len(lines) == 22 and all(any(f" {case}  " in line for line in lines) for case in cases)
    assert "nothing here says anything of a GPU" in told.err and "goal of pattern" in told.out


def test_a_wrong_kernel_is_not_timed(capsys, monkeypatch):
    right = bench_kernels.attention

    def wrong(*arguments, **options):
        out = right(*arguments, **options)
        return out._replace(column=out.column * 1.01) if out.column is not None else out

    monkeypatch.setattr(bench_kernels, "attention", wrong)
    assert bench_kernels.main([*TINY, "fp32"]) == 1
    told = capsys.readouterr()
    assert "column: relative error 1.0e-02" in told.err and "small" not in told.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
@pytest.mark.parametrize("arguments", [[], ["--retune"]])
def test_without_a_gpu_it_says_what_it_cannot_do(capsys, arguments):
    assert bench_kernels.main(arguments) == 1
    assert "not measured yet" in capsys.readouterr().err


def test_bytes_of_a_pattern_are_those_of_its_tiles():
    i = bench_kernels.make_inputs(2, 512, (3, 16, 48), torch.float16, "cpu")
    pattern = bench_kernels.attention(
        i.q, i.k, i.v, scale=1.0, pattern="tiles", edge=i.edge
    ).pattern
    extra = bench_kernels.bytes_of("pattern", i) - bench_kernels.bytes_of("flash", i)
    assert extra == pattern.numel() * pattern.element_size() == 2 * 3 * 3 * 256 * 256 * 2


def test_retuned_rows_are_written_and_the_rest_stays(tmp_path):
    path = tmp_path / "launch_table.py"
    shutil.copy(retune.TABLE, path)
    row = {64: "64x32 w4 s2 tma", 128: "32x16 w4 s1 r128", 256: "16x16 w4 s1"}
    retune.write_rows({("sm_90", "pattern", 16): row}, path)
    before, after = {}, {}
    exec(retune.TABLE.read_text(), before)
    exec(path.read_text(), after)
    assert after["TABLE"] == before["TABLE"] | {("sm_90", "pattern", 16): row}
    with pytest.raises(ValueError, match="has 0 rows for sm_70"):
        retune.write_rows({("sm_70", "pattern", 16): row}, path)
    for text in row.values():
        assert retune.show(parse(text)) == text


def test_the_fastest_candidate_that_runs_is_picked():
    speeds = {Config(64, 64, 4, 2): 3.0, Config(64, 32, 4, 2): 2.0, Config(32, 32, 4, 2): None}

    def timer(kernel, size, dtype, config):
        if speeds[config] is None:
            raise RuntimeError("out of shared memory")
        return speeds[config]

    assert retune.pick("pattern", 64, torch.float16, list(speeds), timer) == Config(64, 32, 4, 2)
    speeds |= {Config(64, 64, 4, 2, tma=True): 1.5, Config(32, 32, 4, 2, tma=True): 1.0}
    assert retune.pick("pattern", 64, torch.float16, list(speeds), timer) == Config(
        64, 64, 4, 2, tma=True
    )
    with pytest.raises(RuntimeError, match="no candidate of pattern"):
        retune.pick("pattern", 64, torch.float16, [Config(32, 32, 4, 2)], timer)


def test_a_candidate_that_ends_its_process_loses_and_the_next_is_timed():
    timer = retune.Apart(eval)
    assert timer("1.5") == 1.5
    with pytest.raises(RuntimeError, match="broke the device's context"):
        timer("__import__('os')._exit(1)")
    assert timer("2.5") == 2.5


def test_committed_static_results_are_of_this_table_and_in_budget():
    with kernels_static.RESULTS.open() as file:
        lines = list(csv.DictReader(file))
    rows = list(kernels_static.static_rows())
    assert len(lines) == len(rows) and kernels_static.render(
        lines
    ) in kernels_static.PAGE.read_text("utf-8")
    for line, row in zip(lines, rows, strict=True):
        assert (line["kernel"], line["arch"], line["d_head"], line["dtype"], line["variant"]) == (
            row.kernel,
            row.arch,
            str(row.d_head),
            row.dtype,
            row.variant,
        )
        config = lookup(row.kernel, row.arch, row.d_head, 32 if row.dtype == "float32" else 16)
        assert line["block"] == (
            f"{config.block_m}x{config.block_n}" if config.block_n else str(config.block_m)
        )
    assert (
        kernels_static.faults(
            [
                line
                | {
                    "bytes_ratio": float(line["bytes_ratio"]),
                    **{name: float(line[name]) for name in ("occupancy", "model_us")},
                    "registers": int(line["registers"]),
                    "spills": int(line["spills"]),
                }
                for line in lines
            ]
        )
        == []
    )
