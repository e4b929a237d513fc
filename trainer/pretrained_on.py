"""What an encoder was pretrained on: snapshots, corpora with their licences and hours, persons as hashes."""

from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from manifests.errors import ConfigError, ContractError
from manifests.shards import SAMPLES_FILE, load_snapshot
from trainer.config import PretrainConfig
from trainer.storage import location

pc: Any = pyarrow.compute  # its functions are made at run time
CORPUS_FACTS = ("title", "licence", "access_kind", "citation")
_COLUMNS = ["corpus", "subject", "split", "length", "rate_num", "rate_den"]


class PretrainedOn(BaseModel):
    """Part of an encoder's card. Filters of single windows are not looked at: what could have been drawn counts.

    Attributes:
        split: Split of the snapshots that was trained on.
        snapshots: Their digests.
        corpora: Corpus to title, licence, access_kind, citation, `windows`, `hours`, `subjects` (a number).
        subjects: Corpus to hashed subjects; null in a bundle, which goes to strangers.
        unknown: Why some or all of it is not known.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    split: str
    snapshots: list[str] = []
    corpora: dict[str, dict[str, Any]] = {}
    subjects: dict[str, list[str]] | None = None
    unknown: list[str] = []

    def without_subjects(self) -> "PretrainedOn":
        """The same for strangers: numbers, no hashes."""
        return self.model_copy(update={"subjects": None})


def read_pretrained_on(config: PretrainConfig) -> PretrainedOn:
    """Corpora and persons of a run's snapshots, as far as they still lie where its configuration says."""
    corpora: dict[str, dict[str, Any]] = {}
    subjects: dict[str, set[str]] = {}
    digests: list[str] = []
    unknown: list[str] = []
    for source in config.snapshots:
        folder = location(source.path)
        try:
            snapshot = load_snapshot(folder)
        except (ConfigError, ContractError):
            unknown.append(f"snapshot {folder.name} of the pretraining is not there any more")
            continue
        digests.append(snapshot.digest)
        with (folder / SAMPLES_FILE).open("rb") as file:
            table = pq.read_table(file, columns=_COLUMNS)
        table = table.filter(pc.equal(table["split"], config.split))
        for corpus in sorted(pc.unique(table["corpus"]).to_pylist()):
            if config.filter.corpora is not None and corpus not in config.filter.corpora:
                continue
            part = table.filter(pc.equal(table["corpus"], corpus))
            facts = {key: value for key in CORPUS_FACTS if (value := snapshot.corpora.get(corpus, {}).get(key))}
            entry = corpora.setdefault(corpus, {**facts, "windows": 0, "hours": 0.0})
            entry["windows"] += len(part)
            entry["hours"] = round(entry["hours"] + _hours(part), 3)
            subjects.setdefault(corpus, set()).update(pc.unique(part["subject"]).to_pylist())
            entry["subjects"] = len(subjects[corpus])
    return PretrainedOn(
        split=config.split,
        snapshots=digests,
        corpora=corpora,
        subjects={corpus: sorted(found) for corpus, found in subjects.items()},
        unknown=unknown,
    )


def _hours(table: pa.Table) -> float:
    ticks = pc.multiply(pc.cast(table["length"], pa.float64()), table["rate_den"])
    return float(pc.sum(pc.divide(ticks, table["rate_num"])).as_py() or 0.0) / 3600
