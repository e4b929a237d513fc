"""The report of an evaluation: one self-contained HTML page that says in words what the numbers allow to say."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from manifests.config import dump_yaml, write_atomically
from trainer.evaluation.bootstrap import FEW_SUBJECTS
from trainer.evaluation.scores import METRICS
from trainer.evaluation.seen import sentence as seen_sentence

REPORT_FILE = "report.html"
FIGURE_FOLDER = "figures"
SHOWN = ("pretrained", "random weights, seed 0", "trained from scratch, seed 0", "band power")
VERDICT_WORDS = {"yes": "yes", "no": "no, worse", "not decided": "not decided"}


def write_report(out: Path, scores: Mapping[str, Any], figures: Mapping[str, str]) -> Path:
    """Write `report.html` and `figures/NAME.svg`; returns the page's path.

    Args:
        out: Folder, made if absent.
        scores: Content of `scores.json`.
        figures: SVG text by `NUMBER-TASK-KIND`, as the tasks' `figures` list them.
    """
    folder = out / FIGURE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg in figures.items():
        write_atomically(folder / f"{name}.svg", svg)
    path = out / REPORT_FILE
    write_atomically(path, render(scores, figures))
    return path


def render(scores: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).resolve().parent), autoescape=True, undefined=StrictUndefined
    )
    tasks = [
        task
        | {
            "images": dict.fromkeys(("scores", "ablation", "map"), "")
            | {name.rpartition("-")[2]: _data_uri(figures[name]) for name in task["figures"]}
        }
        for task in scores["tasks"]
    ]
    return environment.get_template("report.html.j2").render(
        **{key: scores[key] for key in ("encoder", "date", "code", "device", "retrieval")},
        tasks=tasks,
        tested={name: digest for task in scores["tasks"] for name, digest in task["snapshots"].items()},
        config_text=dump_yaml(scores["config"]),
        metrics=METRICS,
        few_subjects=FEW_SUBJECTS,
        shown=SHOWN,
        sentences=sentences,
        seen_sentence=seen_sentence,
        ablation_sentence=ablation_sentence,
        folds_text=folds_text,
        verdict_word=VERDICT_WORDS.__getitem__,
        shade=_shade,
    )


def sentences(task: Mapping[str, Any]) -> list[str]:
    """What the intervals allow to say about a task, a sentence for each comparison."""
    return [_against(item) for item in task["comparisons"]]


def _against(item: Mapping[str, Any]) -> str:
    other = item["against"]
    shown = f"difference of balanced accuracy {item['difference']:+.3f}"
    if item["interval"]:
        shown += f", 95 % interval {item['interval'][0]:+.3f} to {item['interval'][1]:+.3f}"
    match item["verdict"]:
        case "yes":
            return f"Better than {other}: yes ({shown})."
        case "no":
            return f"Better than {other}: no, it is worse ({shown})."
        case _:
            reason = item["because"] or "the interval holds zero"
            return f"Better than {other}: not decided ({shown}; {reason})."


def ablation_sentence(found: Mapping[str, Any]) -> str:
    """How many channels keep 95 % of the full score."""
    if found["smallest"] is None:
        return (
            f"With all channels the score is {found['full']:.3f} and 95 % of it is no more than chance, so a number of "
            "channels that suffices has no meaning here."
        )
    total = len(found["montage"])
    text = (
        f"95 % of the full score ({found['full']:.3f}) is kept with {found['smallest']} of {total} channels on average"
    )
    if found["stable_from"] != found["smallest"]:
        text += f", and by every number from {found['stable_from']} on"
    return f"{text}."


def folds_text(task: Mapping[str, Any]) -> str:
    """How windows were parted, in words."""
    match task["folds"]:
        case "split":
            return "fitted on train and val, tuned on persons of val, tested on test"
        case "subjects":
            return f"one person left out at a time ({task['num_folds']} fits), tuned on the persons of each fit"
        case _:
            return f"{task['num_folds']} folds of persons, tuned on the persons of each fit"


def _shade(count: int, total: int) -> str:
    share = count / total if total else 0.0
    colour = "#fff" if share > 0.55 else "#22272e"
    return f"background: rgba(31, 90, 148, {0.06 + 0.84 * share:.2f}); color: {colour}"


def _data_uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
