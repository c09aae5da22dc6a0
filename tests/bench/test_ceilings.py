import pytest
import torch

from manylora.bench.ceilings import GEMM_ROWS, Ceilings, measure_ceilings


@pytest.mark.parametrize(
    ("dtype", "int8"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
def test_ceilings_are_measured_and_leave_the_threads_as_they_were(dtype, int8):
    before = torch.get_num_threads()
    ceilings = measure_ceilings(
        [(96, 64), (64, 96)], 3, dtype, int8=int8, threads=1, read_bytes=4 << 20, min_weight_bytes=1 << 16
    )
    assert torch.get_num_threads() == before
    assert 0.01 < ceilings.memory_read_gb_s < 5000
    assert set(ceilings.gemm_gflop_s) == set(GEMM_ROWS)
    assert all(0.001 < rate < 100_000 for rate in ceilings.gemm_gflop_s.values())


def test_the_rate_for_a_number_of_rows():
    ceilings = Ceilings(memory_read_gb_s=1, gemm_gflop_s={32: 1.0, 128: 2.0, 512: 3.0})
    assert [ceilings.gemm_at(rows) for rows in (1, 32, 33, 128, 500, 9999)] == [1, 1, 2, 2, 3, 3]
