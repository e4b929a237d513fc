import numpy as np
import pytest

from manifests.errors import ContractError
from manifests.shards import BLOCK, npy_bytes, tar_sample
from trainer.layout import (
    FRAME,
    GAP,
    GAP_BYTES,
    MAX_PLANS,
    ROWS,
    Call,
    Layout,
    Stretch,
    calls_of,
    parse_layout,
    row_stretches,
)

EEG = np.arange(600, dtype=np.int16).reshape(2, 300)
RESP = -np.arange(70, dtype=np.int16).reshape(1, 70)
CHECKSUM = range(148, 156)
NPY_BYTES = 128


def sample(key: str = "a-0001", *, text: bytes = b'{"key":1}', resp: np.ndarray = RESP) -> bytes:
    return tar_sample(key, {"eeg.npy": npy_bytes(EEG), "json": text, "resp.npy": npy_bytes(resp)})


def parse(content: bytes):
    return parse_layout(lambda begin, length: content[begin : begin + length], len(content))


def frame_of(content: bytes, layout: Layout) -> bytes:
    return b"".join(content[begin : begin + length] for begin, length, *_ in layout.frame)


def array_at(content: bytes, shape: tuple[int, int], begin: int) -> np.ndarray:
    return np.frombuffer(content, np.int16, shape[0] * shape[1], begin).reshape(shape)


def test_a_layout_says_where_the_arrays_are() -> None:
    content = sample()
    key, text, layout = parse(content)
    assert (key, text) == ("a-0001", b'{"key":1}')
    assert layout.shapes == {"eeg": (2, 300), "resp": (1, 70)}
    np.testing.assert_array_equal(array_at(content, layout.shapes["eeg"], layout.begins["eeg"]), EEG)
    np.testing.assert_array_equal(array_at(content, layout.shapes["resp"], layout.begins["resp"]), RESP)
    assert layout.frame_bytes == len(frame_of(content, layout)) == len(content) - EEG.nbytes - RESP.nbytes


def test_a_sample_of_the_same_layout_is_known_by_its_headers() -> None:
    layout = parse(sample())[2]

    def text_of(content: bytes, key: bytes) -> bytes | None:
        return layout.text_of(key, frame_of(content, layout))

    assert text_of(sample("b-0777", text=b'{"key":12}'), b"b-0777") == b'{"key":12}'
    full = b"x" * BLOCK
    assert text_of(sample("b-0777", text=full), b"b-0777") == full
    assert text_of(sample("b-0777"), b"b-0778") is None
    other = sample("b-0777", resp=RESP.reshape(7, 10))  # as long, and of another shape
    assert len(other) == len(sample())
    assert text_of(other, b"b-0777") is None


def test_no_byte_of_a_header_may_differ() -> None:
    content = sample()
    layout = parse(content)[2]
    json_at = content.index(b"a-0001.json")
    heads = [begin - BLOCK - NPY_BYTES for begin in layout.begins.values()]
    for begin in [*heads, json_at]:
        is_json = begin == json_at
        for place in range(begin, begin + BLOCK + (0 if is_json else NPY_BYTES)):
            changed = bytearray(content)
            changed[place] ^= 1
            # The size of the JSON may differ within its blocks; a tar's checksum is nowhere looked at.
            in_size = is_json and 124 <= place - begin < 136
            if place - begin not in CHECKSUM and not in_size:
                assert layout.text_of(b"a-0001", frame_of(bytes(changed), layout)) is None, place


def test_a_json_of_other_blocks_is_no_match() -> None:
    layout = parse(sample())[2]
    content = bytearray(sample())
    at = bytes(content).index(b"a-0001.json") + 124
    content[at : at + 11] = b"00000001001"  # 513 bytes: a block more than there is
    assert layout.text_of(b"a-0001", frame_of(bytes(content), layout)) is None


