import pytest

from manifests.config import shipped_names, validate
from manifests.corpora import Corpus, load_corpus
from manifests.errors import ConfigError
from manifests.recipes import load_recipe
from manifests.tasks import TASKS_DIR, UNSCORED, Task, chosen_symbols, lacking, load_task, window_labels

BASE = {
    "id": "demo",
    "title": "Demo",
    "target": "stage",
    "labels": ["W", "N3"],
    "map": {"W": "W", "N3": "N3", "?": None},
    "kinds": ["eeg"],
    "min_channels": {"eeg": 1},
}


@pytest.mark.parametrize("name", shipped_names(TASKS_DIR))
def test_every_shipped_task_validates(name):

    from trainer.views import VIEWS

    task = load_task(name)
    assert isinstance(task, Task)
    assert task.view in VIEWS


def test_the_tasks_of_the_papers_and_those_of_the_data_at_hand_are_shipped():
    mteeg = {"tuab", "tuev", "seed_v", "chbmit", "sleep_edf", "physionet_mi"}
    wake = {"tusl", "ptbxl", "g12ec", "cpsc2018"}
    at_hand = {"sleep_staging", "wake_deep", "motor_imagery", "rhythm", "af"}
    assert mteeg | wake | at_hand == set(shipped_names(TASKS_DIR))


def labels_of(corpus: Corpus, target: str) -> set[str]:
    """Labels that a corpus file lets through to a window."""
    found = set()
    for rule in corpus.annotation_rules:
        if (rule.target == "stage") == (target == "stage"):
            found |= {label for label in (*rule.map.values(), rule.otherwise) if label is not None}
    return found


PAIRS = [(name, corpus) for name in shipped_names(TASKS_DIR) for corpus in load_task(name).corpora]


@pytest.mark.parametrize(("name", "corpus"), PAIRS)
def test_what_a_shipped_task_asks_of_a_corpus_its_file_offers(name, corpus):
    task, found = load_task(name), load_corpus(corpus)
    found.with_split(task.corpora[corpus] or "strict")
    offered = labels_of(found, task.target)
    listed = set(task.map) - {UNSCORED}
    others = {
        label for other in task.corpora if other != corpus for label in labels_of(load_corpus(other), task.target)
    }
    assert listed & offered, "the task reads nothing of this corpus"
    if task.target == "classes":  # a hypnogram of two stages serves a task of five
        assert listed <= offered | others
    reached = {task.map[label] for label in offered & listed} - {None}
    assert reached, "no class of the task occurs in this corpus"
    symbols = {symbol for symbol in found.channels.values() if symbol}
    if symbols:
        assert set(task.channels or ()) <= symbols
        assert not lacking(task, chosen_symbols(task, sorted(symbols)))


@pytest.mark.parametrize("name", shipped_names(TASKS_DIR))
def test_the_window_and_the_kinds_of_a_shipped_task_are_those_of_its_recipe(name):
    task = load_task(name)
    recipe = load_recipe(task.recipe)
    assert task.window_s == recipe.window_s
    assert set(task.min_channels) <= set(recipe.kinds)
    assert len({recipe.kinds[kind].rate_hz for kind in task.kinds}) == 1
    assert not recipe.is_native
    targets = {rule.target for corpus in task.corpora for rule in load_corpus(corpus).annotation_rules}
    assert recipe.place == "grid" or targets == {"events"}


@pytest.mark.parametrize("name", shipped_names(TASKS_DIR))
def test_the_best_step_is_chosen_as_the_papers_do(name):
    task = load_task(name)
    is_binary = task.loss == "bce" or len(task.labels) == 2 or name == "tusl"  # its study reports AUROC
    assert task.primary == ("auroc" if is_binary else "kappa")
    assert {"balanced_accuracy", "auroc", "auprc", "kappa", "weighted_f1"} <= set(task.metrics)
    assert (task.loss == "bce") == (len(task.labels) == 1 or name in {"ptbxl", "g12ec", "cpsc2018"})
    assert (task.cap_per_epoch == 0.1) == (name == "tuab")


def test_unscored_epoch_never_becomes_a_class():
    for name in ("sleep_staging", "wake_deep"):
        assert window_labels(load_task(name), stage="?", classes=()) is None

    with pytest.raises(ConfigError, match="unscored and must be null"):
        validate(Task, {**BASE, "map": {"W": "W", "N3": "N3", "?": "W"}}, where="x.yaml")


