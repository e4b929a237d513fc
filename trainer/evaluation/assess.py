"""`kymo evaluate`: what an encoder's frozen features are worth, against random weights and band powers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from manifests.config import code_version, digest, shipped_names, validate, write_atomically
from manifests.errors import ConfigError
from manifests.shards import load_snapshot
from manifests.tasks import TASKS_DIR, Task, load_task
from trainer.evaluation.ablation import ablate, dropout_features
from trainer.evaluation.channelwise import band_power, extractor_of
from trainer.evaluation.config import EvaluateConfig, TaskEvaluation
from trainer.evaluation.features import Extractor, features_of, random_encoder, reading_of
from trainer.evaluation.figures import draw_ablation, draw_map, draw_scores, svg_of
from trainer.evaluation.probe import Fold, ProbeName, fit_folds, predict_folds
from trainer.evaluation.recordings import recording_retrieval
from trainer.evaluation.report import write_report
from trainer.evaluation.scores import METRICS, compare, score_classes
from trainer.evaluation.scratch import train_end_to_end
from trainer.evaluation.seen import Pretraining, pretrain_seen, pretraining_of
from trainer.evaluation.subject import Subject, exported_folder, find_subject
from trainer.evaluation.windows import Rows, describe, folder_name, load_labelled
from trainer.pretrained_on import read_pretrained_on
from trainer.score import score_run

logger = logging.getLogger(__name__)

SCORES_FILE = "scores.json"
DECISIVE = "balanced_accuracy"  # what the verdicts are about
PRETRAINED, NEIGHBOURS, RANDOM, BAND_POWER = "pretrained", "pretrained, k-NN", "random weights", "band power"
END_TO_END, DROPOUT_PROBE = "trained from scratch", "pretrained, probe with channel dropout"

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Data:
    """Windows of a task and what every way to predict them shares."""

    task: Task
    settings: TaskEvaluation
    rows: Rows
    left_out: dict[str, int]
    digests: list[str]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prediction:
    """What a way to predict said of the tested rows, and the probes that said it; none for nets trained end to end."""

    tested: np.ndarray
    probabilities: np.ndarray
    folds: Sequence[Fold] = ()


def evaluate_run(config: EvaluateConfig, *, tell: Tell = logger.info) -> dict[str, Any]:
    """Evaluate, and write `scores.json`, `report.html` and the figures; returns the content of `scores.json`.

    Raises:
        ConfigError: No encoder, no task whose labels the snapshots have, or a task without windows to test on.
        ContractError: A snapshot, a shard or the encoder breaks its contract.
    """
    subject = find_subject(config.run)
    out = Path(config.out) if config.out else subject.folder / "evaluation"
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    tasks = config.tasks or plan_tasks(config)
    # The run's snapshots as they lie now tell more than the card of an encoder that was exported on another machine.
    facts = subject.card.pretrained_on if subject.config is None else read_pretrained_on(subject.config)
    pretraining = pretraining_of(facts)
    figures: dict[str, str] = {}
    results = []
    for number, settings in enumerate(tasks, start=1):
        data = _load(settings)
        tell(f"{data.task.id}: {len(data.rows)} windows of {data.rows['subject'].nunique()} subjects")
        assessment = _Assessment(subject, data, config=config, cache=out / "cache", device=device, tell=tell)
        result = assessment.run(pretraining)
        drawn = {f"{number}-{data.task.id}-{name}": svg_of(figure) for name, figure in assessment.figures.items()}
        results.append(result | {"figures": list(drawn)})
        figures |= drawn
    scores = {
        "encoder": _describe_encoder(subject),
        "config": config.model_dump(mode="json"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code_version(),
        "device": device,
        "retrieval": _retrieval(subject, config, tell),
        "tasks": results,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / SCORES_FILE, json.dumps(scores, indent=1, allow_nan=False) + "\n")
    write_report(out, scores, figures)
    return scores


def plan_tasks(
    config: EvaluateConfig,
    *,
    names: Sequence[str] = (),
    snapshots: Sequence[str] = (),
    folds: Any = None,
) -> list[TaskEvaluation]:
    """Tasks to evaluate: those of the configuration, or every one whose labels the snapshots have.

    Args:
        config: Its `tasks` stand as they are, apart from `names` and `folds`.
        names: Take these only.
        snapshots: In place of the run's own, where the configuration names no tasks.
        folds: In place of the tasks' own.

    Raises:
        ConfigError: There is no encoder to evaluate, which is told before anything about data; or no task is left.
    """
    exported_folder(config.run)
    change = {} if folds is None else {"folds": folds}
    if config.tasks:
        planned = [task for task in config.tasks if not names or task.task in names]
        if not planned:
            raise ConfigError(f"--tasks {','.join(names)}: the YAML has {', '.join(t.task for t in config.tasks)}")
        return [validate(TaskEvaluation, task.model_dump() | change, where="kymo evaluate") for task in planned]
    paths = [*snapshots]
    if not paths and (origin := find_subject(config.run).config) is not None:
        paths = [source.path for source in origin.snapshots]
    planned, why_not = [], []
    for name in names or shipped_names(TASKS_DIR):
        for path in paths:
            settings = validate(TaskEvaluation, {"task": name, "snapshots": [path], **change}, where="kymo evaluate")
            try:
                load_labelled(load_task(name), settings)
            except ConfigError as error:
                why_not.append(str(error))
                continue
            planned.append(settings)
    if not planned:
        reasons = "; ".join(why_not) or "the snapshots of the encoder's pretraining are not known"
        remedy = "name other tasks or snapshots" if snapshots else "name snapshots with --data"
        raise ConfigError(f"{config.run}: no task to evaluate ({reasons}); {remedy}, or write a YAML")
    return planned


def _load(settings: TaskEvaluation) -> Data:
    task = load_task(settings.task)
    rows, left_out, snapshots = load_labelled(task, settings)
    return Data(
        task=task,
        settings=settings,
        rows=rows,
        left_out=left_out,
        digests=[snapshot.digest for snapshot in snapshots],
    )


class _Assessment:
    """One task: features and probes of every contender, then what is read off them."""

    def __init__(
        self, subject: Subject, data: Data, *, config: EvaluateConfig, cache: Path, device: str, tell: Tell
    ) -> None:
        self.data = data
        self.config = config
        self.cache = cache
        self.tell = tell
        self.figures: dict[str, Figure] = {}
        reading = reading_of(data.task, subject.config.objective if subject.config else None)
        self.reading = reading
        self.encoder_config = encoder_config = subject.encoder.config
        self.device = device
        self.extractors: dict[str, Extractor] = {
            PRETRAINED: extractor_of(subject.encoder, reading, identity=subject.card.sha256, device=device),
            BAND_POWER: band_power(data.task),
        }
        for seed in config.scratch_seeds:
            self.extractors[f"{RANDOM}, seed {seed}"] = extractor_of(
                random_encoder(encoder_config, seed=seed),
                reading,
                identity=digest(["random", seed, encoder_config.model_dump(mode="json")]),
                device=device,
            )
        self.features: dict[str, np.ndarray] = {}

    @property
    def seeds(self) -> list[str]:
        """Names of the contenders with random weights."""
        return [name for name in self.extractors if name.startswith(RANDOM)]

    def run(self, pretraining: Pretraining) -> dict[str, Any]:
        """All that the report says of the task."""
        data, rows = self.data, self.data.rows
        predictions = self._predict()
        tested = rows.iloc[predictions[PRETRAINED].tested]
        truth, subjects = tested["target"].to_numpy(), tested["subject"].tolist()
        methods = {
            name: {
                **score_classes(truth, found.probabilities, labels=data.task.answers, subjects=subjects),
                "chosen": [{"value": fold.value, "on": fold.chosen_on} for fold in found.folds],
            }
            for name, found in predictions.items()
        }
        trained = [name for name in methods if name.startswith(END_TO_END)]
        contenders = {RANDOM: self.seeds, **({END_TO_END: trained} if trained else {})}
        summary = {name: _over_seeds([methods[one] for one in names]) for name, names in contenders.items()}
        comparisons = [
            {
                "against": against,
                **compare(
                    truth,
                    predictions[PRETRAINED].probabilities,
                    [predictions[name].probabilities for name in names],
                    subjects=subjects,
                    metric=DECISIVE,
                    seed=self.config.seed,
                ),
            }
            for against, names in [*contenders.items(), (BAND_POWER, [BAND_POWER])]
        ]
        result = {
            "task": data.task.id,
            "title": data.task.title,
            "labels": data.task.answers,
            "folds": data.settings.folds,
            "num_folds": len(predictions[PRETRAINED].folds),
            "snapshots": {folder_name(p): d for p, d in zip(data.settings.snapshots, data.digests, strict=True)},
            "data": describe(rows, data.task.answers),
            "left_out": data.left_out,
            "reading": {
                "view": self.reading.view,
                "groups": {name: list(kinds) for name, kinds in self.reading.groups.items()},
                "segment_s": self.reading.segment_s,
            },
            "pretrain_seen": pretrain_seen(pretraining, tested),
            "methods": methods,
            "over_seeds": summary,
            "comparisons": comparisons,
            "recordings": self._recordings(predictions[PRETRAINED].tested),
            "ablation": self._ablation(predictions),
        }
        self._draw(result, tested)
        return result

    def _predict(self) -> dict[str, Prediction]:
        predictions: dict[str, Prediction] = {}
        for name, extractor in self.extractors.items():
            self.tell(f"{self.data.task.id}: {name}")
            self.features[name] = features_of(
                self.data.rows, extractor, cache=self.cache, snapshots=self.data.digests, batch=self.config.batch
            )
            predictions[name] = self._probe("linear", self.features[name])
            if name == PRETRAINED:
                predictions[NEIGHBOURS] = self._probe("knn", self.features[name])
        return predictions | self._trained_from_scratch()

    def _trained_from_scratch(self) -> dict[str, Prediction]:
        """Nets of the encoder's architecture, trained end to end."""
        settings, data = self.config.end_to_end, self.data
        if settings is None:
            return {}
        found: dict[str, Prediction] = {}
        for seed in settings.seeds:
            name = f"{END_TO_END}, seed {seed}"
            self.tell(f"{data.task.id}: {name}")
            tested, probabilities = train_end_to_end(
                data.rows,
                self.encoder_config,
                self.reading,
                settings,
                folds=data.settings.folds,
                fold_seed=self.config.seed,
                seed=seed,
                num_classes=len(data.task.answers),
                device=self.device,
            )
            found[name] = Prediction(tested=tested, probabilities=probabilities)
        return found

    def _probe(self, probe: ProbeName, features: np.ndarray) -> Prediction:
        folds = fit_folds(probe, features, self.data.rows, folds=self.data.settings.folds, seed=self.config.seed)
        tested, probabilities = predict_folds(folds, features, num_classes=len(self.data.task.answers))
        return Prediction(tested=tested, probabilities=probabilities, folds=folds)

    def _recordings(self, tested: np.ndarray) -> dict[str, Any]:
        """Retrieval of recordings among the tested windows, by contender."""
        rows = self.data.rows.iloc[tested]
        found = {
            name: recording_retrieval(features[tested], rows)
            for name, features in self.features.items()
            if name in (PRETRAINED, BAND_POWER, self.seeds[0])
        }
        return {name: scores for name, scores in found.items() if scores is not None}

    def _ablation(self, predictions: Mapping[str, Prediction]) -> dict[str, Any]:
        """Loss with fewer channels, of the pretrained encoder and of one with random weights."""
        if self.config.ablation is None:
            return {}
        lines: dict[str, Any] = {}
        probes = {name: (self.extractors[name], predictions[name].folds) for name in (PRETRAINED, self.seeds[0])}
        if self.config.ablation.dropout:
            probes[DROPOUT_PROBE] = self.extractors[PRETRAINED], self._dropout_probe(self.config.ablation.dropout)
        for name, (extractor, folds) in probes.items():
            self.tell(f"{self.data.task.id}: channel ablation, {name}")
            found = ablate(
                folds,
                self.data.rows,
                extractor,
                self.config.ablation,
                labels=self.data.task.answers,
                batch=self.config.batch,
                seed=self.config.seed,
            )
            if found is not None:
                lines[name] = found
        return lines

    def _dropout_probe(self, copies: int) -> list[Fold]:
        """The linear probe, fitted on windows with all channels and on copies of them with random subsets."""
        features = dropout_features(
            self.data.rows, self.extractors[PRETRAINED], copies=copies, batch=self.config.batch, seed=self.config.seed
        )
        return fit_folds(
            "linear",
            np.concatenate([self.features[PRETRAINED], features]),
            self.data.rows,
            folds=self.data.settings.folds,
            seed=self.config.seed,
        )

    def _draw(self, result: Mapping[str, Any], tested: Rows) -> None:
        task = self.data.task
        entries = [
            {"name": key, "is_ours": key.startswith(PRETRAINED), **scores["metrics"][DECISIVE]}
            for key, scores in result["methods"].items()
        ]
        chance = entries[0]["chance"]
        self.figures["scores"] = draw_scores(entries, chance=chance, title=METRICS[DECISIVE])
        if result["ablation"]:
            self.figures["ablation"] = draw_ablation(result["ablation"], title=METRICS[DECISIVE])
        features = self.features[PRETRAINED][tested.index]
        self.figures["map"] = draw_map(
            features, tested["target"].to_numpy(), labels=task.answers, subjects=tested["subject"].tolist()
        )


