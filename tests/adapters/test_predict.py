import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import numpy as np
import pytest
import torch

from adapters.bundle import Bundle, load_bundle
from adapters.config import LoraSpec
from adapters.data import load_task_data, read_spread
from adapters.evaluate import collate_task, task_probabilities
from adapters.model import MultiTaskModel
from adapters.predict import Prediction, label_of, predict
from manifests.errors import ContractError, RecordingError
from trainer.models.build import build_encoder
from trainer.models.sleep import SleepEncoderConfig
from trainer.models.univariate import UnivariateEncoderConfig
from trainer.read import Window


@pytest.fixture(scope="module")
def bundle(bundle_dir):
    return load_bundle(bundle_dir)


@pytest.fixture(scope="module")
def test_windows(adapted, bundle):
    """Task -> labelled test windows with their true class."""
    found = {}
    for run, record in zip(adapted.config.tasks, bundle.records.values(), strict=True):
        labelled = load_task_data(record.task, run).splits["test"]
        windows = [window for group in read_spread(labelled, limit=1000, batch=7) for window in group]
        found[record.task.id] = windows, [record.task.labels[labelled.targets[w.key][0]] for w in windows]
    return found


def retagged(window: Window, **changes) -> Window:
    """The window with other tags on its channels."""
    meta = json.loads(json.dumps(window.meta))
    for tags in meta["ucs"].values():
        for tag in tags:
            tag.update(changes)
    return Window(
        key=window.key, position=0, epoch=0, corpus=window.corpus, recording=window.recording, meta=meta,
        arrays=window.arrays,
    )  # fmt: skip


