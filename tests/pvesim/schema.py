# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The API's own schema: which methods there are, and whether a request's parameters pass PVE::JSONSchema.

The dump is not kept in this repository; ORGANISM_PVE_API_SCHEMA names the file. Without it nothing is checked, and
the simulator says so when it starts and in every answer (header ``X-Pvesim-Unchecked``).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import Unknown, bad_parameters
from .formats import FORMATS, FormatError

VARIABLE = "ORGANISM_PVE_API_SCHEMA"

INDEXES = {
    "hostpci": 16,
    "ide": 4,
    "ipconfig": 32,
    "net": 32,
    "numa": 8,
    "parallel": 3,
    "sata": 6,
    "scsi": 31,
    "serial": 4,
    "unused": 256,
    "usb": 14,
    "virtio": 16,
    "virtiofs": 10,
}
"""How many of an option ``NAME[n]`` there are: the dump names it once (PVE::QemuServer and its Drive, PCI, USB)."""

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True)
class Method:
    """One method of the API. ``info``: its part of the dump."""

    verb: str
    template: str
    info: Mapping[str, Any]

    @property
    def parameters(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.info.get("parameters", {})
        return found


class Schema:
    """Methods by path, and checks of parameters."""

    def __init__(self, dump: Mapping[str, Any]) -> None:
        self.formats: Mapping[str, Any] = dump["formats"]
        self.methods: dict[tuple[str, str], Method] = {}
        for node in _walk(dump["tree"]):
            for verb, info in node.get("info", {}).items():
                self.methods[verb, node["path"]] = Method(verb, node["path"], info)

    @classmethod
    def load(cls, path: str | None = None) -> Schema | None:
        """The schema of the variable's file, or None without one."""
        named = path or os.environ.get(VARIABLE)
        return cls(json.loads(Path(named).read_text(encoding="utf-8"))) if named else None

    def find(self, verb: str, template: str) -> Method | None:
        return self.methods.get((verb, template))

    def check(self, method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters in their types. Raises 400 with all complaints, 501 for a format that has no check here."""
        schema = method.parameters
        if set(schema) - {"additionalProperties", "properties", "type"}:
            raise Unknown(f"the parameters of {method.verb} {method.template} (schema of kind {sorted(schema)})")
        errors: dict[str, str] = {}
        properties = expanded(json.dumps(schema.get("properties", {}), sort_keys=True))
        values = dict(given)
        for name, prop in properties.items():
            if (alias := prop.get("alias")) and name in values:
                values[alias] = values.pop(name)
        done = self._object("", properties, values, errors)
        if errors:
            raise bad_parameters(errors)
        return done

    # ---- one value ---------------------------------------------------------------------------------------------------

    def _object(
        self, path: str, properties: Mapping[str, Any], values: Mapping[str, Any], errors: dict[str, str]
    ) -> dict[str, Any]:
        done: dict[str, Any] = {}
        for name, prop in properties.items():
            at = f"{path}.{name}" if path else name
            if prop.get("alias"):
                continue
            if name not in values:
                if not prop.get("optional"):
                    errors[at] = "property is missing and it is not optional"
                continue
            done[name] = self._value(at, prop, values[name], errors)
            needed = prop.get("requires")
            if isinstance(needed, str) and needed not in values:
                errors[f"{path}.{needed}" if path else needed] = f"missing property required by '{at}'"
        for name in values:
            if name not in properties:
                errors[f"{path}.{name}" if path else name] = (
                    "property is not defined in schema and the schema does not allow additional properties"
                )
        return done

    def _value(self, path: str, prop: Mapping[str, Any], value: Any, errors: dict[str, str]) -> Any:
        if "oneOf" in prop:
            raise Unknown(f"the parameter {path}, whose type depends on another one")
        kind = prop.get("type")
        if kind == "array":
            items = value if isinstance(value, list) else [value]
            return [self._value(f"{path}[{i}]", prop.get("items", {}), each, errors) for i, each in enumerate(items)]
        if isinstance(value, list):
            errors[path] = f"type check ('{kind}') failed - got ARRAY"
            return value
        text = str(value)
        typed, wrong = _typed(kind, text)
        if wrong:
            errors[path] = wrong
            return value
        complaint = self._format(path, prop.get("format"), text) or _limits(prop, text, typed)
        if complaint:
            errors[path] = complaint
        return typed

    def _format(self, path: str, named: Any, text: str) -> str | None:
        try:
            self._check_format(path, named, text)
        except FormatError as error:
            return f"invalid format - {error}"
        return None

    def _check_format(self, path: str, named: Any, text: str) -> None:
        if named is None:
            return
        if isinstance(named, dict):
            self.property_string(path, named, text)
            return
        base, _, suffix = (named, "", "") if named in FORMATS else named.rpartition("-")
        if suffix in ("list", "opt"):
            for each in re.split(r"[,;\s\0]+", text) if suffix == "list" else [text]:
                if each:
                    self._named(path, base, each)
            return
        self._named(path, named, text)

    def _named(self, path: str, name: str, text: str) -> None:
        if isinstance(self.formats.get(name), dict):
            self.property_string(path, self.formats[name], text)
        elif name in FORMATS:
            FORMATS[name](text)
        else:
            raise Unknown(f"the format {name} of the parameter {path}")

    def property_string(self, path: str, schema: Mapping[str, Any], text: str) -> dict[str, Any]:
        """As PVE::JSONSchema::parse_property_string, aliases resolved. Raises FormatError."""
        found: dict[str, str] = {}
        for part in text.split(","):
            if not part.strip():
                continue
            matched = re.fullmatch(r"([^=]+)=(.+)", part, re.DOTALL)
            if matched:
                _put(found, schema, matched[1], matched[2])
            elif "=" in part:
                raise FormatError("missing key in comma-separated list property\n")
            else:
                default = next((k for k, s in schema.items() if s.get("default_key")), None)
                if default is None:
                    raise FormatError("value without key, but schema does not define a default key\n")
                if default in found:
                    raise FormatError(f"duplicate key in comma-separated list property: {default}\n")
                found[default] = part
        errors: dict[str, str] = {}
        done = self._object(path, {k: s for k, s in schema.items() if not s.get("alias")}, found, errors)
        if errors:
            listed = "".join(f"{name}: {said}\n" for name, said in sorted(errors.items()))
            raise FormatError(f"format error\n{listed}")
        return done


def _put(found: dict[str, str], schema: Mapping[str, Any], key: str, value: str) -> None:
    if key in found:
        raise FormatError(f"duplicate key in comma-separated list property: {key}\n")
    prop = schema.get(key)
    if prop and (alias := prop.get("alias")):
        if named := prop.get("keyAlias"):
            if named in found:
                raise FormatError(f"key alias '{named}' is already defined\n")
            found[named] = key
        if alias in found:
            raise FormatError(f"key '{alias}' is already defined (via alias)\n")
        key = alias
    if key not in schema:
        raise FormatError(f"invalid key in comma-separated list property: {key}\n")
    found[key] = value


def _typed(kind: Any, text: str) -> tuple[Any, str | None]:
    wrong = f"type check ('{kind}') failed - got '{text}'"
    if kind == "boolean":
        if text.lower() in _TRUE:
            return 1, None
        return (0, None) if text.lower() in _FALSE else (text, wrong)
    if kind == "integer":
        return (int(text), None) if re.fullmatch(r"[+-]?\d+", text) else (text, wrong)
    if kind == "number":
        return (float(text), None) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", text) else (text, wrong)
    return text, None


def _limits(prop: Mapping[str, Any], text: str, typed: Any) -> str | None:
    pattern = prop.get("pattern")
    if pattern and not re.fullmatch(_perl(pattern), text):
        return "value does not match the regex pattern"
    if "maxLength" in prop and len(text) > prop["maxLength"]:
        return f"value may only be {prop['maxLength']} characters long"
    if "minLength" in prop and len(text) < prop["minLength"]:
        return f"value must be at least {prop['minLength']} characters long"
    if isinstance(typed, int | float):
        if "maximum" in prop and typed > prop["maximum"]:
            return f"value must have a maximum value of {prop['maximum']}"
        if "minimum" in prop and typed < prop["minimum"]:
            return f"value must have a minimum value of {prop['minimum']}"
    if "enum" in prop and text not in prop["enum"]:
        return f"value '{text}' does not have a value in the enumeration '{', '.join(prop['enum'])}'"
    return None


@cache
def _perl(pattern: str) -> re.Pattern[str]:
    """A Perl pattern for Python: ``(?^:...)`` and ``(?^i:...)`` are groups whose flags begin anew."""
    text = re.sub(r"\(\?\^([a-z]*):", lambda found: f"(?{found[1].replace('u', '')}:", pattern)
    return re.compile(text.replace(r"\z", r"\Z"))


@cache
def expanded(properties: str) -> dict[str, Any]:
    """Properties (as JSON) with ``net[n]`` written out as ``net0`` to the last there is."""
    found: dict[str, Any] = {}
    for name, prop in json.loads(properties).items():
        if name.endswith("[n]"):
            base = name.removesuffix("[n]")
            for index in range(INDEXES.get(base, 1)):
                found[f"{base}{index}"] = prop
        else:
            found[name] = prop
    return found


def _walk(tree: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for node in tree:
        yield node
        yield from _walk(node.get("children", []))
