"""YAML in, a validated configuration out, and the header that every run folder starts with.

The loader follows the YAML 1.2 core schema and refuses duplicate keys: under PyYAML's default rules `3e-4`
is a string, `22:30` is 1350, `no` is False, and the last of two equal keys wins in silence.
"""

import difflib
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ValidationError

from manifests.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=BaseModel)

PACKAGES = ("adapters", "engine", "jobs", "manifests", "trainer")


# libyaml reads the channel table in a tenth of the time, which every process spends at its start.
_Loader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _CoreLoader(_Loader):
    """SafeLoader with the scalars of the YAML 1.2 core schema and no duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002 (PyYAML's signature)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} stands twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), [*_first])
_CoreLoader.yaml_implicit_resolvers.setdefault("", []).append(
    ("tag:yaml.org,2002:null", re.compile(r"^$"))  # an empty value is null
)
_CoreLoader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda _, node: int(node.value, 0) if re.match(r"0[ox]", node.value) else int(node.value),
)
_CoreLoader.add_constructor(
    "tag:yaml.org,2002:float",
    lambda _, node: float(re.sub(r"\.(inf|nan)$", r"\1", node.value.lower())),
)


def parse_yaml(text: str, *, where: str) -> Any:
    """Value of a YAML text under the 1.2 core schema; `where` names it in errors."""
    try:
        return yaml.load(text, Loader=_CoreLoader)  # noqa: S506 (a SafeLoader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Mapping in a YAML file."""
    path = Path(path) if isinstance(path, str) else path  # a UPath stays one
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is no text; give the path of a YAML file") from None
    value = parse_yaml(text, where=str(path))
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a {type(value).__name__}, a mapping of keys is expected")
    return cast("dict[str, Any]", value)


def dump_yaml(value: Any) -> str:
    """YAML text of plain data, keys in their order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Copy of `data` with each `a.b=value` set, the value read as YAML; `a.0.b` reaches into a list."""
    result = json.loads(json.dumps(data))
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise ConfigError(f"override {override!r}: expected key=value, for example optimizer.lr=3e-4")
        *parents, last = dotted.split(".")
        node: Any = result
        for parent in parents:
            node = _child(node, parent, override)
        value = parse_yaml(text, where=f"override {override!r}")
        if isinstance(node, list):
            node[_list_index(node, last, override)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise ConfigError(f"override {override!r}: {parents[-1]!r} is a value, not a section")
    return result


def _child(node: Any, name: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, name, override)]
    if isinstance(node, dict):
        return node.setdefault(name, {})
    raise ConfigError(f"override {override!r}: nothing can stand below {name!r}; its parent is a value")


def _list_index(node: list[Any], name: str, override: str) -> int:
    if not name.isdecimal() or int(name) >= len(node):
        raise ConfigError(f"override {override!r}: {name!r} is no index of a list of {len(node)}; count from 0")
    return int(name)


