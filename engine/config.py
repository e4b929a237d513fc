"""What one conversion needs to know: sources, recipe, output, sizes, limits."""

import hmac
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from engine.storage import Location
from manifests.errors import ConfigError

_MIN_SALT_BYTES = 16
PUBLIC_SALT = "public"  # what a snapshot says of its salt where the lab gave none

# Part of every unit's id: raise it when the same input would give other bytes.
ENGINE_VERSION = 2


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """One corpus (shipped name or path of a YAML) and the folder or URL that holds its recordings.

    `split` is `strict` (by person and family), `published` (the corpus' official split) or the name of another
    split of the literature in its file; published splits may put a person on two sides.
    """

    corpus: str
    root: Location
    split: str = "strict"


class ConvertConfig(_Strict):
    """One conversion.

    Attributes:
        output: Folder of the snapshot, or its URL on an object store (`s3://bucket/folder`).
        recipe: Name of a shipped recipe, or path of a YAML.
        sources: Corpora with their folders; a corpus stands once.
        num_cpus: Converting actors; null = all cores.
        unit_bytes: Output of one unit in bytes, the piece of work that is committed at once.
        shard_bytes: Size in bytes above which a new shard begins.
        time_limit_s: Most seconds that one recording may take.
        memory_limit_gb: Most memory in GB that one recording may add to its process.
        quarantine_budget: Share of quarantined recordings above which the result is refused; recordings that
            a corpus lists as known bad do not count.
        seed: Order in which recordings are dealt to units.
        salt_file: File with a secret of the lab, at least 16 bytes (`openssl rand -hex 32`), readable on every node.
            With it persons, sessions, recordings and hashed splits become HMAC-SHA256, which nobody can guess
            without the secret; without it they are hashes that hide names from reading only, and that agree
            between labs: corpora that share persons then keep each person in one split. It stands in no output;
            another secret converts everything again.
        recheck: Read every committed shard again before the work begins, and convert the units of damaged ones again.
        replace: Allow this conversion to remove shards of the snapshot that stands in the output because settings
            differ from its own or recordings are gone. Without it such a conversion is refused.
        scratch: Folder on a local disk for spool files and copies of inputs from a store; null = `work` in a local
            output, the system's temporary folder for an output on a store. Each actor needs room for the output of
            one unit, one shard and the largest recording.
    """

    output: Location
    recipe: str
    sources: Annotated[list[Source], Field(min_length=1)]
    num_cpus: Annotated[int, Field(gt=0)] | None = None
    unit_bytes: Annotated[int, Field(gt=0)] = 1_000_000_000
    shard_bytes: Annotated[int, Field(gt=0)] = 256_000_000
    time_limit_s: Annotated[float, Field(gt=0)] = 600.0
    memory_limit_gb: Annotated[float, Field(gt=0)] = 4.0
    quarantine_budget: Annotated[float, Field(ge=0, le=1)] = 0.1
    seed: int = 0
    salt_file: Path | None = None
    recheck: bool = False
    replace: bool = False
    scratch: Path | None = None

    @field_validator("sources")
    @classmethod
    def _once(cls, value: list[Source]) -> list[Source]:
        names = [source.corpus for source in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"corpus {', '.join(twice)} stands twice; give each corpus one root")
        return value

    def salt(self) -> bytes:
        """Secret of `salt_file`; empty where none is given.

        Raises:
            ConfigError: The file cannot be read, or is too short to be a secret.
        """
        if self.salt_file is None:
            return b""
        try:
            salt = self.salt_file.read_bytes().strip()
        except OSError as error:
            raise ConfigError(f"salt_file {self.salt_file}: {error.strerror}; make it: openssl rand -hex 32") from None
        if len(salt) < _MIN_SALT_BYTES:
            raise ConfigError(
                f"salt_file {self.salt_file}: {len(salt)} bytes, a secret has at least {_MIN_SALT_BYTES}; "
                "make it: openssl rand -hex 32"
            )
        return salt

    def salt_fingerprint(self) -> str:
        """8 hex digits that tell one secret from another; empty for the public hash."""
        salt = self.salt()
        return hmac.digest(salt, b"kymo/fingerprint", "sha256").hex()[:8] if salt else ""
