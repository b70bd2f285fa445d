"""FBGEMM's product beside torch's own."""

import gc

import pytest
import torch
import torch.nn.functional as F

from extras import fbgemm

pytestmark = pytest.mark.skipif(
    not fbgemm.works(), reason="this processor, or this version of torch, has no FBGEMM that multiplies as torch does"
)


@pytest.mark.parametrize("rows", [1, 2, 5, 70])
@pytest.mark.parametrize("sides", [(641, 128), (640, 101), (33, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_the_product_in_float32(dtype, sides, rows, monkeypatch):
    """Of any sides, in one piece and in several."""
    w, x = (torch.randn(sides) * 0.02).to(dtype), torch.randn(rows, sides[1]).to(dtype)
    expected = F.linear(x.double(), w.double())
    for piece in (fbgemm.PIECE, 100):
        monkeypatch.setattr(fbgemm, "PIECE", piece)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        held = fbgemm.hold(w)
        assert len(held.pieces) == min(3, max(1, w.numel() // piece))
        found = fbgemm.product(x, held.number, sides[0])
        assert found.dtype == torch.float32 and held.nbytes == 2 * w.numel()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_number_of_sixteen_bits_that_is_a_float16_stays_what_it_is():
    """And of a bfloat16 that is none no more is lost than float16 says."""
    w = torch.arange(2**15, dtype=torch.int16).view(torch.bfloat16)
    w = w[w.float() <= fbgemm.LARGEST]
    (piece,) = fbgemm.hold(w[None].expand(2, -1)).pieces
    held = torch.ops.quantized.linear_unpack_fp16(piece)[0][0]
    exact = w.float() >= 2.0**-17
    assert torch.equal(held[exact], w[exact].float()) and exact.sum() > 4000
    assert (held - w.float()).abs().max() <= 3e-8


def test_a_matrix_is_forgotten_with_its_layer():
    held = fbgemm.hold(torch.randn(8, 8).half())
    number = int(held.number)
    assert number in fbgemm.HELD
    del held
    gc.collect()
    assert number not in fbgemm.HELD


def test_torch_compile_sees_an_operator():
    """Of the right shape and dtype, by the number of the matrix."""
    w, x = torch.randn(70, 33).half(), torch.randn(3, 33)
    held = fbgemm.hold(w)
    found = torch.compile(lambda x: fbgemm.product(x, held.number, 70) * 2, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(found, 2 * F.linear(x, w.float()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, NotImplementedError])
@pytest.mark.parametrize("name", ["linear_prepack_fp16", "linear_dynamic_fp16"])
def test_a_version_of_torch_without_it_is_done_without(name, error, monkeypatch):
    def lack(*_):
        raise error("not in this version")

    monkeypatch.setattr(torch.ops.quantized, name, lack)
    assert not fbgemm.works.__wrapped__()


def test_one_that_multiplies_otherwise_is_not_taken(monkeypatch):
    product = torch.ops.quantized.linear_dynamic_fp16
    monkeypatch.setattr(torch.ops.quantized, "linear_dynamic_fp16", lambda *args: product(*args) * 1.01)
    assert not fbgemm.works.__wrapped__()
