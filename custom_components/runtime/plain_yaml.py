"""YAML as plain values: mappings with text keys, lists, texts, numbers, booleans and null, in bounded time.

PyYAML's safe loader also makes sets, dates and bytes, follows references that double at each step, and fails in its own
ways where nodes are nested deeply or refer to themselves.
"""

import re
from typing import Any

import yaml

# A file of this size takes PyYAML seconds.
MOST_YAML_BYTES = 2**18
# Counted as often as they are referred to. The largest config here has 150.
_MOST_NODES = 50_000
_MOST_LEVELS = 50
# No key takes a larger number, and Python refuses to write one of 4300 digits as text.
_MOST_DIGITS = 100
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge")}
_SURROGATE = re.compile("[\ud800-\udfff]")


class PlainLoader(yaml.SafeLoader):
    """SafeLoader that reads `2e-4` as a number, as YAML 1.2 and OmegaConf do; PyYAML's 1.1 rules need `2.0e-4`.

    Keys are text: `on`, `1` and `null` are names that no setting has, not True, a number and None.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                key_node.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


# Dates stay text: no key takes one, and OmegaConf has no dates.
PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:
    """Read one YAML document.

    Raises:
        ValueError: it is not valid, or has other values than plain ones; the message is one line.
    """
    return read_yaml_nodes(text)[1]


def read_yaml_nodes(text: str) -> tuple[yaml.Node | None, Any]:
    """Read one YAML document as its nodes, which know their lines, and as values. Raises as :func:`read_yaml` does."""
    if len(text) > MOST_YAML_BYTES:
        raise ValueError(f"its {len(text)} characters are more than such a file has")
    try:
        loader = PlainLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None, None
            _check(root, {}, 0)
            return root, loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _check(node: yaml.Node, sizes: dict[int, int], level: int) -> int:
    """Check a node and what is in it; return how many nodes it stands for.

    Args:
        sizes: of the nodes that are checked already, by their id; 0 for those that `node` is in.
    """
    if (known := sizes.get(id(node))) is not None:
        if known == 0:
            raise ValueError(f"line {node.start_mark.line + 1} refers to what it is in")
        return known
    line = f"line {node.start_mark.line + 1}"
    if node.tag not in _TAGS:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")[:80]
        raise ValueError(f"{line} is marked as {tag}; only texts, numbers, booleans, null, lists and mappings are read")
    if level > _MOST_LEVELS:
        raise ValueError(f"{line} is nested more than {_MOST_LEVELS} levels deep")
    sizes[id(node)] = 0
    size = 1
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, line)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"{line} has a key that is not a text")
            _check_scalar(key, line)
            size += _check(value, sizes, level + 1)
    else:
        size += sum(_check(item, sizes, level + 1) for item in node.value)
    if size > _MOST_NODES:
        raise ValueError(f"{line} stands for more than {_MOST_NODES} values, with all that it refers to")
    sizes[id(node)] = size
    return size


def _check_scalar(node: yaml.ScalarNode, line: str) -> None:
    if _SURROGATE.search(node.value):
        raise ValueError(f'{line} has half of a character, as "\\ud83d" is without its other half')
    if node.tag.endswith((":int", ":float")) and len(node.value) > _MOST_DIGITS:
        raise ValueError(f"{line} has a number of {len(node.value)} digits; put a text of digits in quotes")