def test_predictions_are_those_that_were_scored(bundle, test_windows):
    for name, (windows, truth) in test_windows.items():
        predictions = list(predict(bundle, iter(windows)))
        right = np.mean([item.label == label for item, label in zip(predictions, truth, strict=True)])
        confusion = np.array(bundle.records[name].scores["test"]["confusion"])
        assert right == pytest.approx(np.trace(confusion) / confusion.sum())
        assert {item.task for item in predictions} == {name}
        first = predictions[0]
        assert sum(first.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert first.label == max(first.probabilities, key=first.probabilities.__getitem__)
        assert (first.start, first.length) == (windows[0].meta["start"], windows[0].meta["length"])
        assert first.rate == 32


def test_batch_mates_do_not_matter(bundle, test_windows):
    windows, _ = test_windows["sleep_staging"]
    together = predict(bundle, windows, batch=32)
    alone = predict(bundle, windows, batch=1)
    for one, other in zip(together, alone, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_windows_of_both_recipes_go_to_their_tasks(bundle, test_windows):
    mixed = [test_windows["sleep_staging"][0][0], test_windows["rhythm"][0][0]]
    assert [item.task for item in predict(bundle, mixed)] == ["sleep_staging", "rhythm"]
    assert [item.task for item in predict(bundle, mixed[:1], tasks=["sleep_staging"])] == ["sleep_staging"]
    with pytest.raises(ContractError, match="which no task here reads"):
        list(predict(bundle, mixed, tasks=["rhythm"]))


def test_window_without_the_channels_or_of_another_rate_is_refused(bundle, test_windows):
    window = test_windows["sleep_staging"][0][0]
    with pytest.raises(RecordingError, match="needs at least 1 eeg") as caught:
        list(predict(bundle, [retagged(window, role="reference")]))
    assert caught.value.reason == "NO_CHANNELS"
    with pytest.raises(ContractError, match="at 64 Hz, recipe tiny_psg of the bundle says 32 Hz"):
        list(predict(bundle, [retagged(window, rate=[64, 1])]))


ENCODERS = {
    "sleep": SleepEncoderConfig(width=16, depth=2, num_heads=2),
    "univariate": UnivariateEncoderConfig(width=16, depth=1, num_heads=2, channel_code=True),
}
# What tasks of one recipe can differ in: kinds, channels, view.
SIX = {
    "all": {"kinds": ["eeg", "ecg"]},
    "again": {"kinds": ["ecg", "eeg"]},
    "brain": {"kinds": ["eeg"]},
    "heart": {"kinds": ["ecg"], "min_channels": {"ecg": 1}},
    "right": {"kinds": ["eeg"], "channels": ["eeg:C4-M1"]},
    "yes": {"kinds": ["eeg"], "loss": "bce", "labels": ["W", "R"]},
}


def bundle_of(bundle: Bundle, tasks: dict[str, dict], encoder: str = "sleep") -> Bundle:
    """A bundle of tasks that differ from sleep staging in what is said, with random adapters."""
    staging = bundle.records["sleep_staging"]
    records = {
        f"task_{name}": staging.model_copy(
            update={"task": staging.task.model_copy(update={"id": f"task_{name}", **changes})}
        )
        for name, changes in tasks.items()
    }
    torch.manual_seed(3)
    outputs = {name: len(record.task.labels) for name, record in records.items()}
    model = MultiTaskModel(build_encoder(ENCODERS[encoder]), outputs, lora=LoraSpec(r=2)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return replace(bundle, model=model, records=records)


def rows_by_task(predictions: Iterator[Prediction]) -> dict[str, list[list[float]]]:
    found: dict[str, list[list[float]]] = {}
    for item in predictions:
        found.setdefault(item.task, []).append(list(item.probabilities.values()))
    return found


@pytest.mark.parametrize("encoder", ENCODERS)
def test_tasks_that_share_a_pass_say_what_they_say_alone(bundle, test_windows, encoder):
    windows = test_windows["sleep_staging"][0][:12]
    six = bundle_of(bundle, SIX, encoder)
    together = rows_by_task(predict(six, windows, batch=8))
    assert list(together) == list(six.records)
    said = set()
    for name, record in six.records.items():
        alone = rows_by_task(predict(six, windows, tasks=[name], batch=8))[name]
        np.testing.assert_allclose(together[name], alone, rtol=0, atol=1e-6)
        with torch.no_grad():
            plain = task_probabilities(record.task, six.model(name, collate_task(record.task, windows)))
        np.testing.assert_allclose(together[name], plain.numpy(), rtol=0, atol=1e-5)
        said.add(tuple(np.round(together[name][0], 4)))
    assert len(said) == len(SIX)  # each has its own adapter


def test_the_temporal_encoder_runs_once_for_all_tasks_of_a_view(bundle, test_windows):
    windows = test_windows["sleep_staging"][0][:16]
    seven = bundle_of(bundle, {**SIX, "robust": {"kinds": ["eeg"], "view": "robust"}})
    calls: list[int] = []
    seven.model.shared.register_forward_hook(lambda *given: calls.append(len(given[2])))
    assert len(list(predict(seven, windows, batch=8))) == 7 * 16
    # Two batches of eight windows: three channels for the six tasks, two for the one of another view.
    assert calls == [24, 16, 24, 16]


def test_windows_are_read_as_they_are_needed(bundle, test_windows):
    windows = test_windows["sleep_staging"][0][:20]
    read: list[str] = []
    stream = predict(bundle, (read.append(window.key) or window for window in windows), batch=6)
    next(stream)
    assert len(read) == 6
    assert len(list(stream)) == 19


def test_threads_that_predict_different_tasks_do_not_mix_them(bundle, test_windows):
    windows = test_windows["sleep_staging"][0][:8]
    six = bundle_of(bundle, SIX)
    expected = {name: rows_by_task(predict(six, windows, tasks=[name], batch=2))[name] for name in six.records}
    barrier = Barrier(len(SIX))

    def work(name: str) -> list[list[list[float]]]:
        barrier.wait()
        return [rows_by_task(predict(six, windows, tasks=[name], batch=2))[name] for _ in range(3)]

    with ThreadPoolExecutor(len(SIX)) as pool:
        for name, rounds in zip(six.records, pool.map(work, six.records), strict=True):
            assert all(found == expected[name] for found in rounds), name


def flat(window: Window, kinds: set[str]) -> Window:
    """The window with a signal that is flat for most of its time."""
    changed = retagged(window)
    for kind, tags in changed.meta["ucs"].items():
        for tag in tags:
            tag["flat"] = 0.4 if kind in kinds else 0.0
            tag["clipped"] = 0.2 if kind in kinds else 0.0
    return changed


def test_a_window_without_signal_is_left_out_of_the_tasks_that_need_it(bundle, test_windows):
    windows = test_windows["sleep_staging"][0][:4]
    both = bundle_of(bundle, {name: SIX[name] for name in ("brain", "heart")})
    mixed = [windows[0], flat(windows[1], {"eeg"}), flat(windows[2], {"ecg"}), flat(windows[3], {"eeg", "ecg"})]
    left_out: Counter[str] = Counter()
    found = list(predict(both, mixed, left_out=left_out))
    starts = {name: [item.start for item in found if item.task == name] for name in both.records}
    assert starts["task_brain"] == [windows[0].meta["start"], windows[2].meta["start"]]
    assert starts["task_heart"] == [windows[0].meta["start"], windows[1].meta["start"]]
    assert left_out == {"task_brain": 2, "task_heart": 2}
    # What is left is judged as if the others had not been there.
    alone = rows_by_task(predict(both, [windows[0], windows[2]], tasks=["task_brain"]))
    np.testing.assert_allclose(rows_by_task(iter(found))["task_brain"], alone["task_brain"], atol=1e-6)
    with pytest.raises(RecordingError, match="needs at least 1 eeg"):
        list(predict(both, mixed))


def test_a_yes_or_no_is_said_in_words(bundle):
    record = bundle_of(bundle, SIX).records["task_yes"]
    assert label_of(record, [0.6, 0.7]) == "W+R"
    assert label_of(record, [0.4, 0.5]) == ""
    single = record.model_copy(update={"task": record.task.model_copy(update={"labels": ["W"]})})
    assert (label_of(single, [0.6]), label_of(single, [0.5])) == ("W", "not W")
