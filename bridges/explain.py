"""What a chain became in torch, as text."""

from torch import Tensor

from chainrule.bridges.group_tree import GroupTree


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"


def explain_group(index: int, leaves: list[Tensor], tree: GroupTree, *, passes: bool) -> str:
    """The report of one parameter group.

    Args:
      index: position of the group.
      leaves: the leaves of its state.
      tree: the group.
      passes: whether to tell what the passes did; the program is built if it was not.
    """
    elements = sum(p.numel() for p in tree.params)
    lines = [
        f"param group {index}: {len(tree.params)} parameters, {elements:,} elements, {tree.device}"
    ]
    lines.append(
        f"  hyperparameters: {', '.join(tree.hyperparameters.tensors)}"
        + ("; reads the loss" if tree.described.reads_value else "")
    )
    lines += tree.program.explained(len(tree.params))
    lines.append(f"  {'state':40}{'tensors':>12}{'memory':>14}")
    settable = set(tree.live.values())
    fields: dict[str, list[int]] = {}
    for i, (slot, leaf) in enumerate(zip(tree.described.slots, leaves, strict=True)):
        if i not in settable:
            fields.setdefault(slot.name, []).append(leaf.nbytes)
    for name, sizes in fields.items():
        lines.append(f"  {name:40}{len(sizes):>12,}{_size(sum(sizes)):>14}")
    total = sum(sum(sizes) for sizes in fields.values())
    lines.append(f"  {'total':40}{sum(map(len, fields.values())):>12,}{_size(total):>14}")
    if passes:
        lines += tree.program.passes()
    return "\n".join(lines)