def _over_seeds(methods: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, least and greatest value of every metric over the seeds."""
    metrics: dict[str, Any] = {}
    for name in methods[0]["metrics"]:
        values = [found["metrics"][name]["value"] for found in methods]
        known = [value for value in values if value is not None]
        if known:
            metrics[name] = {"mean": float(np.mean(known)), "low": min(known), "high": max(known)}
    return {"seeds": len(methods), "metrics": metrics}


def _retrieval(subject: Subject, config: EvaluateConfig, tell: Tell) -> dict[str, Any] | None:
    """Retrieval of the run's objective among held-out windows of its own snapshots, as in pretraining."""
    if config.retrieval is None or subject.config is None:
        return None
    tell("retrieval among held-out windows")
    try:
        found = score_run(subject.folder, split=config.retrieval.split, num_windows=config.retrieval.num_windows)
    except ConfigError as error:  # no checkpoint, snapshots moved, or nobody in the split: the rest still holds
        logger.warning("no retrieval: %s", error)
        return {"split": config.retrieval.split, "why_not": str(error)}
    return {"split": config.retrieval.split, "objective": subject.config.objective.kind, "scores": found}


def _describe_encoder(subject: Subject) -> dict[str, Any]:
    trained_on = []
    for source in subject.config.snapshots if subject.config else ():
        try:
            snapshot = load_snapshot(source.path)
        except ConfigError:
            continue
        trained_on.append(
            {
                "snapshot": folder_name(source.path),
                "digest": snapshot.digest,
                "recipe": snapshot.recipe["id"],
                "corpora": sorted(snapshot.corpora),
            }
        )
    return {
        "run": folder_name(str(subject.folder.absolute())),
        "kind": subject.card.kind,
        "parameters": sum(parameter.numel() for parameter in subject.encoder.parameters()),
        "step": subject.card.step,
        "sha256": subject.card.sha256,
        "objective": subject.config.objective.kind if subject.config else None,
        "pretrained_on": trained_on,
        "settings": subject.card.config,
    }
