"""Tables of stored runs, as Markdown. Standard library only."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.contestants import FLOOR, LAX, OTHER_FRAMEWORKS, OURS, TORCH
from benchmarks.orchestrate import Record

Run = dict[str, Any]
ROUNDING = {"float32": 1e-4, "bfloat16": 3e-2, "tf32": 3e-3}
"""Relative errors that summation in another order, or rounding of the result, explains."""

TITLES = {
    "cases-default": "Cases, default allocator",
    "cases-keep": "Cases, heap keeps its pages",
    "convolutions": "Ordinary convolutions",
    "network": "A training step of the demo's U-Net",
    "volume": "Time against volume",
    "gpu": "Cases on a GPU",
}


class Results:
    """The records of a run by case, kind and contestant."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.records: dict[tuple[str, str, str], Record] = {
            (record["case"], record["kind"], record["contestant"]): record for record in run["results"]
        }
        self.cases = [case["name"] for case in run["cases"]]
        self.kinds = list(dict.fromkeys(record["kind"] for record in run["results"]))
        self.contestants: list[str] = run["contestants"]
        self.ours = self.contestants[0]

    def time(self, case: str, kind: str, contestant: str) -> float | None:
        """The median in seconds, or None where it was not timed."""
        return self.records.get((case, kind, contestant), {}).get("median")

    def best(self, case: str, kind: str, among: Sequence[str]) -> tuple[str, float] | None:
        """The quickest of some contestants and its time."""
        times = [(time, name) for name in among if (time := self.time(case, kind, name)) is not None]
        return (min(times)[1], min(times)[0]) if times else None

    def ratio(self, case: str, kind: str, contestant: str) -> float | None:
        """A contestant's time as a multiple of ours."""
        own, other = self.time(case, kind, self.ours), self.time(case, kind, contestant)
        return other / own if own and other is not None else None


def table(header: Sequence[str], rows: Iterable[Sequence[str]], rest: str = "---:") -> str:
    """Markdown, with the first column aligned left and the ``rest`` right."""
    lines = [header, ["---"] + [rest] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, form: str = "{:.2f}") -> str:
    return "" if value is None else form.format(value)


def milliseconds(seconds: float | None) -> str:
    """Three figures, or so."""
    if seconds is None:
        return ""
    digits = 2 - math.floor(math.log10(max(1e3 * seconds, 1e-3)))
    return f"{1e3 * seconds:.{max(0, digits)}f}"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} x"


def summary(results: Results, kind: str) -> str:
    """Per case: our time, and the best peer's, jax.lax's and the floor's beside it."""
    rows = []
    for case in results.cases:
        best = results.best(case, kind, OTHER_FRAMEWORKS)
        cells = [milliseconds(results.time(case, kind, OURS)), times(over_best_peer(results, case, kind))]
        cells += [best[0] if best else "", times(lax_over_ours(results, case, kind))]
        cells += [times(over_floor(results, case, kind)), times(peer_over_floor(results, case, kind))]
        rows.append([case, *cells])
    heads = ["ours, ms", "ours / best peer", "best peer", "jax.lax / ours", "ours / floor", "best peer / floor"]
    return table([kind, *heads], rows)


def ratios(results: Results, kind: str) -> str:
    """Per case: every contestant's time as a multiple of ours, and the better of the two PyTorch."""
    names = [name for name in results.contestants if name != results.ours]
    both = all(name in names for name in TORCH)
    rows = []
    for case in results.cases:
        cells = [cell(results, case, kind, name) for name in names]
        best = results.best(case, kind, TORCH) if both else None
        own = results.time(case, kind, results.ours)
        cells += [times(best[1] / own) if best and own else "-"] if both else []
        rows.append([case, milliseconds(own), *cells])
    return table([kind, "ours, ms", *names, *(["torch, better"] if both else [])], rows)