def test_a_sample_that_breaks_the_format_is_refused() -> None:
    whole = sample()
    text = b"{'descr': '<i2', 'fortran_order': False, 'shape': (2, 300), }".ljust(117)
    torn = npy_bytes(EEG).replace(b"(2, 300)", b"(2, 3(0)")
    below = npy_bytes(EEG).replace(b"(2, 300)", b"(2,-300)")
    odd = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + EEG.tobytes()
    for content, match in (
        (whole[:-BLOCK], "ends after its sample"),
        (whole + bytes(BLOCK), "no tar header"),
        (tar_sample("a-1", {"eeg.npy": npy_bytes(EEG)}), "without JSON"),
        (tar_sample("a-1", {"json": b"{}"}), "without arrays"),
        (tar_sample("a-1", {"eeg.npy": npy_bytes(EEG)}) + tar_sample("b-1", {"json": b"{}"}), "members of a-1 and b-1"),
        (tar_sample("a-1", {"eeg.npy": npy_bytes(EEG)[:-2], "json": b"{}"}), "shorter than its shape"),
        (tar_sample("a-1", {"eeg.npy": npy_bytes(EEG.astype(np.float32)), "json": b"{}"}), "float32"),
        (tar_sample("a-1", {"eeg.npy": odd, "json": b"{}"}), "begins at byte 127"),
        (tar_sample("a-1", {"eeg.npy": torn, "json": b"{}"}), "header of an array is damaged"),
        (tar_sample("a-1", {"eeg.npy": below, "json": b"{}"}), "shape"),
    ):
        with pytest.raises(ContractError, match=match):
            parse(content)


def read_by(calls: list[Call], content: bytes, *, num_rows: int, num_frame: int) -> tuple[bytes, bytes]:
    """What the calls bring of a sample: its rows and its frame."""
    memory = {ROWS: bytearray(num_rows), FRAME: bytearray(num_frame), GAP: bytearray(GAP_BYTES)}
    for call in calls:
        found = content[call.begin : call.begin + call.num_bytes]
        for target, first, last in call.parts:
            memory[target][first:last], found = found[: last - first], found[last - first :]
        assert not found
    return bytes(memory[ROWS]), bytes(memory[FRAME])


@pytest.mark.parametrize("is_framed", [True, False])
@pytest.mark.parametrize(("start", "width"), [(0, 70), (7, 20)])
def test_a_plan_brings_rows_in_the_order_asked_for_and_the_frame(start: int, width: int, is_framed: bool) -> None:
    content = sample()
    layout = parse(content)[2]
    calls = layout.plan((("resp", (0,)), ("eeg", (0, 1))), start=start, width=width, is_framed=is_framed)
    expected = np.concatenate([RESP, EEG[:, :70]])[:, start : start + width].tobytes()
    frame = frame_of(content, layout) if is_framed else b""
    assert read_by(calls, content, num_rows=len(expected), num_frame=len(frame)) == (expected, frame)
    assert len(calls) == 1  # all is near each other


def test_plans_of_whole_rows_are_kept_and_not_for_ever() -> None:
    layout = parse(sample())[2]

    def plan(width: int, start: int = 0) -> list[Call]:
        return layout.plan((("eeg", (0, 1)),), start=start, width=width, is_framed=True)

    assert plan(300) is plan(300)
    assert plan(300) is not plan(299)
    assert plan(20, start=3) is not plan(20, start=3)
    for width in range(1, 3 * MAX_PLANS):
        plan(width)
    assert len(layout._plans) <= MAX_PLANS


def test_rows_that_follow_each_other_are_one_stretch() -> None:
    whole = row_stretches((4, 300), [1, 2, 3], begin=1000, start=0, width=300)
    assert whole == [Stretch(1600, 1800, ROWS, 0)]
    assert len(row_stretches((4, 300), [1, 2, 3], begin=1000, start=0, width=299)) == 3
    assert len(row_stretches((4, 300), [0, 2], begin=1000, start=0, width=300)) == 2
    assert row_stretches((4, 300), [0, 2], begin=1000, start=0, width=0) == []


@pytest.mark.parametrize(("gap", "num_calls"), [(0, 1), (1, 1), (GAP_BYTES, 1), (GAP_BYTES + 1, 2)])
def test_stretches_near_each_other_are_one_call(gap: int, num_calls: int) -> None:
    calls = calls_of([Stretch(100 + 10 + gap, 5, FRAME, 0), Stretch(100, 10, ROWS, 0)])
    assert len(calls) == num_calls
    assert sum(call.num_bytes for call in calls) == 15 + (gap if num_calls == 1 else 0)
