import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from trainer.filters import TICKS_PER_HOUR, SampleFilter, key_hash, lowest, passes, within_hours

TEXT = pa.string()
ROWS = pa.table(
    {
        "kinds": pa.array([["ecg", "eeg"], ["eeg"], [], ["resp"], None], type=pa.list_(TEXT)),
        "symbols": pa.array(
            [["eeg:C3-M2", "ecg:II"], ["eeg:C3-M2", "eeg:C4-M1"], [], ["resp:thorax"], None], type=pa.list_(TEXT)
        ),
        "num_channels": pa.array([2, 2, 0, 1, 0], type=pa.int32()),
        "quality": pa.array([0.9, 0.5, 1.0, None, 1.0], type=pa.float32()),
        "corpus": ["a", "b", "a", "b", "c"],
        "stage": ["N2", "?", "W", None, None],
        "classes": pa.array([[], ["left"], [], [], None], type=pa.list_(TEXT)),
    }
)


def encoded(rows: pa.Table) -> pa.Table:
    """The rows in two chunks, texts as dictionaries: as they come out of a parquet file."""
    lists = pa.list_(pa.dictionary(pa.int32(), TEXT))
    columns = {name: rows[name].cast(lists) for name in ("kinds", "symbols")}
    columns |= {name: rows[name].dictionary_encode() for name in ("corpus", "stage")}
    plain = {name: rows[name] for name in rows.column_names}
    return pa.table(plain | columns)


@pytest.mark.parametrize("rows", [ROWS, pa.concat_tables([ROWS[:2], ROWS[2:]])], ids=["whole", "chunks"])
@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ({}, [0, 1]),
        ({"min_quality": 0.6}, [0]),
        ({"kinds": ["ecg", "resp"]}, [0]),
        ({"kinds": ["ecg", "eeg"], "min_kinds": 2}, [0]),
        ({"channels": ["eeg:C4-M1", "ecg:II"]}, [0, 1]),
        ({"channels": ["eeg:C3-M2", "ecg:II"], "channel_match": "all"}, [0]),
        ({"channels": ["eeg:Fp1"]}, []),
        ({"min_channels": 3}, []),
        ({"corpora": ["b", "c"]}, [1]),
        ({"labelled": True}, [0, 1]),
    ],
)
def test_a_row_passes_if_every_condition_holds(rows: pa.Table, keep: dict, expected: list[int]) -> None:
    chosen = SampleFilter.model_validate(keep)
    for form in (rows, encoded(rows)):
        assert np.flatnonzero(passes(form, chosen)).tolist() == expected


def test_a_window_of_unknown_stage_and_no_class_is_not_labelled() -> None:
    rows = ROWS.set_column(ROWS.column_names.index("quality"), "quality", pa.array([1.0] * 5, type=pa.float32()))
    rows = rows.set_column(0, "kinds", pa.array([["eeg"]] * 5, type=pa.list_(TEXT)))
    rows = rows.set_column(2, "num_channels", pa.array([1] * 5, type=pa.int32()))
    assert np.flatnonzero(passes(rows, SampleFilter(labelled=True))).tolist() == [0, 1, 2]
    assert passes(rows, SampleFilter()).all()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"channels": ["nonsense!"]}, "write a UCS symbol"),
        ({"channels": ["C3-M2"]}, "write eeg:C3-M2"),
        ({"channels": []}, "at least 1 item"),
        ({"kinds": ["egg"]}, "choose from eeg"),
        ({"corpus_hours": 0}, "greater than 0"),
    ],
)
def test_a_condition_that_means_nothing_is_refused(keep: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SampleFilter.model_validate(keep)


def test_a_cap_keeps_whole_samples_up_to_its_hours_and_a_lower_one_a_part_of_them() -> None:
    rng = np.random.default_rng(0)
    group = rng.integers(0, 3, 200)
    ticks = rng.integers(1, 5, 200) * TICKS_PER_HOUR // 2
    chance = key_hash(np.array([f"key-{i}" for i in range(200)], dtype="S"))
    masks = [within_hours(hours, ticks=ticks, group=group, chance=chance) for hours in (3.0, 10.0, 1e9)]
    for hours, mask in zip((3.0, 10.0), masks, strict=False):
        for g in range(3):
            used = ticks[mask & (group == g)].sum() / TICKS_PER_HOUR
            assert hours - 2.5 < used <= hours
    assert not (masks[0] & ~masks[1]).any()
    assert masks[2].all()
    # Of a group of equal samples, those with the smallest hash.
    equal = within_hours(1.5, ticks=np.full(200, TICKS_PER_HOUR // 2), group=np.zeros(200), chance=chance)
    assert sorted(np.flatnonzero(equal)) == sorted(np.argsort(chance)[:3])


def test_the_hash_of_a_key_is_frozen_and_knows_no_width() -> None:
    # Another hash would keep other samples under the same cap, and so change what a run was trained on.
    assert key_hash(np.array(["kymo", "shhs-1a2b-000123"], dtype="S")).tolist() == FROZEN
    assert key_hash(np.array(["kymo"], dtype="S40")).tolist() == FROZEN[:1]
    hashes = key_hash(np.array([f"{i:08d}" for i in range(10_000)], dtype="S"))
    assert len(np.unique(hashes)) == 10_000
    assert np.bincount((hashes >> np.uint64(60)).astype(int), minlength=16).min() > 550


FROZEN = [2304167721544843248, 9235676600749513155]


@pytest.mark.parametrize("count", [1, 7, 500, 2000])
def test_the_lowest_keys_are_those_of_a_sort_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    keys = np.array([f"corpus-{number:012x}-{number % 7:06d}" for number in range(1000)], dtype="S")
    expected = np.argsort(key_hash(keys))[:count]
    for block in (1000, 64, 1):
        monkeypatch.setattr("trainer.filters._BLOCK_KEYS", block)
        hashes, rows = lowest(keys, count)
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_array_equal(hashes, key_hash(keys)[expected])
    assert len(lowest(keys[:0], count)[0]) == 0


def test_a_lowest_key_stays_when_others_come() -> None:
    keys = np.array([f"a-{number:06d}" for number in range(300)], dtype="S12")
    before, after = lowest(keys[:200], 20)[1], lowest(keys, 20)[1]
    assert {row for row in after.tolist() if row < 200} <= set(before.tolist())
    assert max(after) >= 200