def cell(results: Results, case: str, kind: str, name: str) -> str:
    """A ratio to ours, or a short word for why there is none."""
    record = results.records.get((case, kind, name))
    if record is None:
        return ""
    words = {"unsupported": "cannot", "not installed": "not installed", "skipped": "skipped", "died": "died"}
    return times(results.ratio(case, kind, name)) if "median" in record else words.get(record["status"], "error")


def memory(results: Results, kind: str) -> str:
    """Temporary bytes beside those of inputs, kernel and outputs, and what compilation or the first call takes."""
    operands = {case["name"]: case["operand_bytes"] for case in results.run["cases"]}
    rows = []
    for case in results.cases:
        ours, lax = (results.records.get((case, kind, name), {}) for name in (OURS, LAX))
        own = ours.get("temporary_bytes")
        rows.append(
            [
                case,
                *(number(None if size is None else size / 2**20, "{:.1f}") for size in (operands[case], own)),
                times(None if own is None else own / operands[case]),
                number(None if lax.get("temporary_bytes") is None else lax["temporary_bytes"] / 2**20, "{:.1f}"),
                *(number(record.get("compile_seconds")) for record in (ours, lax)),
            ]
        )
    header = [kind, "operands, MiB", "ours, temporary MiB", "temporary / operands", "jax.lax, temporary MiB"]
    return table([*header, "ours, compile s", "jax.lax, compile s"], rows)


def correctness(results: Results) -> str:
    """Per contestant: the largest error over all cases, per dtype, and where it is not compared."""
    dtypes = {case["name"]: numbers(case, results.run["suite"]) for case in results.run["cases"]}
    kinds = sorted(set(dtypes.values()), reverse=True)
    rows = []
    for name in results.contestants:
        records = [r for r in results.run["results"] if r["contestant"] == name and "median" in r]
        cells = []
        for dtype in kinds:
            found = [
                (max(r["errors"].values()), r["case"]) for r in records if r["errors"] and dtypes[r["case"]] == dtype
            ]
            cells.append(f"{max(found)[0]:.1e} ({max(found)[1]})" if found else "")
        rows.append([name, *cells, str(sum(not r["errors"] for r in records))])
    header = ["contestant", *(f"largest relative error, {dtype}" for dtype in kinds), "not compared"]
    return f"{table(header, rows)}\n\n{wrong(results, dtypes)}"


def numbers(case: dict[str, Any], suite: str) -> str:
    """What a case multiplies: its dtype, or "tf32"."""
    tf32 = suite == "gpu" and case["dtype"] == "float32" and case["precision"] == "default"
    return "tf32" if tf32 else case["dtype"]


def wrong(results: Results, dtypes: dict[str, str]) -> str:
    """Names whose errors are more than rounding."""
    found = [
        f"{record['contestant']} ({record['case']}, {record['kind']})"
        for record in results.run["results"]
        if record.get("errors") and max(record["errors"].values()) > ROUNDING[dtypes[record["case"]]]
    ]
    return f"**More than rounding:** {', '.join(found)}" if found else "No error is more than rounding."


def absent(results: Results) -> str:
    """Who could not do what, and why."""
    reasons: dict[tuple[str, str, str], dict[str, None]] = {}
    for record in results.run["results"]:
        if record["status"] != "ok":
            key = record["contestant"], record["status"], " ".join(record["reason"].split()).replace("|", "\\|")
            reasons.setdefault(key, {})[record["case"]] = None
    rows = [[name, status, reason, ", ".join(names)] for (name, status, reason), names in reasons.items()]
    return table(["contestant", "status", "reason", "cases"], rows, "---") if rows else ""


def geometric_mean(values: Iterable[float | None]) -> tuple[float, int] | None:
    logarithms = [math.log(value) for value in values if value]
    return (math.exp(sum(logarithms) / len(logarithms)), len(logarithms)) if logarithms else None


def over_best_peer(results: Results, case: str, kind: str) -> float | None:
    own, best = results.time(case, kind, OURS), results.best(case, kind, OTHER_FRAMEWORKS)
    return own / best[1] if own and best else None


