"""Names of variables that do not depend on what else a process built."""

import collections
import re


def canonical(paths: list[str]) -> list[str]:
    """Renumbers Keras's automatic names as a fresh process would give them.

    Keras counts layers through the life of a process (`dense_7`); here each parent
    counts its own children, in order: `dense`, `dense_1`.
    """
    children: dict[tuple[str, ...], dict[str, str]] = {}
    names = []
    for path in paths:
        parent: tuple[str, ...] = ()
        canonical = []
        for part in path.split("/"):
            known = children.setdefault(parent, {})
            if part not in known:
                base = re.sub(r"_\d+$", "", part)
                count = sum(re.sub(r"_\d+$", "", other) == base for other in known)
                known[part] = f"{base}_{count}" if count else base
            canonical.append(known[part])
            parent += (part,)
        names.append("/".join(canonical))
    seen: collections.Counter[str] = collections.Counter()
    for number, name in enumerate(names):
        seen[name] += 1
        if seen[name] > 1:
            names[number] = f"{name}#{seen[name]}"
    return names
