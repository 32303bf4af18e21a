# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""YAML with the line of each value, and keys that come twice refused (YAML itself lets the last one win in silence).

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import yaml

from ansible_collections.organism.proxmox.plugins.module_utils._catalog import CatalogError
from ansible_collections.organism.proxmox.plugins.module_utils._catalog_read import Lined, Problem


def load(text: str, name: str) -> Lined:
    """The only document of a text. Raises CatalogError."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise CatalogError([Problem(1, "", "the file is empty")], name)
        return _lined(loader, node, name)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        told = " ".join(str(part) for part in (error.context, error.problem) if part)
        raise CatalogError([Problem(line, "", f"this is no YAML: {told}")], name) from error
    finally:
        loader.dispose()


def _lined(loader: yaml.SafeLoader, node: yaml.Node, name: str) -> Lined:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        items: dict[str, Lined] = {}
        loader.flatten_mapping(node)  # merges <<
        own = len(node.value)
        for key_node, value_node in node.value[-own:]:
            key = str(loader.construct_object(key_node, deep=True))
            if key in items and items[key].line != value_node.start_mark.line + 1:
                told = f"{key} comes twice (first in line {items[key].line})"
                raise CatalogError([Problem(key_node.start_mark.line + 1, "", told)], name)
            value = _lined(loader, value_node, name)
            items[key] = Lined(value.value, key_node.start_mark.line + 1)
        return Lined(items, line)
    if isinstance(node, yaml.SequenceNode):
        return Lined([_lined(loader, each, name) for each in node.value], line)
    return Lined(loader.construct_object(node, deep=True), line)