def over_floor(results: Results, case: str, kind: str) -> float | None:
    floor = results.ratio(case, kind, FLOOR)
    return 1 / floor if floor else None


def peer_over_floor(results: Results, case: str, kind: str) -> float | None:
    """Below 1 a peer takes less time than the bare products."""
    ours, peer = over_floor(results, case, kind), over_best_peer(results, case, kind)
    return ours / peer if ours and peer else None


def lax_over_ours(results: Results, case: str, kind: str) -> float | None:
    return results.ratio(case, kind, LAX)


MEANS = {
    "ours / best of TensorFlow and PyTorch": over_best_peer,
    "jax.lax / ours": lax_over_ours,
    "ours / floor": over_floor,
    "best of TensorFlow and PyTorch / floor": peer_over_floor,
}


def means(results: Results) -> str:
    """Geometric means over the cases where both were timed."""
    lines = []
    for kind in results.kinds:
        for label, value in MEANS.items():
            found = [value(results, case, kind) for case in results.cases]
            below = sum(ratio is not None and ratio < 1 for ratio in found)
            mean = geometric_mean(found)
            lines += [f"- {kind}: {label}: {mean[0]:.2f} x over {mean[1]} cases, {below} below 1"] if mean else []
    return "Geometric means:\n\n" + "\n".join(lines) if lines else ""


def network(results: Results) -> str:
    """Per contestant: time of a step, ratio to ours, parameters, compile seconds."""
    rows = []
    for case in results.cases:
        for name in results.contestants:
            record = results.records[case, "step", name]
            parameters = record.get("facts", {}).get("parameters")
            cells = [milliseconds(record.get("median")), cell(results, case, "step", name), number(parameters, "{:,}")]
            rows.append([f"{case}, {name}", *cells, number(record.get("compile_seconds"))])
    counts = {r.get("facts", {}).get("parameters") for r in results.run["results"]} - {None}
    remark = "All have the same number of parameters." if len(counts) < 2 else "**The parameter counts differ.**"
    for case in results.cases:
        own, best = results.time(case, "step", results.ours), results.best(case, "step", TORCH)
        remark += f" {case}: ours / better PyTorch: {times(own / best[1])}." if own and best else ""
    header = ["training step", "ms", "time / ours", "parameters", "compile or first call, s"]
    return f"{table(header, rows)}\n\n{remark}"


def machine(run: Run) -> str:
    facts = run["machine"]
    gpu = "".join(f"{value}; " for value in (facts.get("gpu") or {}).values())
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{gpu}{facts['cpu']}, {facts['threads']} threads, {facts['memory_gib']} GiB; {facts['system']}; "
        f"Python {facts['python']}; allocator: {facts['allocator']}; {run['rounds']} rounds, medians.\n\n{versions}"
    )


def markdown(run: Run) -> str:
    results = Results(run)
    sections = [f"## {TITLES.get(run['suite'], run['suite'])}", machine(run)]
    if run["suite"] == "network":
        sections.append(network(results))
    else:
        for kind in results.kinds:
            sections += [summary(results, kind)] if run["suite"] != "volume" else []
            sections += [ratios(results, kind), memory(results, kind)]
        sections += [means(results), correctness(results)]
    return "\n\n".join(section for section in [*sections, absent(results)] if section)


def write_parts(parts: Sequence[str], path: pathlib.Path) -> None:
    """Writes a page of Markdown, and prints it."""
    text = "\n\n".join(parts) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(text)


def write(files: Sequence[pathlib.Path], out: pathlib.Path) -> str:
    """Writes ``report.md`` and the plots of stored runs beside it; the text for the terminal."""
    from benchmarks import plots

    runs = [json.loads(file.read_text()) for file in files]
    text = "\n\n".join(markdown(run) for run in runs) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "report.md", *(plot for run in runs if (plot := plots.draw(run, out)))]
    written[0].write_text(text)
    return f"{text}\nwrote {', '.join(str(path) for path in [*files, *written])}"
