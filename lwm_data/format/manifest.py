"""How both packages read a manifest: YAML to a frozen pydantic model, with errors a person can act on.

demo.yaml:7: sources.0.tokns: unknown key; wanted one of: name, type, path, tokens (did you mean `tokens`?)
     |    |  |               |
     file |  key             got and wanted
          line
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo

SECRET = (("endpoint",), ("endpoint", "url"), ("endpoint", "key_env"))  # keys whose values no message repeats
MAX_BYTES = 4 << 20  # of a manifest; what people write is some kB


class ManifestModel(BaseModel):
    """Base of every model that a person fills in: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _absolute(value: str, info: ValidationInfo) -> str:
    folder = (info.context or {}).get("folder")
    if "://" in value or folder is None:
        return value
    return os.path.abspath(Path(folder) / Path(value).expanduser())


ManifestPath = Annotated[str, AfterValidator(_absolute)]
"""A path or fsspec URL; a relative path is relative to the manifest's own folder."""


def read_manifest(
    path: str | Path, kinds: Mapping[str, type[ManifestModel]], overrides: Sequence[str] = ()
) -> ManifestModel:
    """The manifest at `path`, as the model that its `kind:` names; `overrides` are `key.path=yaml value`.

    Relative paths, those in `overrides` too, are relative to the manifest's folder.
    ValueError names file, line, key, got and wanted; several errors come one per line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such manifest")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes; a manifest has at most {MAX_BYTES:,}")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: wanted `key: value` lines, got {'nothing' if root is None else root.tag}")
    lines: dict[tuple[str | int, ...], int] = {}
    data = _plain(root, (), lines, path, set())
    for override in overrides:
        _override(data, override)
    kind = data.get("kind")
    if kind not in kinds:
        at = lines.get(("kind",))
        raise ValueError(f"{path}{f':{at}' if at else ''}: kind: got {kind!r}; wanted {' or '.join(sorted(kinds))}")
    try:
        return kinds[kind].model_validate(data, context={"folder": path.parent})
    except ValidationError as error:
        raise ValueError("\n".join(_explain(path, lines, data, e, kinds[kind]) for e in _causes(error))) from None


def quoted(text: str) -> str:
    """`text` as a YAML scalar of one line, which `read_manifest` gives back as it is."""
    return str(yaml.dump(text, default_style='"', allow_unicode=True, width=float("inf"))).rstrip("\n")


def _plain(node: yaml.Node, key: tuple[str | int, ...], lines: dict[Any, int], path: Path, seen: set[int]) -> Any:
    """The node as dicts, lists and scalars; `lines` gets each key's line. Aliases are refused: a short file of
    nested aliases can stand for more memory than there is."""
    line = node.start_mark.line + 1
    lines.setdefault(key, line)
    if id(node) in seen:
        raise ValueError(f"{path}:{line}: YAML aliases (`*name`) are not supported; write the value out")
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            name = str(key_node.value)
            if name in mapping:
                raise ValueError(f"{path}:{key_node.start_mark.line + 1}: {name}: given twice")
            lines[(*key, name)] = key_node.start_mark.line + 1
            mapping[name] = _plain(value_node, (*key, name), lines, path, seen)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*key, i), lines, path, seen) for i, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    try:
        value = yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}:{line}: {'.'.join(map(str, key))}: {error}") from error
    if isinstance(value, str):
        try:  # YAML 1.1 takes 3e-4 for text; a person means a number, unless it stands in quotes
            return float(value) if node.style is None and value[:1] in "0123456789.+-" else value
        except ValueError:
            return value
    return value


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {override}: wanted key=value, for instance --set row_length=4096")
    try:
        value = _plain(
            yaml.compose(text, Loader=yaml.SafeLoader) or yaml.ScalarNode("tag:yaml.org,2002:null", ""),
            (),
            {},
            Path("--set"),
            set(),
        )
    except yaml.YAMLError as error:
        raise ValueError(f"--set {override}: {text!r} is not YAML: {error}") from error
    place: Any = data
    *parents, last = key.split(".")
    for name in parents:
        if isinstance(place, list) and name.isdigit() and int(name) < len(place):
            place = place[int(name)]
        elif isinstance(place, dict):
            place = place.setdefault(name, {})
        else:
            raise ValueError(f"--set {override}: there is no `{name}` to set a key of")
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise ValueError(f"--set {override}: `{'.'.join(parents)}` has no key `{last}`")


def _causes(error: ValidationError) -> list[Any]:
    """pydantic's errors, but those of a list that is too short only because an item of it is wrong."""
    errors = error.errors()
    lists_of_wrong = {e["loc"][:n] for e in errors for n in range(len(e["loc"]))}
    return [e for e in errors if e["type"] != "too_short" or e["loc"] not in lists_of_wrong]


def _explain(
    path: Path, lines: Mapping[tuple[str | int, ...], int], data: Any, error: Any, model: type[BaseModel]
) -> str:
    """One pydantic error as `file:line: key: got ..., wanted ...`."""
    key = tuple(part for part in _in_data(error["loc"], data))
    line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
    where = f"{path}{f':{line}' if line else ''}: {'.'.join(map(str, key)) or 'manifest'}"
    if error["type"] == "extra_forbidden":
        names = _known_keys(model, key[:-1], data)
        close = difflib.get_close_matches(str(key[-1]), names, n=1)
        hint = f" (did you mean `{close[0]}`?)" if close else ""
        return f"{where}: unknown key; wanted one of: {', '.join(names)}{hint}"
    if error["type"] == "missing":
        return f"{where}: missing; it has no default"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    of_model = error["type"] == "value_error" and isinstance(error["input"], dict)  # its input is all that stands in it
    got = "" if of_model or key in SECRET else f"got {error['input']!r}; "
    return f"{where}: {got}wanted {message}"


def _in_data(loc: Sequence[str | int], data: Any) -> list[str | int]:
    """`loc` without the names that pydantic adds for the members of a union; they are no keys of the file."""
    key: list[str | int] = []
    place = data
    for i, part in enumerate(loc):
        if isinstance(place, dict) and part in place:
            place = place[str(part)]
        elif isinstance(place, list) and isinstance(part, int) and part < len(place):
            place = place[part]
        elif i < len(loc) - 1 or (isinstance(place, dict) and place.get("type") == part):
            continue
        key.append(part)
    return key


def _known_keys(model: Any, key: Sequence[str | int], data: Any) -> list[str]:
    """The keys that a person may write at `key`, by the models; for a union, those of the member of its `type`."""
    annotation = model
    for part in key:
        if isinstance(part, str):
            model = _model_in(annotation, data)
            if model is None or part not in model.model_fields:
                return []
            annotation = model.model_fields[part].annotation
        data = data[part]
    model = _model_in(annotation, data)
    return list(model.model_fields) if model is not None else []


def _model_in(annotation: Any, data: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [m for m in map(lambda a: _model_in(a, data), get_args(annotation)) if m is not None]
    if len(found) > 1 and isinstance(data, dict):
        for model in found:
            field = model.model_fields.get("type")
            if field and get_origin(field.annotation) is Literal and data.get("type") in get_args(field.annotation):
                return model
    return found[0] if found else None
