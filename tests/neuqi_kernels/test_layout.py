import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuqi_kernels import layout

# One row, K = 32, code k = k mod 2^b: the example of FORMAT.md, worked out by hand there.
GOLDEN = {
    2: "e4e4e4e4e4e4e4e4",
    3: "88c6fa88c6fa88c6fa88c6fa",
    4: "1032547698badcfe1032547698badcfe",
    8: "".join(f"{code:02x}" for code in range(32)),
}


@pytest.mark.parametrize("bits", layout.SUPPORTED_BITS)
def test_pack_writes_the_documented_bytes(bits: int) -> None:
    codes = (torch.arange(32) % (1 << bits)).to(torch.uint8)[None]
    packed = layout.pack(codes, bits)
    assert packed.shape == (1, layout.packed_words(32, bits))
    assert packed.numpy().astype("<i4").tobytes().hex() == GOLDEN[bits]


@pytest.mark.parametrize("bits", layout.SUPPORTED_BITS)
def test_code_k_is_at_bit_k_times_b(bits: int) -> None:
    codes = torch.randint(
        0, 1 << bits, (3, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits)
    )
    packed = layout.pack(codes, bits)
    for row in range(3):
        stream = int.from_bytes(packed[row].numpy().astype("<i4").tobytes(), "little")
        found = [stream >> (k * bits) & ((1 << bits) - 1) for k in range(96)]
        assert found == codes[row].tolist()


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(layout.SUPPORTED_BITS),
    rows=st.integers(1, 17),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_unpack_is_the_inverse_of_pack(bits: int, rows: int, blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, blocks * 32), dtype=torch.uint8, generator=generator)
    packed = layout.pack(codes, bits)
    assert torch.equal(layout.unpack(packed, bits), codes)
    # Rows and blocks of 32 codes may be cut out of the packed form.
    assert torch.equal(layout.unpack(packed[:1, :bits], bits), codes[:1, :32])


def test_pack_takes_a_transposed_view() -> None:
    codes = torch.randint(0, 8, (64, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).t()
    assert torch.equal(layout.unpack(layout.pack(codes, 3), 3), codes)


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.zeros(1, 32, dtype=torch.int32), 4, "uint8"),
        (torch.zeros(32, dtype=torch.uint8), 4, r"\[N, K\]"),
        (torch.zeros(1, 32, dtype=torch.uint8), 5, "bits in"),
        (torch.zeros(1, 48, dtype=torch.uint8), 4, "multiple of 32"),
        (torch.full((1, 32), 8, dtype=torch.uint8), 3, "below 8 for 3 bits, got 8"),
    ],
)
def test_pack_refuses(codes: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.pack(codes, bits)


@pytest.mark.parametrize(
    ("qweight", "bits", "message"),
    [
        (torch.zeros(1, 4, dtype=torch.int64), 4, "int32"),
        (torch.zeros(1, 4, dtype=torch.int32), 3, "3-word blocks"),
        (torch.zeros(1, 4, dtype=torch.int32), 7, "bits in"),
    ],
)
def test_unpack_refuses(qweight: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.unpack(qweight, bits)
