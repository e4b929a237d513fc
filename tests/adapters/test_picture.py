"""Pictures of predictions, looked at through their artists."""

from fractions import Fraction

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from adapters.bundle import load_bundle
from adapters.picture import COLOURS, STAGE_COLOURS, draw_track
from adapters.predict import Prediction
from adapters.tables import Track


@pytest.fixture(scope="module")
def records(bundle_dir):
    return load_bundle(bundle_dir).records


def track_of(record, rows, *, starts=None, seconds=30) -> Track:
    track = Track(record)
    for number, row in enumerate(rows):
        start = number * seconds if starts is None else starts[number]
        track.add(
            Prediction(
                task=record.task.id, recording="r", start=start, length=seconds, rate=Fraction(1), label="",
                probabilities=dict(zip(record.task.labels, row, strict=True)),
            )
        )  # fmt: skip
    return track


def draw(track: Track, **options) -> Figure:
    figure = draw_track(track, file="night.edf", bundle="bundle demo", **options)
    figure.canvas.draw()
    return figure


def texts(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.texts)


def test_a_night_is_a_hypnogram_over_hours_and_minutes(records):
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.ones(5) / 4, size=960)
    figure = draw(track_of(records["sleep_staging"], rows), start_time="23:10:05")
    above, below = figure.axes
    assert [label.get_text() for label in above.get_yticklabels()] == ["W", "R", "N1", "N2", "N3"]
    assert [label.get_text() for label in below.get_xticklabels()] == [f"{hour}:00" for hour in range(9)]
    assert "began at 23:10:05" in below.get_xlabel()
    assert "hours:minutes" in below.get_xlabel()
    assert below.get_ylabel() == "probability"
    legend = below.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["W", "R", "N1", "N2", "N3"]
    assert "night.edf" in texts(figure)
    assert "bundle demo" in texts(figure)
    assert records["sleep_staging"].task.title in texts(figure)


def test_the_line_of_the_hypnogram_goes_through_the_stages_and_stops_at_a_gap(records):
    rows = np.eye(5)[[0, 3, 4]]  # W, N3, and after ten minutes R
    above = draw(track_of(records["sleep_staging"], rows, starts=[0, 30, 630])).axes[0]
    (line,) = above.get_lines()
    place = {"W": 0, "R": 1, "N3": 4}
    np.testing.assert_array_equal(line.get_xdata(), [0, 30, 30, 60, np.nan, 630, 660])
    np.testing.assert_array_equal(
        line.get_ydata(), [place["W"], place["W"], place["N3"], place["N3"], np.nan, place["R"], place["R"]]
    )


def test_a_short_recording_counts_minutes_and_seconds(records):
    figure = draw(track_of(records["rhythm"], [[0.7, 0.1, 0.1, 0.1]] * 3, seconds=10))
    below = figure.axes[1]
    assert "minutes:seconds" in below.get_xlabel()
    assert [label.get_text() for label in below.get_xticklabels()][:2] == ["0:00", "0:05"]
    assert draw(track_of(records["rhythm"], [[0.7, 0.1, 0.1, 0.1]], seconds=10)).axes


def test_yes_no_labels_are_lines_around_a_half(records):
    task = records["rhythm"].task.model_copy(update={"loss": "bce", "labels": ["af", "block"]})
    record = records["rhythm"].model_copy(update={"task": task})
    above, below = draw(track_of(record, [[0.9, 0.8], [0.2, 0.7], [0.1, 0.2]])).axes
    assert len(below.get_lines()) == 3  # two labels and the dashed half
    assert below.get_lines()[-1].get_ydata()[0] == 0.5
    assert len(above.collections) == 2
    lengths = [sum(np.ptp(path.vertices[:, 0]) for path in bar.get_paths()) for bar in above.collections]
    assert lengths == [30, 60]  # seconds in which each is said


def test_colours_stay_apart_without_red_and_green_vision():
    """Deuteranopia after Viénot, Brettel and Mollon (1999): any two colours differ in what is left."""
    lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    blind = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    for palette in (COLOURS, tuple(STAGE_COLOURS.values())):
        seen = [np.linalg.inv(lms) @ blind @ lms @ np.array(to_rgb(colour)) for colour in palette]
        apart = [np.abs(one - other).max() for n, one in enumerate(seen) for other in seen[:n]]
        assert min(apart) > 0.08, sorted(apart)[:3]