def _field_names(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Valid keys of the section that holds the last item of `location`, as far as the types tell."""
    current: list[type[BaseModel]] = [model]
    for part in location[:-1]:
        following: list[type[BaseModel]] = []
        for candidate in current:
            if candidate.__name__ == part:  # a union's member
                following.append(candidate)
            field = candidate.model_fields.get(str(part))
            if field is not None:
                following.extend(_models_in(field.annotation))
        current = following or current
    return sorted({name for candidate in current for name in candidate.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    lines: list[str] = []
    listed: set[str] = set()
    for item in error.errors():
        dotted = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            valid = _field_names(model, item["loc"])
            near = difflib.get_close_matches(str(item["loc"][-1]), valid, n=3, cutoff=0.5)
            keys = ", ".join(valid)
            if near:
                hint = f"; nearest: {', '.join(near)}"
            elif keys in listed:  # once is enough
                hint = ""
            else:
                hint = f"; valid keys: {keys}"
                listed.add(keys)
            lines.append(f"{where}: {dotted}: no such key{hint}")
        elif item["type"] == "missing":
            lines.append(f"{where}: {dotted}: this key is required; add it")
        else:
            lines.append(f"{where}: {dotted}: {item['input']!r}: {item['msg']}")
    return "\n".join(lines)


def validate(model: type[ConfigT], data: Mapping[str, Any], *, where: str) -> ConfigT:
    """`data` as a `model`; a ConfigError lists every fault with the nearest valid keys."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, model, where)) from None


def load_config(model: type[ConfigT], path: Path | str, overrides: Sequence[str] = ()) -> ConfigT:
    """Configuration read from a YAML file; precedence: defaults < YAML < `key=value` overrides.

    Raises:
        ConfigError: A file that cannot be read, a wrong key or a wrong value.
    """
    return validate(model, apply_overrides(read_yaml(path), overrides), where=str(path))


def shipped_names(folder: Path) -> tuple[str, ...]:
    """Names of the YAML files that ship in a folder, sorted."""
    return tuple(sorted(path.stem for path in folder.glob("*.yaml")))


def load_shipped(model: type[ConfigT], folder: Path, name_or_path: str | Path, *, noun: str) -> ConfigT:
    """Configuration by the name of a file that ships in `folder`, or by the path of one's own YAML.

    Args:
        model: Has a field `id`, which in a shipped file equals the file's name.
        folder: Folder of the shipped files.
        name_or_path: Anything that does not end in `.yaml` is a name.
        noun: What it is, for errors.

    Raises:
        ConfigError: Nothing of that name, or a file that breaks the schema.
    """
    path = Path(name_or_path)
    if path.suffix != ".yaml":
        path = folder / f"{name_or_path}.yaml"
        if not path.exists():
            names = shipped_names(folder)
            near = difflib.get_close_matches(str(name_or_path), names, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)};"
            raise ConfigError(f"{noun} {str(name_or_path)!r}: not shipped; {hint} or give the path of a YAML file")
    loaded = load_config(model, path)
    if path.parent == folder and getattr(loaded, "id", None) != path.stem:
        raise ConfigError(f"{path}: id {getattr(loaded, 'id', None)!r} differs from the file's name")
    return loaded


def digest(value: Any) -> str:
    """SHA-256 (hex) of plain data as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def code_digest() -> str:
    """SHA-256 (hex) over the source files and tables of the five packages."""
    root = Path(__file__).resolve().parent.parent
    sha = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in {".py", ".yaml"}:
                sha.update(path.relative_to(root).as_posix().encode())
                sha.update(path.read_bytes())
    return sha.hexdigest()


def code_version() -> dict[str, str]:
    """What ran: package version, digest of the sources, git revision if there is one, interpreter."""
    root = Path(__file__).resolve().parent.parent
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        version = metadata.version("kymo")
    except metadata.PackageNotFoundError:  # a Ray job ships the folder, not the distribution
        version = "unknown"
    return {
        "kymo": version,
        "code_digest": code_digest(),
        "git": git.stdout.strip() or "unknown",
        "python": platform.python_version(),
    }


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file beside `path`, flush it to the disk, and rename it into place; on a store write the object.

    An object (`path` is a `upath.UPath`) appears whole or not at all.
    """
    if not isinstance(path, Path):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk needs the room
        raise


def start_run(run_dir: Path | str, config: BaseModel) -> None:
    """Write the resolved `config.yaml` and `version.json` into a run folder, before anything else.

    A file that says the same already is left alone, so that a rerun with nothing to do touches nothing.
    """
    header = {
        "config.yaml": dump_yaml(config.model_dump(mode="json")),
        "version.json": json.dumps(code_version(), indent=2) + "\n",
    }
    for name, text in header.items():
        path = (Path(run_dir) if isinstance(run_dir, str) else run_dir) / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_atomically(path, text)
