"""A plan as a person reads it."""

from typing import Any

from lumina.runs.units import duration, flops_per_second, gib, si


def page(plan: dict[str, Any]) -> str:
    """The whole plan, as text."""
    parts = [head(plan), memory(plan), flops(plan), collectives(plan), roofline(plan), constants(plan)]
    return "\n\n".join(filter(None, parts))


def ranking(found: dict[str, Any]) -> str:
    """What a search found, best first."""
    rows = [
        ["mesh", "remat", "micro-batches", "estimate", "compiler", "fits", "step about", "at best", "in turn", "MFU at most"]
    ]
    for plan in found["plans"]:
        memory, told = plan["memory"], plan["roofline"]
        compiler = gib(memory["needed"]) if "state" in memory else ""
        verdict = "yes" if memory["fits"] else f"no, by {gib(memory['needed'] - memory['available'])}"
        rows.append(
            [
                mesh(plan),
                plan["remat"],
                str(plan["micro_batches"]),
                gib(memory["estimate"]["total"]),
                compiler,
                verdict,
                f"{told['expected']:.4g} s",
                f"{told['at_best']['seconds']:.4g} s",
                f"{told['in_turn']['seconds']:.4g} s",
                f"{told['at_best']['mfu']:.1%}",
            ]
        )
    lines = f"{found['config']} on {found['topology']}: {found['tried']} ways to split it fit by our estimate; the best:"
    return f"{lines}\n\n{table(rows)}\n\n{constants(found['plans'][0])}"


def mesh(plan: dict[str, Any]) -> str:
    """Axes of more than one device."""
    return " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"


def head(plan: dict[str, Any]) -> str:
    """What is planned, and whether it fits."""
    rows = f"{plan['rows']} rows of {plan['sequence_length']:,} tokens in {plan['micro_batches']} micro-batches"
    rows += f", remat {plan['remat']}"
    lines = [f"{plan['config']} on {plan['topology']}: mesh {mesh(plan)}; {rows}", f"compiled: {plan['compiled']}"]
    if plan.get("chosen"):
        lines.append("mesh: " + plan["chosen"].replace("\n", "\n  "))
    if kernels := plan.get("kernels"):
        lines += [f"{kernel['what']}: {kernel['form']} ({kernel['why']})" for kernel in kernels]
    return "\n".join([*lines, verdict(plan["memory"])])


def verdict(memory: dict[str, Any]) -> str:
    """Fits, or by how much it does not."""
    needed, available = memory["needed"], memory["available"]
    if memory["fits"] is None:
        return f"needs {gib(needed)} a device"
    if memory["fits"]:
        return f"fits: {gib(needed)} of {gib(available)} a device"
    return f"does not fit: {gib(needed)} a device, {gib(needed - available)} more than the {gib(available)} that there are"


def memory(plan: dict[str, Any]) -> str:
    """Bytes of one device, by part: ours and the compiler's side by side."""
    told = plan["memory"]
    state, compiler = told.get("state", {}), told.get("compiler", {})
    estimate = dict(told["estimate"])
    total = estimate.pop("total")
    rows = [["bytes a device", "estimate", "compiler"]]
    for part, size in estimate.items():
        exact = state.get(part)
        rows.append([part, gib(size), gib(exact) if exact is not None else "..." if compiler else ""])
    if compiler:
        rows.append(
            ["... the three together", gib(sum(estimate[p] for p in estimate if p not in state)), gib(compiler["temporaries"])]
        )
        rows.append(["batch, results and program", "", gib(compiler["total"] - compiler["temporaries"] - sum(state.values()))])
    return table([*rows, ["total", gib(total), gib(told["needed"]) if state else ""]])


def flops(plan: dict[str, Any]) -> str:
    """The same step by several counts."""
    told = plan["flops"]
    rows = [["FLOPs a step, all devices", ""], ["model (what MFU counts)", si(told["model"])]]
    rows.append(["executed, with recomputation and empty slots", si(told["executed"])])
    if "traced" in told:
        rows.append(["traced program", si(told["traced"])])
        rows.append(["compiler", si(told["compiler"]) if told["compiler"] else "none, as it does not fit"])
    return table(rows) + (f"\n{told['why']}" if "why" in told else "")


def collectives(plan: dict[str, Any]) -> str:
    """What one device sends in a step, by our account, with the traced program's totals beside."""
    if not plan["collectives"]:
        return ""
    rows = [["a device sends in a step", "by", "over", "bytes", "operations"]]
    rows += [[c["what"], c["kind"], "+".join(c["axes"]), gib(c["bytes"]), f"{c['count']:,}"] for c in plan["collectives"]]
    sums = [["in all", "over", "estimate", "traced"]]
    traced = plan.get("collectives_traced")
    for kind, axes in dict.fromkeys((c["kind"], tuple(c["axes"])) for c in [*plan["collectives"], *(traced or [])]):
        sizes = (sum_of(found, kind, axes) for found in (plan["collectives"], traced))
        sums.append([kind, "+".join(axes), *("" if size is None else gib(size) for size in sizes)])
    return table(rows) + "\n\n" + table(sums)


def sum_of(found: list[dict[str, Any]] | None, kind: str, axes: tuple[str, ...]) -> int | None:
    """Bytes of all collectives of a kind over the same axes."""
    return None if found is None else sum(c["bytes"] for c in found if c["kind"] == kind and tuple(c["axes"]) == axes)


def roofline(plan: dict[str, Any]) -> str:
    """Bounds of a step's time, and what the tokens take."""
    told = plan.get("roofline")
    if not told:
        return "roofline: none for this kind of device, as no datasheet holds for all"
    rows = [["a step takes at least", "seconds"]]
    rows += [[name, f"{told[name]:.4g}"] for name in ("compute", "memory", "links", "network")]
    header = ["", "step", "MFU at most", "tokens a day", f"{si(told['token_budget'])} tokens", "chip-hours"]
    later = [header]
    for name, words in (("at_best", f"all at the same time ({told['binding']} binds)"), ("in_turn", "one after the other")):
        each = told[name]
        later.append(
            [
                words,
                f"{each['seconds']:.4g} s",
                f"{each['mfu']:.1%}",
                si(each["tokens_a_day"]),
                duration(each["days"] * 86_400),
                si(each["chip_hours"]),
            ]
        )
    expected = f"expected, by which ways to split it are ranked: {told['expected']:.4g} s"
    return table(rows) + "\n\n" + table(later) + "\n" + expected


def constants(plan: dict[str, Any]) -> str:
    """What the bounds rest on."""
    told = plan["constants"]
    if not told["peak_flops"]:
        return ""
    memory, links, network = (
        f"{told[name] / 1e9:,.4g} GB/s" for name in ("memory_bandwidth", "link_bandwidth", "network_bandwidth")
    )
    figures = f"{flops_per_second(told['peak_flops'])} bfloat16, {gib(told['memory_bytes'])}, {memory} memory; it sends {links}"
    figures += f" over links, {network} over the network" if told["network_bandwidth"] else " over links"
    return f"a chip: {figures}\nsource: {told['source']}"


def table(rows: list[list[str]]) -> str:
    """Columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