def test_wake_deep_takes_two_stages_only():
    task = load_task("wake_deep")
    assert [window_labels(task, stage=s, classes=()) for s in ("W", "N3", "N2", "R", None)] == [
        {"wake"}, {"deep"}, None, None, None,
    ]  # fmt: skip


def test_rhythm_reads_snomed_codes_and_sees_conflicts():
    task = load_task("rhythm")
    assert window_labels(task, stage=None, classes=["426783006", "55930002"]) == {"sinus"}
    assert window_labels(task, stage=None, classes=["164889003", "164890007"]) == {"af"}
    assert window_labels(task, stage=None, classes=["426177001", "426783006"]) == {"bradycardia", "sinus"}
    assert window_labels(task, stage="W", classes=["55930002"]) is None


YES_NO = {"target": "classes", "loss": "bce", "labels": ["af"], "map": {"afib": "af", "normal": None}}


def test_under_bce_a_label_mapped_to_null_is_a_no_and_an_unlisted_one_says_nothing():
    task = validate(Task, {**BASE, **YES_NO}, where="x.yaml")
    answers = [window_labels(task, stage="W", classes=c) for c in (["afib"], ["normal"], ["afib", "normal"], ["x"], [])]
    assert answers == [{"af"}, set(), {"af"}, None, None]
    several = validate(Task, {**BASE, **YES_NO, "labels": ["af", "x"], "map": {"afib": "af", "x": "x"}}, where="x.yaml")
    assert (task.is_exclusive, several.is_exclusive) == (True, False)
    assert window_labels(several, stage=None, classes=["afib", "x", "y"]) == {"af", "x"}


def test_an_unscored_epoch_is_no_no_either():
    stages = {"loss": "bce", "labels": ["deep"], "map": {"N3": "deep", "W": None, "?": None}}
    task = validate(Task, {**BASE, **stages}, where="x.yaml")
    assert [window_labels(task, stage=s, classes=()) for s in ("N3", "W", "?", None)] == [{"deep"}, set(), None, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["W", "N3", "R"]}, "come from no raw label"),
        ({"labels": ["W"], "map": {"W": "W"}}, "two labels or more"),
        ({"map": {"W": "W", "N3": "N3", "Wake": "W"}}, "not among the stages"),
        ({"min_channels": {"emg": 1}}, "name one or more of the kinds"),
        ({"kinds": ["meg"]}, "expected some of"),
        ({"id": "Demo"}, "pattern"),
        ({"id": "a/b"}, "pattern"),
        ({"channels": ["eeg:C3-M2"], "min_channels": {"eeg": 2}}, "channels offers 1"),
        ({"class_weights": {"W": 1.0}}, "a weight to each"),
        ({"lables": []}, "nearest: labels"),
        ({**YES_NO, "map": {"afib": "af"}}, "needs a raw label that means no"),
        ({"loss": "bce", "labels": ["N3"], "map": {"N3": "N3", "?": None}}, "needs a raw label that means no"),
        ({"primary": "macro_f1"}, "'macro_f1' is not among the metrics balanced_accuracy"),
        ({"metrics": ["accuracy"]}, "balanced_accuracy"),
        ({"window_s": 0}, "greater than 0"),
        ({"cap_per_epoch": 1.5}, "less than or equal to 1"),
    ],
)
def test_faults_are_named(change, message):

    with pytest.raises(ConfigError, match=message):
        validate(Task, {**BASE, **change}, where="x.yaml")


def test_unknown_task_names_the_nearest_or_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"did you mean sleep_staging"):
        load_task("sleep_stagin")
    with pytest.raises(ConfigError, match=r"known: .*sleep_staging"):
        load_task("zzz")


def test_channels_are_chosen_by_kind_and_by_symbol():
    task = load_task("sleep_staging")
    symbols = ["eeg:C3-M2", "eog:E1-M2", "ecg:II"]
    assert chosen_symbols(task, symbols) == {"eeg": ["eeg:C3-M2"], "eog": ["eog:E1-M2"], "emg": []}
    assert lacking(task, chosen_symbols(task, symbols)) == {}
    assert lacking(task, chosen_symbols(task, ["ecg:II"])) == {"eeg": 1}
    narrow = task.model_copy(update={"channels": ["eeg:C4-M1"]})
    assert lacking(narrow, chosen_symbols(narrow, symbols)) == {"eeg": 1}
